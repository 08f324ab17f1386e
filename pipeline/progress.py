"""How far a stage is: a bar on a terminal, lines in a log, with the time that is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LOG_SECONDS = 30.0
WORK_SECONDS = 15.0


def track_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    label: str,
    count: int,
    size: int,
    log: logging.Logger,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on each (name, tensor) and say how far they are: a bar on a terminal, else lines.

    Holds no tensor while the next one is made.

    Args:
        count, size: how many tensors there are, and their bytes.
    """
    console = Console()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    started = spoken = time.monotonic()
    number = done = 0
    with Progress(
        TextColumn("{task.description}"),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=size)
        for name, tensor in tensors:
            moved = tensor.nbytes
            yield name, tensor
            del tensor
            number, done = number + 1, done + moved
            words = f"{label}: {number} of {count} tensors"
            bar.update(task, completed=done, description=words)
            now = time.monotonic()
            if not console.is_terminal and now - spoken >= LOG_SECONDS:
                spoken = now
                speed = done / (now - started)
                log.info(
                    "%s, %.1f of %.1f GB, %.2f GB/s, %.0f s left",
                    words,
                    done / 1e9,
                    size / 1e9,
                    speed / 1e9,
                    max(0, size - done) / speed,
                )


def track_work(
    items: Sequence[Any], tokens: Sequence[int], label: str, log: logging.Logger
) -> Iterator[Any]:
    """Pass on each item and say how far they are by tokens: a bar on a terminal, else lines.

    Args:
        tokens: of each item, at least 1.
    """
    console, total = Console(), sum(tokens)
    started = spoken = time.monotonic()
    done = 0
    columns = (
        TextColumn(label),
        BarColumn(),
        TextColumn("{task.percentage:.0f}% of {task.total:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total)
        for item, size in zip(items, tokens, strict=True):
            yield item
            done += size
            bar.update(task, completed=done)
            now = time.monotonic()
            if not console.is_terminal and now - spoken >= WORK_SECONDS:
                spoken = now
                left = (now - started) * (total - done) / done
                log.info(
                    "%s: %.0f%% of %d tokens, %.0f s left", label, 100 * done / total, total, left
                )
    log.info("%s: %d tokens in %.1f s", label, total, time.monotonic() - started)


@contextmanager
def track_parts(
    label: str, unit: str, log: logging.Logger, log_seconds: float | None = None
) -> Iterator[Callable[[int, float], None]]:
    """Yields told(done, part): `done` units of work, which are this part of all.

    Args:
        log_seconds: between lines; None: LOG_SECONDS.
    """
    console = Console()
    seconds = LOG_SECONDS if log_seconds is None else log_seconds
    started = spoken = time.monotonic()
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=1.0)

        def told(done: int, part: float) -> None:
            nonlocal spoken
            now = time.monotonic()
            took = max(now - started, 1e-9)
            words = f"{label}: {done:,} {unit}, {done / took:,.0f} a second"
            bar.update(task, completed=part, description=words)
            if not console.is_terminal and now - spoken >= seconds:
                spoken = now
                left = took * (1 - part) / max(part, 1e-9)
                log.info("%s, %.0f%%, %.0f s left", words, 100 * part, left)

        yield told

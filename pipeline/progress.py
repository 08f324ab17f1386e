"""How far a stage is that passes tensors on, or works through samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
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

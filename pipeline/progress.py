"""How far a stage is that passes tensors on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

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

"""Progress of long work: a bar on a terminal, lines in a log, both with the time that is left."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

# Between two lines of a log.
LOG_SECONDS = 30.0
# The speed is that of the last updates, as many as these.
WINDOW = 32


class Task:
    """One piece of work: how much of it is done, and the seconds that are left.

    rich's own estimate is empty until two updates fall into its 30 s window.
    """

    def __init__(self, part: float) -> None:
        """`part`: of all the work, what is already done."""
        self._samples = deque([(time.monotonic(), part)], maxlen=WINDOW)

    def update(self, part: float) -> None:
        """Note that this part of all the work is done now."""
        self._samples.append((time.monotonic(), part))

    def seconds_left(self) -> float | None:
        """Seconds until all is done; None before the first update."""
        # The first unit is often the slowest (kernels are compiled): later ones tell more.
        first_time, first = self._samples[1 if len(self._samples) > 2 else 0]
        last_time, last = self._samples[-1]
        if last <= first:
            return None
        seconds = (last_time - first_time) / (last - first) * (1 - last)
        return max(0.0, seconds - (time.monotonic() - last_time))


class _TimeLeft(ProgressColumn):
    def render(self, task: Any) -> Text:
        """`h:mm:ss left`, which counts down between two updates."""
        left = task.fields["timer"].seconds_left()
        return Text("" if left is None else f"{clock(left)} left", style="progress.remaining")


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


class Reporter:
    """Shows the tasks of a stage: as bars where the console is a terminal, else as log lines."""

    def __init__(
        self, log: logging.Logger, shown: bool = True, console: Console | None = None
    ) -> None:
        """`shown`: False on ranks other than 0, which report nothing."""
        console = console or Console()
        self.log, self.shown, self.bars = log, shown, shown and console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            _TimeLeft(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not self.bars)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    @contextmanager
    def task(
        self, label: str, part: float = 0.0, log_seconds: float | None = None
    ) -> Iterator[Callable[..., Task]]:
        """Yield update(part, text="", values=None): this part of all the work is done.

        `text` is shown behind the bar; `values` are the key=value pairs of a log line, of which
        there is at most one in `log_seconds` (None: LOG_SECONDS). update() returns the Task.
        """
        timer, every = Task(part), LOG_SECONDS if log_seconds is None else log_seconds
        spoken = time.monotonic()
        bar = self._progress.add_task(label, total=1.0, completed=part, text="", timer=timer)

        def update(part: float, text: str = "", values: dict[str, Any] | None = None) -> Task:
            nonlocal spoken
            timer.update(part)
            self._progress.update(bar, completed=part, text=text)
            now = time.monotonic()
            if values and self.shown and not self.bars and now - spoken >= every:
                spoken = now
                self.log.info("%s %s", label, pairs({**values, "eta_seconds": timer}))
            return timer

        try:
            yield update
        finally:
            # Also where all of it took less time than a refresh.
            self._progress.refresh()
            self._progress.remove_task(bar)


def pairs(values: dict[str, Any]) -> str:
    """`key=value key=value`; of a float four significant digits, of a Task its seconds left."""
    parts = []
    for key, value in values.items():
        if isinstance(value, Task):
            left = value.seconds_left()
            value = None if left is None else f"{left:.0f}"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        if value is not None:
            parts.append(f"{key}={value}")
    return " ".join(parts)


def track_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    label: str,
    count: int,
    size: int,
    log: logging.Logger,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on each (name, tensor) and report progress; holds no tensor while the next is made.

    Args:
        count, size: how many tensors there are, and their bytes.
    """
    started, number, done = time.monotonic(), 0, 0
    with Reporter(log) as reporter, reporter.task(label) as update:
        for name, tensor in tensors:
            moved = tensor.nbytes
            yield name, tensor
            del tensor
            number, done = number + 1, done + moved
            speed = done / max(time.monotonic() - started, 1e-9)
            gb = f"{done / 1e9:.1f} of {size / 1e9:.1f} GB"
            update(
                done / max(size, 1),
                f"{number} of {count} tensors, {gb}, {speed / 1e9:.2f} GB/s",
                {
                    "tensors": number,
                    "of_tensors": count,
                    "gb": f"{done / 1e9:.1f}",
                    "of_gb": f"{size / 1e9:.1f}",
                    "gb_per_second": f"{speed / 1e9:.2f}",
                },
            )


def track_work(
    items: Sequence[Any], tokens: Sequence[int], label: str, log: logging.Logger
) -> Iterator[Any]:
    """Pass on each item and report progress by tokens.

    Args:
        tokens: of each item, at least 1.
    """
    started, total, done = time.monotonic(), sum(tokens), 0
    with Reporter(log) as reporter, reporter.task(label) as update:
        for item, size in zip(items, tokens, strict=True):
            yield item
            done += size
            update(
                done / total,
                f"{100 * done / total:.0f}% of {total:,} tokens",
                {"tokens": done, "of_tokens": total},
            )
    log.info("%s tokens=%d seconds=%.1f", label, total, time.monotonic() - started)


@contextmanager
def track_parts(
    label: str, unit: str, log: logging.Logger, log_seconds: float | None = None
) -> Iterator[Callable[[int, float], None]]:
    """Yield report(done, part): `done` units of work, which are this part of all.

    Args:
        log_seconds: between lines; None: LOG_SECONDS.
    """
    started = time.monotonic()
    with Reporter(log) as reporter, reporter.task(label, log_seconds=log_seconds) as update:

        def report(done: int, part: float) -> None:
            speed = done / max(time.monotonic() - started, 1e-9)
            update(
                part,
                f"{100 * part:.0f}%, {done:,} {unit}, {speed:,.0f} a second",
                {
                    unit: done,
                    f"{unit}_per_second": f"{speed:.0f}",
                    "percent": f"{100 * part:.0f}",
                },
            )

        yield report

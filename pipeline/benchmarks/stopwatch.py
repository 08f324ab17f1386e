"""Times of calls that take turns, so that a clock that sinks under load slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch

MOST_LAUNCHES = 20


class Stopwatch:
    """Milliseconds per call, by CUDA events on a GPU and by the wall clock on a CPU."""

    def __init__(self, device: torch.device, repeats: int, launch_ms: float) -> None:
        """`launch_ms`: about how long one measurement's launches take together."""
        self.device, self.repeats, self.launch_ms = device, repeats, launch_ms

    def once(self, call: Callable[[], object], launches: int = 1) -> float:
        """Milliseconds per call over so many launches, one behind another."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            for _ in range(launches):
                call()
            return (time.perf_counter() - started) * 1e3 / launches
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / launches

    def rounds(
        self, calls: dict[Hashable, Callable[[], object]]
    ) -> dict[Hashable, list[float] | Exception]:
        """Of each call `repeats` times, after a warm-up; each round begins with another call.

        Of a call that fails in its warm-up, why.
        """
        times: dict[Hashable, list[float] | Exception] = {}
        launches = {}
        for name, call in calls.items():
            try:
                self.once(call)
                wanted = self.launch_ms / max(self.once(call), 1e-3)
            except Exception as error:
                times[name] = error
                continue
            times[name], launches[name] = [], min(max(round(wanted), 1), MOST_LAUNCHES)
        names = list(launches)
        for number in range(self.repeats):
            first = number % max(1, len(names))
            for name in names[first:] + names[:first]:
                times[name].append(self.once(calls[name], launches[name]))
        return times

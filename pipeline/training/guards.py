"""What stops a run in good order: a signal asks for a save at a step's edge, NaN ends it."""

from __future__ import annotations

import math
import signal
from types import FrameType

from pipeline.manifest import StageError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes SIGTERM and SIGINT (Ctrl-C) while in its `with` block; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def refuse_non_finite(value: float, name: str, step: int) -> None:
    """Raise StageError where a loss or gradient norm is NaN or infinite, before any save."""
    if not math.isfinite(value):
        raise StageError(
            f"step {step}: {name} is {value}; it must be finite. The last checkpoint is untouched: "
            "lower train.lr, raise train.warmup_steps or look at the data of this step"
        )

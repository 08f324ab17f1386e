"""What stops a run in good order, and which steps it leaves out: signals, a file, NaN, spikes."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.manifest import STOPPED_BY_FILE, StageError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes SIGTERM, SIGINT (Ctrl-C) and the file `trigger` while in its `with` block.

    Ctrl-C after a signal raises KeyboardInterrupt. A second SIGTERM asks for the same again: Slurm
    and torchrun both send one. Ranks see a request at different times: the loop takes the maximum
    of wanted() over all of them, so that they stop at the same step's edge.
    """

    def __init__(self, trigger: Path, on_signal: Callable[[], None] = lambda: None) -> None:
        """`on_signal`: called once, at the first signal, in a thread of its own.

        The signal handler itself must not log: it may have interrupted the main thread inside the
        logger or a write to the terminal. It may also run late, while the main thread is inside a
        collective. The thread is woken by Python's C handler, through a pipe.
        """
        self.trigger, self._on_signal = trigger, on_signal
        self._wanted = 0
        self._signalled = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        self._wanted = max(self._wanted, number)

    def _listen(self, pipe: int) -> None:
        # One byte a signal, its number; none once the pipe is closed.
        while number := os.read(pipe, 1):
            if number[0] in SIGNALS:
                self._on_signal()
                break

    def __enter__(self) -> StopRequest:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, args=(self._read,), daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def wanted(self) -> int:
        """0, the signal's number, or STOPPED_BY_FILE; what was seen once stays seen."""
        if self.trigger.exists():
            self._wanted = STOPPED_BY_FILE
        return self._wanted

    def consume(self) -> None:
        """Remove the file, so that the next start goes on; for one rank, once the save is whole."""
        self.trigger.unlink(missing_ok=True)


def refuse_non_finite(value: float, name: str, step: int) -> None:
    """Raise StageError where a loss or gradient norm is NaN or infinite, before any save."""
    if not math.isfinite(value):
        raise StageError(
            f"step {step}: {name} is {value}; it must be finite. The last checkpoint is untouched: "
            "lower train.lr, raise train.warmup_steps or look at the data of this step"
        )


def _mean_and_deviation(values: deque[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; sums rounded once, so the same bits everywhere."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1))


class StepGuard:
    """Decides for each step, from its loss and gradient norm, whether the weights may move.

    Under `non_finite` "stop" a value that is not finite ends the run before the update, under
    "skip" it leaves the step out. With `spike_sigmas` a step is also left out where its loss or
    norm is above mean + spike_sigmas * standard deviation of the last `spike_window` accepted
    steps, once half of them are there (the rule of OLMo 2, arXiv 2501.00656, which uses 6 and 128).

    A step is check_loss(), refuses() and finish(), in this order. Given the globally reduced
    values, every rank decides the same; given state(), so does a resumed run.
    """

    def __init__(
        self,
        non_finite: str = "stop",
        spike_sigmas: float | None = None,
        spike_window: int = 128,
        skips_in_a_row: int = 10,
    ) -> None:
        self.stops = non_finite == "stop"
        self.spike_sigmas, self.spike_window = spike_sigmas, spike_window
        self.skips_in_a_row = skips_in_a_row
        # Of the run so far, and since the last step that was taken.
        self.skipped = self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=spike_window)
        self._norms: deque[float] = deque(maxlen=spike_window)
        # Of the step that is open.
        self._step: int | None = None
        self._loss = 0.0
        self._norm: float | None = None
        self._reason: str | None = None

    def _objection(self, name: str, value: float, history: deque[float]) -> str | None:
        """Why a step with this value is left out; None where nothing speaks against it.

        Raises:
            StageError: where the value is not finite and that stops the run.
        """
        if self.stops:
            refuse_non_finite(value, f"the {name}", self._step)
        if not math.isfinite(value):
            return f"{name} is {value}"
        if self.spike_sigmas is None or len(history) < max(2, self.spike_window / 2):
            return None
        mean, deviation = _mean_and_deviation(history)
        if value <= mean + self.spike_sigmas * deviation:
            return None
        return f"{name} {value:.4g} is above {mean:.4g} + {self.spike_sigmas:g} * {deviation:.2g}"

    def check_loss(self, step: int, loss: float) -> None:
        """Open step `step` with its loss, before the last micro-batch's backward.

        Raises:
            StageError: where the loss is not finite and that stops the run.
        """
        self._step, self._loss, self._norm = step, float(loss), None
        self._reason = self._objection("loss", self._loss, self._losses)

    def refuses(self, norm: float) -> bool:
        """Whether the optimizer must not update; the first answer holds for the whole step.

        `norm` is the gradient norm over all ranks; DeepSpeed gives -1 for one that is not finite.

        Raises:
            StageError: where the norm is not finite and that stops the run.
        """
        if self._norm is None:
            norm = float(norm)
            self._norm = math.inf if norm < 0 else norm
            objection = self._objection("gradient norm", self._norm, self._norms)
            self._reason = self._reason or objection
        return self._reason is not None

    def finish(self, step: int) -> str | None:
        """Close the step; why it was left out, or None where it was taken.

        Raises:
            StageError: where more than `skips_in_a_row` steps in a row were left out.
            RuntimeError: where this step is not open, or refuses() was not asked about it.
        """
        if step != self._step or (self._reason is None and self._norm is None):
            raise RuntimeError(
                f"step {step}: StepGuard was not asked about its loss and gradient norm; call "
                "check_loss(), then refuses() before the optimizer updates, then finish() once"
            )
        self._step = None
        if self._reason is None:
            self._losses.append(self._loss)
            self._norms.append(self._norm)
            self.in_a_row = 0
            return None
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.skips_in_a_row:
            raise StageError(
                f"step {step}: {self.in_a_row} steps in a row were left out, the last because its "
                f"{self._reason}; at most {self.skips_in_a_row} may be. Lower train.lr, raise "
                "train.warmup_steps or train.spike_sigmas, or look at the data of these steps"
            )
        return self._reason

    def state(self) -> dict[str, Any]:
        """JSON values that, with the configuration, decide every later step.

        For use between steps. JSON keeps a Python float's every bit.
        """
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what state() gave; of a longer history its newest part is kept."""
        self._losses = deque(state["losses"], maxlen=self.spike_window)
        self._norms = deque(state["norms"], maxlen=self.spike_window)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

"""Stop requests by signal and file; steps left out for NaN and spikes, also after a resume."""

import contextlib
import json
import math
import os
import random
import signal
import threading

import pytest

from pipeline.manifest import STOPPED_BY_FILE, StageError
from pipeline.training.guards import StepGuard, StopRequest

NAN, INF = float("nan"), float("inf")


def take(guard, step, loss, norm):
    """One step as the loop does it: (whether the optimizer updated, why it did not)."""
    guard.check_loss(step, loss)
    updates = [not guard.refuses(norm) for _ in range(2)]
    assert updates[0] == updates[1]
    return updates[0], guard.finish(step)


def filled(values=(2.0, 2.2), **changes):
    """A guard with 64 accepted steps: losses of `values` in turn, norms of half of that."""
    guard = StepGuard(**({"spike_sigmas": 6} | changes))
    for step in range(64):
        value = values[step % len(values)]
        assert take(guard, step, value, value / 2) == (True, None)
    return guard


# Stop requests.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_ctrl_c_after_it_acts(tmp_path, number):
    before = signal.getsignal(number)
    with StopRequest(tmp_path / "stop") as stop:
        assert stop.wanted() == 0
        os.kill(os.getpid(), number)
        assert stop.wanted() == number
        # Slurm sends one to every process, srun passes its own on, and so does torchrun.
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted() == max(number, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_a_signal_is_acknowledged_once_and_not_by_the_interrupted_thread(tmp_path):
    """Which may hold the logger's lock, or be inside a write to the terminal."""
    calls, called = [], threading.Event()

    def acknowledge():
        calls.append(threading.current_thread())
        called.set()

    wakeup = signal.set_wakeup_fd(-1)
    with StopRequest(tmp_path / "stop", acknowledge), contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert called.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
    assert len(calls) == 1 and calls[0] is not threading.main_thread()
    assert not calls[0].is_alive()
    # What was there before is there again.
    assert signal.set_wakeup_fd(wakeup) == -1
    with StopRequest(tmp_path / "stop", acknowledge):
        pass
    assert len(calls) == 1


def test_a_file_asks_for_a_stop_once(tmp_path):
    trigger = tmp_path / "stop"
    with StopRequest(trigger) as stop:
        assert stop.wanted() == 0
        trigger.touch()
        assert stop.wanted() == STOPPED_BY_FILE
        stop.consume()
        # Other ranks may ask after the file has gone.
        assert stop.wanted() == STOPPED_BY_FILE
    assert not trigger.exists()
    with StopRequest(trigger) as stop:
        assert stop.wanted() == 0
        stop.consume()


def test_the_file_does_not_hide_a_second_signal(tmp_path):
    """One answer for all ranks, the larger one; Ctrl-C after the file still ends in good order."""
    (tmp_path / "stop").touch()
    with StopRequest(tmp_path / "stop") as stop:
        assert stop.wanted() == STOPPED_BY_FILE
        stop.consume()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted() == STOPPED_BY_FILE
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert max(signal.valid_signals()) < STOPPED_BY_FILE


# Values that are not finite.


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_stops(loss):
    with pytest.raises(StageError, match=f"step 3: the loss is {loss}; it must be finite.*lower"):
        StepGuard().check_loss(3, loss)


@pytest.mark.parametrize(("norm", "said"), [(NAN, "nan"), (INF, "inf"), (-1.0, "inf")])
def test_a_norm_that_is_not_finite_stops(norm, said):
    guard = StepGuard()
    guard.check_loss(3, 2.0)
    with pytest.raises(StageError, match=f"step 3: the gradient norm is {said}; it must be finite"):
        guard.refuses(norm)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, 1.0, "loss is nan"),
        (INF, -1.0, "loss is inf"),
        (2.0, INF, "gradient norm is inf"),
        (2.0, -1.0, "gradient norm is inf"),
        (2.0, NAN, "gradient norm is nan"),
    ],
)
def test_a_step_that_is_not_finite_is_left_out(loss, norm, reason):
    guard = StepGuard("skip")
    assert take(guard, 1, loss, norm) == (False, reason)
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    assert take(guard, 2, 2.0, 1.0) == (True, None)
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    # JSON has no NaN: nothing of a step left out may be kept.
    assert json.loads(json.dumps(guard.state(), allow_nan=False))["losses"] == [2.0]


def test_a_loss_decides_where_the_norm_was_never_asked_for():
    """DeepSpeed does not reach the optimizer in every step that overflows."""
    guard = StepGuard("skip")
    guard.check_loss(1, NAN)
    assert guard.finish(1) == "loss is nan"


def test_the_first_norm_of_a_step_holds():
    guard = StepGuard("skip")
    guard.check_loss(1, 2.0)
    assert not guard.refuses(1.0)
    assert not guard.refuses(INF)
    guard.finish(1)
    assert guard.state()["norms"] == [1.0]


def test_too_many_in_a_row_stop():
    guard = StepGuard("skip", skips_in_a_row=2)
    for step in range(10):
        # Two, one taken, two more: never more than two in a row.
        value = 2.0 if step % 3 == 2 else NAN
        take(guard, step, value, 1.0)
    with pytest.raises(
        StageError,
        match="step 11: 3 steps in a row were left out, the last because its gradient norm is inf; "
        "at most 2 may be. Lower train.lr, raise train.warmup_steps or train.spike_sigmas",
    ):
        for step in (10, 11):
            take(guard, step, 2.0, INF)


@pytest.mark.parametrize("asked", ["nothing", "loss", "another step", "finished"])
def test_a_guard_that_was_not_asked_says_so(asked):
    guard = StepGuard()
    if asked != "nothing":
        guard.check_loss(2 if asked == "another step" else 3, 2.0)
    if asked in ("another step", "finished"):
        guard.refuses(1.0)
    if asked == "finished":
        guard.finish(3)
    with pytest.raises(RuntimeError, match="step 3: StepGuard was not asked.*call check_loss"):
        guard.finish(3)


# Spikes.


def test_a_spike_of_the_loss_or_the_norm_is_left_out():
    guard = filled()
    # 32 of 2.0 and 32 of 2.2: mean 2.1, sample deviation 0.1 * sqrt(64 / 63).
    bound = 2.1 + 0.6 * math.sqrt(64 / 63)
    assert take(guard, 64, bound + 1e-9, 1.0) == (False, "loss 2.705 is above 2.1 + 6 * 0.1")
    reason = "gradient norm 1.352 is above 1.05 + 6 * 0.05"
    assert take(guard, 65, 2.1, bound / 2 + 1e-9) == (False, reason)
    assert (guard.skipped, guard.in_a_row) == (2, 2)
    # Neither moved the bound, at which a step is taken.
    assert take(guard, 66, bound - 1e-9, bound / 2 - 1e-9) == (True, None)
    # Far below is no spike.
    assert take(guard, 67, 0.1, 0.01) == (True, None)


def test_no_spike_is_seen_before_half_a_window():
    guard = StepGuard(spike_sigmas=6, spike_window=9)
    for step in range(5):
        assert take(guard, step, 2.0 + 0.1 * (step % 2), 1.0) == (True, None)
    # Four would have been fewer than half of nine.
    assert not take(guard, 5, 100.0, 1.0)[0]
    guard = StepGuard(spike_sigmas=6, spike_window=9)
    for step, loss in enumerate([2.0, 2.1, 2.0, 2.1, 100.0]):
        assert take(guard, step, loss, 1.0)[0]


def test_a_window_forgets_what_is_older():
    guard = filled((9.0, 9.5), spike_window=64)
    for step in range(64, 128):
        assert take(guard, step, 2.0 + 0.1 * (step % 2), 1.0)[0]
    assert not take(guard, 128, 5.0, 1.0)[0]


def test_without_sigmas_nothing_is_a_spike():
    assert take(filled(spike_sigmas=None), 64, 1e30, 1e30) == (True, None)


def test_a_spike_does_not_stop_where_nan_does():
    guard = filled(non_finite="stop")
    assert not take(guard, 64, 9.0, 1.0)[0]
    with pytest.raises(StageError, match="the loss is nan"):
        guard.check_loss(65, NAN)


# Resume.


def noisy(count):
    """Losses and norms with spikes and values that are not finite."""
    source = random.Random(5)
    for step in range(count):
        loss, norm = source.gauss(2.0, 0.1), math.exp(source.gauss(0.0, 0.3))
        kind = source.random()
        if kind < 0.05:
            loss = source.choice([NAN, 9.0, 2.8])
        elif kind < 0.1:
            norm = source.choice([-1.0, INF, 40.0, 3.0])
        yield step, loss, norm


@pytest.mark.parametrize("at", [1, 20, 100])
def test_a_resumed_run_decides_as_one_never_stopped(at):
    def guard():
        return StepGuard("skip", spike_sigmas=3, spike_window=32)

    whole, broken = guard(), guard()
    decided = [take(whole, *values) for values in noisy(200)]
    assert 10 < whole.skipped < 40
    again = []
    for step, loss, norm in noisy(200):
        if step == at:
            stored = json.dumps(broken.state(), allow_nan=False)
            broken = guard()
            broken.restore(json.loads(stored))
        again.append(take(broken, step, loss, norm))
    # The reasons hold the bounds as well.
    assert again == decided
    assert broken.state() == whole.state()


def test_a_guard_without_its_history_decides_otherwise():
    """The control of the test above: it can fail."""
    whole, broken = filled(), filled()
    broken.restore(StepGuard().state())
    assert take(whole, 64, 9.0, 1.0)[0] != take(broken, 64, 9.0, 1.0)[0]


def test_a_shorter_window_keeps_the_newest():
    guard = StepGuard(spike_sigmas=6, spike_window=4)
    guard.restore(filled(values=range(1, 65), spike_sigmas=None).state())
    assert guard.state()["losses"] == [61, 62, 63, 64]
    take(guard, 64, 63.0, 31.0)
    assert guard.state()["losses"] == [62, 63, 64, 63.0]

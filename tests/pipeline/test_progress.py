"""How far work is: bars on a terminal, lines in a log, and the time that is left."""

import io
import logging

import pytest
import torch
from rich.console import Console

from pipeline import progress
from pipeline.progress import Reporter, Task, clock, pairs, track_tensors, track_work

LOG = logging.getLogger("test.progress")


@pytest.fixture
def wait(monkeypatch):
    """A function that lets time pass, for progress.py alone."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_the_time_left_is_known_after_one_slow_step_and_counts_down(wait):
    task = Task(0.0)
    assert task.seconds_left() is None
    wait(900)
    task.update(1 / 10)
    assert task.seconds_left() == pytest.approx(9 * 900)
    wait(90)
    task.update(2 / 10)
    # The first step, which compiles kernels, counts no more.
    assert task.seconds_left() == pytest.approx(8 * 90)
    wait(50)
    assert task.seconds_left() == pytest.approx(8 * 90 - 50)
    wait(10_000)
    assert task.seconds_left() == 0


def test_a_resumed_run_does_not_count_earlier_steps(wait):
    task = Task(8 / 10)
    wait(90)
    task.update(9 / 10)
    assert task.seconds_left() == pytest.approx(90)


def test_a_terminal_shows_the_time_left_of_slow_steps(wait, caplog):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    caplog.set_level(logging.INFO)
    with Reporter(LOG, console=console) as reporter, reporter.task("finetune") as update:
        wait(90)
        update(1 / 40, "1 of 40 steps, loss 7.6477", {"step": 1})
        with reporter.task("finetune: validation") as validate:
            validate(1 / 16, "row 1 of 16")
    shown = screen.getvalue()
    assert "1 of 40 steps, loss 7.6477 0:58:30 left" in shown
    assert "finetune: validation" in shown and "row 1 of 16" in shown
    assert not caplog.messages


@pytest.mark.parametrize("shown", [True, False])
def test_a_log_has_lines_with_the_time_left_and_not_too_many(wait, caplog, shown):
    """`shown`: on rank 0."""
    caplog.set_level(logging.INFO)
    reporter = Reporter(LOG, shown, Console(file=io.StringIO()))
    with reporter, reporter.task("finetune: validation", log_seconds=30) as update:
        for row in range(1, 5):
            wait(20)
            update(row / 4, f"row {row} of 4", {"row": row, "of_rows": 4})
    assert caplog.messages == shown * [
        "finetune: validation row=2 of_rows=4 eta_seconds=40",
        "finetune: validation row=4 of_rows=4 eta_seconds=0",
    ]


def test_values_are_one_word_each():
    assert pairs({"a": 1, "b": 2.34567, "c": None, "d": "x", "eta": Task(0.5)}) == "a=1 b=2.346 d=x"
    assert clock(3 * 3600 + 62.4) == "3:01:02"


@pytest.mark.parametrize("terminal", [True, False])
def test_tensors_and_tokens(caplog, monkeypatch, terminal, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    given = [(f"t{i}", torch.zeros(250_000_000, dtype=torch.uint8)) for i in range(2)]
    with caplog.at_level(logging.INFO):
        tracked = track_tensors(given, "convert: written", 2, 500_000_000, LOG)
        assert [name for name, _ in tracked] == ["t0", "t1"]
        assert list(track_work("ab", [30, 10], "evaluate: base", LOG)) == ["a", "b"]
    told = caplog.messages
    assert told.pop().startswith("evaluate: base tokens=40 seconds=0.")
    if terminal:
        assert not told
        printed = capsys.readouterr().out
        assert "2 of 2 tensors, 0.5 of 0.5 GB" in printed and "100% of 40 tokens" in printed
    else:
        assert told[0].startswith("convert: written tensors=1 of_tensors=2 gb=0.2 of_gb=0.5 gb_per")
        assert told[1].endswith(" eta_seconds=0")
        assert told[2].startswith("evaluate: base tokens=30 of_tokens=40 eta_seconds=")

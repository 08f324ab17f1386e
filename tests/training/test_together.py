"""What one rank meets, all ranks answer alike, at the same step."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.training.small_training import (
    parallel_section,
    rows_a_process,
    small_config,
    small_train,
    small_trainer,
)
from tests.training.worlds import run_world

LAYOUTS = {
    "tp2_sp": {"world": 2, "tensor": 2, "sequence_parallel": True},
    "ulysses2": {"world": 2, "ulysses": 2},
    "zero3": {"world": 2, "zero_stage": 3},
}


def trainer_of(layout, folder, **changes):
    from pipeline.training.checkpoint import Progress

    parallel = parallel_section(**layout)
    train = small_train(micro_batch_rows=rows_a_process(parallel), save_every=100, **changes)
    trainer, start = small_trainer(small_config("sink", 2), parallel, train, Path(folder))
    return trainer, start or Progress(0, 0)


def at_step(trainer, number, action):
    """Have the rank 1 of the world do this as its step of that number begins."""
    honest = trainer.step

    def step(step, consumed):
        if step + 1 == number and trainer.layout.rank == 1:
            action()
        return honest(step, consumed)

    trainer.step = step


def signalled(layout, folder):
    """(exit code, checkpoints) of a run of which one rank gets SIGTERM in its third step."""
    from pipeline.manifest import StageStopped

    trainer, start = trainer_of(layout, folder)
    at_step(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        trainer.run(start)
    except StageStopped as stopped:
        return stopped.exit_code, [p.name for p in Path(folder).glob("checkpoints/step_*")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_signal_to_one_rank_saves_and_stops_all(name, tmp_path):
    found = run_world(2, signalled, LAYOUTS[name], str(tmp_path))
    assert found == [(128 + signal.SIGTERM, ["step_000003"])] * 2


def overflowing(layout, folder, non_finite):
    """What a run says of whose third step one rank's losses are not finite."""
    from pipeline.manifest import StageError

    trainer, start = trainer_of(layout, folder, non_finite=non_finite, steps=4)
    honest = trainer._forward
    broken = []

    def forward(batch):
        losses, batch = honest(batch)
        return (losses * float("nan") if broken else losses), batch

    trainer._forward = forward
    at_step(trainer, 3, lambda: broken.append(True))
    at_step(trainer, 4, broken.clear)
    try:
        trainer.run(start)
    except StageError as error:
        return str(error)
    return trainer.guard.skipped


# Tensor-parallel ranks hold the same losses: one alone cannot have another.
@pytest.mark.parametrize("name", ["ulysses2", "zero3"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(name, tmp_path):
    found = run_world(2, overflowing, LAYOUTS[name], str(tmp_path), "stop")
    assert found[0] == found[1]
    assert found[0].startswith("step 3: the loss is nan; it must be finite")


@pytest.mark.parametrize("name", ["ulysses2", "zero3"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(name, tmp_path):
    assert run_world(2, overflowing, LAYOUTS[name], str(tmp_path), "skip") == [1, 1]
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    skipped = {line["step"]: line["skipped"] for line in lines if line["kind"] == "train"}
    assert skipped == {1: None, 2: None, 3: "loss is nan", 4: None}


def damaged(layout, folder):
    trainer, start = trainer_of(layout, folder)
    return start.step


def test_what_one_ranks_share_of_the_files_lacks_all_leave_out(tmp_path):
    """Each rank checks a part of the files; all go back to the same checkpoint."""
    layout = LAYOUTS["zero3"]
    run_world(2, saving, layout, str(tmp_path))
    for path in (tmp_path / "checkpoints" / "step_000004").glob("__1_*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert run_world(2, damaged, layout, str(tmp_path)) == [2, 2]


def saving(layout, folder):
    parallel = parallel_section(**layout)
    train = small_train(micro_batch_rows=1, save_every=2, steps=4)
    trainer, _ = small_trainer(small_config("sink", 2), parallel, train, Path(folder))
    from pipeline.training.checkpoint import Progress

    trainer.run(Progress(0, 0))

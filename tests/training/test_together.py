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


def in_own_folders(folder, loads):
    """What a start, or else a save, says where each rank sees a folder of its own."""
    from pipeline.manifest import StageError
    from pipeline.training import checkpoint_folder
    from pipeline.training.checkpoint import Progress

    checkpoint_folder.SEEN_WITHIN = 0.1
    trainer, _ = trainer_of({"world": 2, "zero_stage": 1}, folder)
    own = Path(folder) / f"disk_{trainer.layout.rank}"
    trainer.checkpointer.folder = own / "checkpoints"
    try:
        if loads:
            checkpoint_folder.check_shared(own, trainer.layout.host_group)
        else:
            trainer.checkpointer.save(Progress(2, 8))
            trainer.checkpointer.wait()
    except StageError as error:
        return str(error), [str(path.name) for path in own.glob("checkpoints/*")]


@pytest.mark.parametrize("loads", [True, False], ids=["start", "save"])
def test_an_outputs_folder_of_each_node_by_itself_is_refused(loads, tmp_path):
    (first, left), (second, others) = run_world(2, in_own_folders, str(tmp_path), loads)
    words = "does not see what rank 0 on" if loads else "does not see 4 of the 11 files that the"
    assert words in first and "set outputs to a folder that all nodes share" in first
    assert second.replace("disk_1", "disk_0") == first
    assert left == others == []


def group_limits(folder, seconds):
    """Seconds that each process group waits once a run is built, and what it must exceed.

    One group more is made for half of `seconds`; rank 1 comes to it `seconds` late.
    """
    import time
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from pipeline.training.loop import LONG

    trainer, _ = trainer_of({"world": 2, "zero_stage": 3}, folder, hang_seconds=7)
    groups = list(dist.distributed_c10d._world.pg_map)
    assert len(groups) > 4
    cpu = torch.device("cpu")
    limits = [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]
    late = dist.new_group(timeout=timedelta(seconds=seconds / 2))
    trainer.layout.set_timeouts(60)
    if trainer.layout.rank == 1:
        time.sleep(seconds)
    dist.all_reduce(torch.ones(()), group=late)
    return limits, LONG * 7 + 8 * trainer.watchdog.grace


def test_process_groups_wait_longer_than_the_watchdog_in_its_slowest_phase(tmp_path):
    for limits, longest in run_world(2, group_limits, str(tmp_path), 0.6):
        assert min(limits) > longest

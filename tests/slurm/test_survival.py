"""What clusters do to a job, on a real Slurm with the true training: the losses stay the same bits.

Two nodes train together over gloo.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.jobs import Scripts, Training, rank_processes, saved, small_run, text

STEPS, SAVE_EVERY = 200, 40
# A start takes some 20 seconds on two cores: the recipe's check, the pre-flight and the training
# each import torch, two processes at a time.
START = 240

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the runs lie."""
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def scripts(cluster, root):
    """The scripts with true Python, for the small run."""
    often = (f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", "train.validate_every=100")
    return Scripts(cluster, Path(sys.prefix), *small_run(root), *often, "wandb.mode=offline")


@pytest.fixture(scope="module")
def whole(scripts, root):
    """Losses of a job that nothing has disturbed."""
    job = Training(scripts, root, "whole")
    losses = job.losses(START)
    assert [step for step, *_ in losses] == list(range(1, STEPS + 1))
    assert text(job.log).count("preflight: node node") == 2
    return losses


def stopped_in_good_order(job, said):
    """The run has saved, as the log says, at the step's edge: it is no regular save's step."""
    wait_until(lambda: said in text(job.log), START, f"{said}\n{text(job.log)}")
    wait_until(lambda: job.restarts() == 1, START, "the restart")
    assert saved(job.run) > SAVE_EVERY and f"{said}{saved(job.run):06d}" in text(job.log)
    assert "Traceback" not in text(job.log)
    return 1


def told_to_stop(job):
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    return stopped_in_good_order(job, "to go on from step_")


def requeued_by_hand(job):
    """Every process gets SIGTERM, wandb-core as well."""
    job.cluster.run("scontrol", "requeue", job.id)
    return stopped_in_good_order(job, "Slurm ends this job: saved is step_")


def preempted(job):
    urgent = ("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    other = job.cluster.run("sbatch", "--parsable", *urgent, cwd=job.run).stdout.strip()
    assert job.cluster.wait_for_job(other, START)["JobState"] == "COMPLETED"
    return stopped_in_good_order(job, "Slurm ends this job: saved is step_")


def a_node_is_lost(job):
    job.cluster.kill_node("node2")
    wait_until(lambda: job.restarts() == 1, START, "Slurm sees that the node is gone")
    job.cluster.start_node("node2")
    return 1


def a_rank_is_killed(job):
    os.kill(rank_processes(job.id)[1], signal.SIGKILL)
    return 0


def killed_inside_a_save(job):
    half = job.run / "finetune.partial/checkpoints"
    wait_until(lambda: any(half.glob("step_*.partial")), START, "a save", poll=0.0005)
    os.kill(rank_processes(job.id)[0], signal.SIGKILL)
    # Before the others could finish it.
    assert any(half.glob("step_*.partial"))
    return 0


SCENARIOS = (
    told_to_stop,
    requeued_by_hand,
    preempted,
    a_node_is_lost,
    a_rank_is_killed,
    killed_inside_a_save,
)


@pytest.mark.parametrize("disturb", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_losses_are_those_of_an_undisturbed_job(scripts, root, whole, disturb):
    job = Training(scripts, root, disturb.__name__)
    try:
        # Beyond a checkpoint, and not at the next.
        job.reach(SAVE_EVERY + 5, START)
        restarts = disturb(job)
        assert job.losses(START) == whole
        assert job.restarts() == restarts
        assert text(job.log).count("resume step=") == 1
    finally:
        job.cluster.run("scancel", job.id, check=False)
        print(text(job.log))

"""20 random kills of a job: no step is lost or doubled, and the time that is lost is as simulated."""

import json
import os
import random
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest

from pipeline.planning.interruptions import Course, simulate
from tests.slurm.cluster import wait_until
from tests.slurm.jobs import Scripts, Training, rank_processes, saved, small_run, text

KILLS = 20
STEPS, SAVE_EVERY = 9_000, 100
# Seconds of training before a kill, on average; of the kills, the share that meets a start instead.
MEAN, WHILE_STARTING = 12.0, 0.2
START, WHOLE = 300, 1800


def recorded(job: Training) -> int:
    """The last step that the run has recorded; 0 where none."""
    try:
        with (job.run / "finetune.partial/metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            tail = file.read().decode(errors="replace")
    except FileNotFoundError:
        return 0
    found = re.findall(r'"train", "step": (\d+)', tail)
    return int(found[-1]) if found else 0


def begins(job: Training, life: int) -> None:
    """Wait until the start of that number, from 0, trains: its first step beyond the checkpoint."""
    wait_until(
        lambda: text(job.log).count("to save and stop: touch") == life + 1,
        START,
        f"start {life} of the ranks\n{text(job.log)[-4000:]}",
    )
    at = saved(job.run)
    wait_until(lambda: recorded(job) > at, START, f"a step beyond {at}")


def kill_one(job: Training, dice: random.Random) -> None:
    ranks = wait_until(
        lambda: len(found := rank_processes(job.id)) == 2 and found, START, "two ranks"
    )
    os.kill(ranks[dice.randrange(2)], signal.SIGKILL)
    wait_until(lambda: not rank_processes(job.id), START, "the ranks are gone")


@pytest.mark.slow
def test_random_kills_lose_and_double_nothing(cluster, tmp_path):
    often = (f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", "train.log_every=100")
    rarely = ("train.validate_every=100000", "wandb.mode=offline")
    scripts = Scripts(cluster, Path(sys.prefix), *small_run(tmp_path), *often, *rarely)
    whole = Training(scripts, tmp_path, "whole").losses(WHOLE)
    assert [step for step, *_ in whole] == list(range(1, STEPS + 1))

    dice, job = random.Random(1), Training(scripts, tmp_path, "killed")
    begins(job, 0)
    wait_until(lambda: saved(job.run) > 0, START, "a checkpoint, which has the W&B run's id")
    # Of each life: seconds from the kill before to its first step, then to its own kill; steps.
    since, began, starting, training, resumed = time.monotonic(), time.monotonic(), [], [], []
    first = recorded(job)
    stretches, life = [], 0
    while len(stretches) < KILLS:
        meets_a_start = bool(stretches) and dice.random() < WHILE_STARTING
        if stretches and not meets_a_start:
            begins(job, life)
            began, first = time.monotonic(), recorded(job)
            starting.append(began - since)
        if not meets_a_start:
            time.sleep(dice.expovariate(1 / MEAN))
        last = recorded(job)
        kill_one(job, dice)
        now = time.monotonic()
        if not meets_a_start:
            training.append((now - began, last - first))
        stretches.append(now - since)
        resumed.append(saved(job.run))
        since, life = now, text(job.log).count("to save and stop: touch")
    assert job.losses(WHOLE) == whole
    assert job.restarts() == 0
    check_wandb(job)
    told = measured_and_simulated(job, stretches, starting, training, resumed)
    print(json.dumps(told, indent=1))
    assert told["effective_measured"] == pytest.approx(told["effective_simulated"], abs=0.03)


def check_wandb(job: Training) -> None:
    """All starts have written to one run."""
    ids = {path.name.rsplit("-", 1)[1] for path in job.run.glob("finetune/wandb/offline-run-*")}
    assert len(ids) == 1, ids


def measured_and_simulated(job, stretches, starting, training, resumed) -> dict[str, float]:
    """Effective training time between the first step and the last kill, as it was and as simulated.

    The simulation gets the times between kills, and the means of a step, a start and a write. The
    first life had begun before the first stretch: it is left out of both.
    """
    seconds, steps = (sum(values) for values in zip(*training, strict=True))
    writes = [float(s) for s in re.findall(r"saved step_\d+ in ([\d.]+) s", text(job.log))]
    course = Course(
        step=seconds / steps,
        blocked=0.0,
        write=statistics.mean(writes),
        restart=statistics.mean(starting),
    )
    elapsed, useful = sum(stretches[1:]), (resumed[-1] - resumed[0]) * course.step
    return {
        "kills": len(stretches),
        "effective_measured": useful / elapsed,
        "effective_simulated": simulate(course, SAVE_EVERY, stretches[1:]).effective,
        "seconds_between_kills": elapsed / len(stretches[1:]),
        **vars(course),
    }

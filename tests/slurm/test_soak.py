"""20 random kills of a job: no step is lost or doubled, and what they cost is as simulated."""

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
STEPS, SAVE_EVERY = 4_500, 25
# Steps of training before a kill, on average; of the kills, the share that meets a start instead,
# at most so many seconds after its ranks are there.
MEAN, WHILE_STARTING, LONGEST_IN_START = 150, 0.2, 5.0
START, WHOLE = 300, 1800
# What a start says when it takes its first step, and the batch shell once a start is over.
TRAINS, ENDED = "full layers on cpu run by", "training failed, and starts again"


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
        lambda: text(job.log).count(TRAINS) == life + 1,
        START,
        f"start {life} of the ranks\n{text(job.log)[-4000:]}",
    )
    at = saved(job.run)
    wait_until(lambda: recorded(job) > at, START, f"a step beyond {at}")


def kill_one(job: Training, dice: random.Random) -> tuple[float, int]:
    """Kill a rank; (the time, the last recorded step)."""
    before = text(job.log).count(ENDED)
    at, last = time.monotonic(), recorded(job)
    os.kill(rank_processes(job.id)[dice.randrange(2)], signal.SIGKILL)
    wait_until(lambda: text(job.log).count(ENDED) == before + 1, START, "the ranks are gone")
    return at, last


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
    # Of each life: seconds since the kill before it until its first step and until its own kill;
    # seconds and steps between these; where the next one begins.
    starting, stretches, training, resumed = [], [], [], []
    before, life = time.monotonic(), 0
    while len(stretches) < KILLS:
        # What starts thrice at one checkpoint is given up, as test_train_job.py shows.
        fresh = len(resumed) >= 2 and resumed[-1] > resumed[-2]
        if fresh and dice.random() < WHILE_STARTING:
            wait_until(lambda: len(rank_processes(job.id)) == 2, START, "two ranks")
            time.sleep(dice.uniform(0, LONGEST_IN_START))
            killed, _ = kill_one(job, dice)
        else:
            begins(job, life)
            began, first = time.monotonic(), recorded(job)
            least = max(saved(job.run) + 2 * SAVE_EVERY, first + int(dice.expovariate(1 / MEAN)))
            wait_until(lambda step=least: recorded(job) >= step, WHOLE, f"step {least}")
            killed, last = kill_one(job, dice)
            training.append((killed - began, last - first))
            starting.append(began - before)
        stretches.append(killed - before)
        resumed.append(saved(job.run))
        before, life = killed, text(job.log).count(TRAINS)
    assert job.losses(WHOLE) == whole
    assert job.restarts() == 0
    check_wandb(job)
    told = measured_and_simulated(job, stretches, starting, training, resumed)
    print(json.dumps(told, indent=1))
    assert told["effective_measured"] == pytest.approx(told["effective_simulated"], abs=0.03)


def check_wandb(job: Training) -> None:
    """All starts have written to one run."""
    stores = [path.name for path in job.run.glob("wandb/offline-run-*")]
    assert len(stores) == 1, stores


def measured_and_simulated(job, stretches, starting, training, resumed) -> dict[str, float]:
    """Effective training time from the first kill to the last, as it was and as simulated.

    The simulation gets the times between kills, and the means of a step, a start and a write. The
    first life, which was looked at only once it had a checkpoint, is left out.
    """
    seconds, steps = (sum(values) for values in zip(*training, strict=True))
    writes = [float(s) for s in re.findall(r"saved checkpoint=\S+ seconds=([\d.]+)", text(job.log))]
    course = Course(
        step=seconds / steps,
        blocked=0.0,
        write=statistics.mean(writes),
        restart=statistics.mean(starting[1:]),
    )
    elapsed, useful = sum(stretches[1:]), (resumed[-1] - resumed[0]) * course.step
    return {
        "kills": len(stretches),
        "effective_measured": useful / elapsed,
        "effective_simulated": simulate(course, SAVE_EVERY, stretches[1:]).effective,
        "seconds_between_kills": elapsed / len(stretches[1:]),
        **vars(course),
    }

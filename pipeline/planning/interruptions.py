"""Effective training time: what failures leave of a run's wall-clock time, and how often to save.

A run starts, trains and saves every so many steps, and a failure of any node ends it at any time:
the work since the last checkpoint that was whole is lost, and all start again. Effective training
time is, as in Llama 3 (arXiv 2407.21783, section 3.3.4), the time spent on useful training over the
elapsed time: here, seconds of steps that were not lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.planning.rates import NODE_MTBF, RESTART
from pipeline.planning.time import TimePlan
from pipeline.schema import Config

# Simulated failures: the standard error of the result is then below 0.1 points.
FAILURES = 20_000
# Nodes of 8 GPUs that are told beside the recipe's own; the last is Llama 3's cluster.
NODES = (8, 64, 512, 2048)


@dataclass(frozen=True)
class Course:
    """Seconds of what a run does over and over.

    step: one step. blocked: training stands still for a save. write: from then until the checkpoint
    is whole, beside training; the next save waits for it. restart: from a failure to the next step,
    with what it takes to see the failure, to get nodes and to load the checkpoint.
    """

    step: float
    blocked: float
    write: float
    restart: float


@dataclass(frozen=True)
class Outcome:
    """Shares of the elapsed time; together 1."""

    effective: float
    saving: float
    lost: float
    restarting: float


def simulate(course: Course, save_every: int, failures: Sequence[float]) -> Outcome:
    """What becomes of the time between failures.

    Args:
        save_every: steps from one checkpoint to the next.
        failures: seconds from the start, or a failure, to the next failure; each begins with a
            restart, and may end within it.
    """
    elapsed = np.asarray(failures, np.float64)
    restarting = np.minimum(elapsed, course.restart)
    working = elapsed - restarting
    train = save_every * course.step
    period = max(train, course.write) + course.blocked
    whole = np.floor(np.maximum(working - course.write, 0) / period)
    useful, saving = whole * train, whole * (period - train)
    total = elapsed.sum()
    lost = working - useful - saving
    shares = (part.sum() / total for part in (useful, saving, lost, restarting))
    return Outcome(*map(float, shares))


def random_failures(seconds: float, count: int = FAILURES, seed: int = 0) -> np.ndarray:
    """`count` times between failures that come at random, `seconds` apart on average."""
    return np.random.default_rng(seed).exponential(seconds, count)


def best_save_every(course: Course, failures: Sequence[float], most: int) -> int:
    """The steps between checkpoints, at most `most`, of the largest effective training time.

    Every candidate meets the same failures, so that their noise does not decide.
    """
    # Steps of an eighth: the maximum is flat.
    candidates = sorted({min(most, int(1.125**power)) for power in range(200)})
    return max(candidates, key=lambda steps: simulate(course, steps, failures).effective)


def course_of(config: Config, time: TimePlan) -> Course:
    """The seconds of a recipe as planned."""
    restart = config.plan.restart_seconds or RESTART.value
    return Course(
        step=time.step_seconds,
        blocked=time.blocked_seconds,
        write=time.checkpoint_seconds if config.train.save_background else 0.0,
        # Reading is taken to be as fast as writing.
        restart=restart + time.checkpoint_seconds,
    )


def mean_between_failures(config: Config, nodes: int) -> float:
    """Seconds from one failure of any of `nodes` nodes to the next."""
    hours = config.plan.node_mtbf_hours
    return (hours * 3600 if hours else NODE_MTBF.value) / nodes


def interruptions(config: Config, time: TimePlan) -> list[dict[str, Any]]:
    """For the recipe's nodes and for NODES: failures a day, the best interval, effective time.

    Step, save and restart take as long as the recipe's, on any number of nodes.
    """
    course, found = course_of(config, time), []
    for nodes in sorted({config.parallel.nodes, *NODES}):
        mean = mean_between_failures(config, nodes)
        failures = random_failures(mean)
        best = best_save_every(course, failures, config.train.steps)
        found.append(
            {
                "nodes": nodes,
                "failures_a_day": 86400 / mean,
                "save_every": best,
                "effective": simulate(course, best, failures).effective,
                "effective_as_configured": simulate(
                    course, config.train.save_every, failures
                ).effective,
            }
        )
    return found

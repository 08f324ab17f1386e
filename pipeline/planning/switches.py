"""Which switches would make a recipe fit: tried, all of them together and apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from model.config import ModelConfig
from pipeline.planning.memory import MemoryPlan, memory_plan
from pipeline.planning.time import time_plan
from pipeline.schema import RECOMPUTE, Config

# Tokens of the MLP's tile that are tried, and GPUs on one node at most.
MLP_TILE = 8192
NODE = 8
# How many ways are told.
TOLD = 5
Changes = frozenset[tuple[str, object]]


@dataclass(frozen=True)
class Way:
    """A recipe that fits (or lacks least): what it changes, its memory, seconds of a step."""

    changes: Changes
    memory: MemoryPlan
    step_seconds: float
    world: int

    def describe(self) -> str:
        """As overrides on the command line."""
        return " ".join(f"{key}={_told(value)}" for key, value in sorted(self.changes))


def _told(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _set(config: Config, key: str, value: object) -> Config:
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _more_gpus(config: Config, times: int) -> Changes:
    """Ulysses over so many times the GPUs: whole nodes beyond eight."""
    parallel = config.parallel
    here = parallel.gpus_per_node
    inside = min(times, max(1, NODE // here))
    changes = {("parallel.ulysses", parallel.ulysses * times)}
    if inside > 1:
        changes.add(("parallel.gpus_per_node", here * inside))
    if times > inside:
        changes.add(("parallel.nodes", parallel.nodes * times // inside))
    return frozenset(changes)


def _options(config: Config) -> list[list[Changes]]:
    """For each switch, the changes to choose among; the empty one leaves it."""
    train, parallel = config.train, config.parallel
    nothing: Changes = frozenset()

    def one(key: str, *values: object) -> list[Changes]:
        return [nothing, *(frozenset({(key, value)}) for value in values)]

    return [
        one("train.recompute", *RECOMPUTE[RECOMPUTE.index(train.recompute) + 1 :]),
        one("train.offload_activations", *([] if train.offload_activations else [True])),
        one("train.mlp_tile", *([MLP_TILE] if train.mlp_tile is None else [])),
        one("parallel.zero_stage", *range(parallel.zero_stage + 1, 4)),
        one("parallel.optimizer_offload", *([] if parallel.optimizer_offload else [True])),
        one("train.save_background", *([False] if train.save_background else [])),
        [nothing, *(_more_gpus(config, times) for times in (2, 4, 8))],
    ]


def _tried(config: Config, shape: ModelConfig) -> Iterator[Way]:
    """Changes from few to many, but none that only adds to what fits already."""
    # Here, since validation imports the names of GPUs.
    from pipeline.validation import CHECKS

    fitting: list[Changes] = []
    every = {frozenset().union(*chosen) for chosen in product(*_options(config))} - {frozenset()}
    for changes in sorted(every, key=lambda changes: (len(changes), sorted(map(str, changes)))):
        if any(other < changes for other in fitting):
            continue
        changed = config
        for key, value in changes:
            changed = _set(changed, key, value)
        try:
            for check in CHECKS:
                check(changed)
        except ValueError:
            # What would be refused is no way out.
            continue
        memory = memory_plan(changed, shape)
        parallel = changed.parallel
        world = parallel.nodes * parallel.gpus_per_node
        if memory.fits:
            fitting.append(changes)
        yield Way(changes, memory, 0.0, world)


def ways_to_fit(config: Config, shape: ModelConfig) -> tuple[list[Way], Way | None]:
    """(the simplest ways that fit, at most TOLD; where there is none, the one that lacks least).

    Simplest: fewest switches, then fewest GPUs, then the shortest step; none that only adds
    switches to another.
    """
    tried = list(_tried(config, shape))
    fitting = [way for way in tried if way.memory.fits]
    least = None
    if not fitting and tried:
        least = min(tried, key=lambda w: max(w.memory.over, 0) + max(w.memory.host_over, 0))

    def timed(way: Way) -> Way:
        changed = config
        for key, value in way.changes:
            changed = _set(changed, key, value)
        return replace(way, step_seconds=time_plan(changed, shape).step_seconds)

    found: list[Way] = []
    for way in sorted(map(timed, fitting), key=lambda w: (len(w.changes), w.world, w.step_seconds)):
        keys = {key for key, _ in way.changes}
        if not any(keys == {key for key, _ in other.changes} for other in found):
            found.append(way)
    return found[:TOLD], least and timed(least)

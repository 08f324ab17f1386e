"""Other ways to run a recipe: switches that would make it fit, and the fastest layouts that fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from model.config import ModelConfig
from pipeline.planning.memory import MemoryPlan, memory_plan
from pipeline.planning.time import TimePlan, time_plan
from pipeline.schema import RECOMPUTE, Config

# Tokens of the MLP's tile that are tried, and GPUs on one node at most.
MLP_TILE = 8192
NODE = 8
# How many ways to fit are shown, and how many of the fastest layouts.
WAYS, LAYOUTS = 5, 10
Changes = frozenset[tuple[str, object]]


@dataclass(frozen=True)
class Way:
    """A recipe with changes: what they are, its memory, and its steps."""

    changes: Changes
    config: Config
    memory: MemoryPlan
    time: TimePlan

    def describe(self) -> str:
        """As overrides on the command line."""
        return " ".join(f"{key}={_as_override(value)}" for key, value in sorted(self.changes))


def _as_override(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(config: Config, changes: Changes) -> Config:
    """The configuration with these keys, such as train.recompute, set."""
    for key, value in changes:
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _is_legal(config: Config) -> bool:
    # Here, since validation imports the names of GPUs.
    from pipeline.validation import CHECKS

    try:
        for check in CHECKS:
            check(config)
    except ValueError:
        return False
    return True


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


def _switches(config: Config) -> list[list[Changes]]:
    """For each switch that saves memory, the changes to choose among; the empty one leaves it."""
    train, parallel = config.train, config.parallel

    def one(key: str, *values: object) -> list[Changes]:
        return [frozenset(), *(frozenset({(key, value)}) for value in values)]

    return [
        one("train.recompute", *RECOMPUTE[RECOMPUTE.index(train.recompute) + 1 :]),
        one("train.offload_activations", *([] if train.offload_activations else [True])),
        one("train.mlp_tile", *([MLP_TILE] if train.mlp_tile is None else [])),
        one("parallel.zero_stage", *range(parallel.zero_stage + 1, 4)),
        one("parallel.optimizer_offload", *([] if parallel.optimizer_offload else [True])),
        one("train.save_background", *([False] if train.save_background else [])),
        [frozenset(), *(_more_gpus(config, times) for times in (2, 4, 8))],
    ]


def ways_to_fit(config: Config, shape: ModelConfig) -> tuple[list[Way], Way | None]:
    """(the simplest ways that fit, at most WAYS; where there is none, the one that lacks least).

    Simplest: fewest switches, then fewest GPUs, then the shortest step; none that only adds
    switches to another.
    """
    fitting: list[tuple[Changes, MemoryPlan]] = []
    least: tuple[Changes, MemoryPlan] | None = None
    every = {frozenset().union(*chosen) for chosen in product(*_switches(config))} - {frozenset()}
    for changes in sorted(every, key=lambda changes: (len(changes), sorted(map(str, changes)))):
        if any(other < changes for other, _ in fitting):
            continue
        other = changed(config, changes)
        if not _is_legal(other):
            continue
        memory = memory_plan(other, shape)
        if memory.fits:
            fitting.append((changes, memory))
        elif least is None or memory.lacks < least[1].lacks:
            least = changes, memory

    def way(changes: Changes, memory: MemoryPlan) -> Way:
        other = changed(config, changes)
        return Way(changes, other, memory, time_plan(other, shape))

    ways = [way(*found) for found in fitting]
    shown: list[Way] = []
    for one in sorted(ways, key=lambda w: (len(w.changes), w.time.world, w.time.step_seconds)):
        keys = {key for key, _ in one.changes}
        if not any(keys == {key for key, _ in other.changes} for other in shown):
            shown.append(one)
    return shown[:WAYS], None if fitting or least is None else way(*least)


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _layouts(config: Config) -> Iterator[Changes]:
    """Ways to divide the recipe's GPUs; tensor parallelism stays within a node."""
    parallel = config.parallel
    for tensor, ulysses, stage in product(
        _powers_of_two(parallel.gpus_per_node),
        _powers_of_two(parallel.nodes * parallel.gpus_per_node),
        (1, 2, 3),
    ):
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            yield frozenset(
                {
                    ("parallel.tensor", tensor),
                    ("parallel.ulysses", ulysses),
                    ("parallel.sequence_parallel", sequence_parallel),
                    ("parallel.zero_stage", stage),
                }
            )


def _combinations(choices: dict[str, Iterable[object]]) -> list[Changes]:
    return [frozenset(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _changes_from(config: Config, settings: Changes) -> Changes:
    """Those of the settings that the configuration does not have already."""
    return frozenset(
        (key, value)
        for key, value in settings
        if getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) != value
    )


def fastest_layouts(config: Config, shape: ModelConfig) -> list[Way]:
    """The fastest ways that fit the recipe's GPUs, fastest first, at most LAYOUTS.

    One for each layout: of its memory settings those with the shortest step and, of these, with
    fewest changes. The recipe's GPUs, rows and micro-batch stay.
    """
    found: list[Way] = []
    both = (False, True)
    # What costs time, and what a step takes as long with as without.
    paid = _combinations(
        {
            "train.recompute": RECOMPUTE,
            "train.offload_activations": both,
            "parallel.optimizer_offload": both,
        }
    )
    free = _combinations(
        {
            "train.mlp_tile": {config.train.mlp_tile, MLP_TILE},
            "train.save_background": {config.train.save_background, False},
        }
    )
    for layout in _layouts(config):
        if not _is_legal(changed(config, layout)):
            continue
        tried = []
        for setting in paid:
            time = time_plan(changed(config, layout | setting), shape)
            for more in free:
                changes = _changes_from(config, layout | setting | more)
                # Steps that differ in their fourth digit are as fast.
                tried.append((float(f"{time.step_seconds:.3g}"), len(changes), changes, time))
        for *_, changes, time in sorted(tried, key=lambda item: item[:2]):
            other = changed(config, changes)
            memory = memory_plan(other, shape)
            if memory.fits and _is_legal(other):
                found.append(Way(changes, other, memory, time))
                break
    return sorted(found, key=lambda way: way.time.step_seconds)[:LAYOUTS]

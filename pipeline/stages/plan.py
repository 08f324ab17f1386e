"""Stage plan: what a recipe would take on a named GPU. Starts nothing, and needs no GPU.

First whether it fits, hours and cost, beside the full control; where it does not fit, by how much,
and which switches would make it fit. With plan.search the fastest layouts of its GPUs. Then memory
of one GPU and one host by part, FLOPs and seconds of a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

from model.config import ModelConfig, describe_schedule
from pipeline.manifest import StageContext
from pipeline.planning.interruptions import interruptions
from pipeline.planning.memory import HEADROOM, MemoryPlan, memory_plan
from pipeline.planning.rates import rates_of
from pipeline.planning.search import Way, fastest_layouts, ways_to_fit
from pipeline.planning.time import TimePlan, row_documents, time_plan
from pipeline.schema import Config, section_shape
from pipeline.stages.finetune import hybrid_config

INPUTS = ()
ALWAYS = True
GB = 1e9


def depends_on(config: Config) -> dict[str, Any]:
    """All that the plan is made from."""
    sections = ("plan", "model", "pattern", "schedule", "rope", "parallel", "train")
    return {name: asdict(getattr(config, name)) for name in sections} | {
        "seq_length": config.data.seq_length
    }


def _gb(size: float) -> str:
    return f"{size / GB:8.1f}"


def _memory_lines(config: Config, memory: MemoryPlan) -> Iterator[str]:
    yield f"memory of one GPU in GB (it has {memory.gpu_bytes / GB:.1f}), at its largest:"
    for phase in memory.phases:
        peak = "  <- peak" if phase is memory.peak else ""
        yield f"{_gb(phase.total)}  {phase.name}{peak}"
    yield f"of the peak, {memory.peak.name}:"
    for part, size in memory.peak.parts.items():
        yield f"{_gb(size)}  {part}"
    yield (
        f"memory of one host in GB, of {config.parallel.gpus_per_node} ranks (it has "
        f"{memory.host_bytes / GB:.1f}):"
    )
    for part, size in memory.host.items():
        yield f"{_gb(size)}  {part}"
    yield f"{_gb(sum(memory.host.values()))}  together"


def _seconds(time: TimePlan) -> str:
    """Of a step; with its error bar where a rate was not measured on that GPU."""
    seconds, error = time.step_seconds, time.step_error
    if error < 0.005 * seconds:
        return f"{seconds:.1f} s"
    return f"{seconds:.1f} s ({seconds - error:.1f} to {seconds + error:.1f})"


def _time_lines(time: TimePlan) -> Iterator[str]:
    yield "seconds of one step:"
    for part, seconds in time.parts.items():
        yield f"{seconds:8.2f}  {part}"
    yield f"{time.step_seconds:8.2f}  together"
    yield (
        f"{time.tokens:,} tokens a step, model FLOPs {time.model_flops:.3e}, computed again "
        f"{time.recomputed_flops:.3e}, MFU {time.as_record()['mfu']:.1%}"
    )
    yield (
        f"a checkpoint: {time.checkpoint_bytes / GB:,.1f} GB, written in "
        f"{time.checkpoint_seconds:,.0f} s, for which training stands still "
        f"{time.blocked_seconds:.1f} s"
    )


def _interruption_lines(config: Config, cases: list[dict[str, Any]]) -> Iterator[str]:
    yield "effective training time with failures, in this recipe's steps, saves and restarts:"
    for case in cases:
        own = case["nodes"] == config.parallel.nodes
        yield (
            f"{case['nodes']:8d} nodes, {case['failures_a_day']:.2f} failures a day: "
            f"{case['effective']:.1%} with train.save_every={case['save_every']}, "
            f"{case['effective_as_configured']:.1%} with {config.train.save_every}"
            + ("  <- this recipe" if own else "")
        )


def _full_control(shape: ModelConfig) -> ModelConfig:
    return replace(shape, is_full=(True,) * shape.num_layers)


def _verdict_lines(config: Config, shape: ModelConfig, way: Way) -> Iterator[str]:
    memory, time = way.memory, way.time
    for what, over, has in (
        ("GPU", memory.over, memory.gpu_bytes),
        ("host", memory.host_over, memory.host_bytes),
    ):
        kept = f", {HEADROOM:.0%} of which it leaves free" if what == "GPU" else ""
        if over > 0:
            yield f"does not fit: the {what} lacks {over / GB:.1f} GB (it has {has / GB:.1f}{kept})"
        else:
            yield f"the {what} has room: {-over / GB:.1f} GB stay free (of {has / GB:.1f}{kept})"
    record = time.as_record()
    price = config.plan.gpu_hour_price
    cost = "" if price is None else f", cost {record['gpu_hours'] * price:,.0f}"
    yield (
        f"a step takes {_seconds(time)}, {time.steps} steps {time.hours:,.1f} hours, "
        f"{record['gpu_hours']:,.0f} GPU hours{cost}; "
        f"{record['tokens_per_second_a_gpu']:,.0f} tokens/s a GPU"
    )
    if not all(shape.is_full):
        control = time_plan(config, _full_control(shape)).step_seconds
        yield (
            f"with all layers full a step would take {control:.1f} s, "
            f"{control / time.step_seconds:.2f} times as long"
        )


def _ways_lines(ways: list[Way], least: Way | None) -> Iterator[str]:
    for index, way in enumerate(ways):
        yield f"{'would fit' if index == 0 else 'or'}: {_way(way)}"
    if least:
        yield f"none of the switches makes it fit; nearest: {_way(least)}"


def _way(way: Way) -> str:
    total, host = way.memory.peak.total, sum(way.memory.host.values())
    return (
        f"{way.describe()} (GPU {total / GB:.1f} GB, host {host / GB:.1f} GB, "
        f"{_seconds(way.time)} a step)"
    )


def _layout_lines(rows: list[dict[str, Any]], world: int) -> Iterator[str]:
    if not rows:
        yield f"no layout of these {world} GPUs fits"
        return
    yield f"the fastest layouts of these {world} GPUs that fit:"
    yield "  step s    full  times  GPU GB  host GB  what to set"
    for row in rows:
        full, times = row["full_step_seconds"], row["full_over_hybrid"]
        control = "       -      -" if full is None else f"{full:8.1f} {times:6.2f}"
        yield (
            f"{row['step_seconds']:8.1f}{control} {row['gpu_bytes'] / GB:7.1f} "
            f"{row['host_bytes'] / GB:8.0f}  {row['changes'] or '(as it is)'}"
        )


def _layout_row(way: Way, shape: ModelConfig) -> dict[str, Any]:
    """One of the fastest layouts, and the full control in it; None where that does not fit."""
    control, seconds = _full_control(shape), way.time.step_seconds
    fits = memory_plan(way.config, control).fits
    full = time_plan(way.config, control).step_seconds if fits else None
    return {
        "changes": way.describe(),
        "step_seconds": seconds,
        "step_error": way.time.step_error,
        "full_step_seconds": full,
        "full_over_hybrid": full and full / seconds,
        "gpu_bytes": way.memory.peak.total,
        "host_bytes": sum(way.memory.host.values()),
    }


def run(context: StageContext) -> dict[str, Any]:
    """Writes plan.json: memory, time, the ways to fit, and every rate with its source."""
    config, log = context.config, context.log
    shape = hybrid_config(section_shape(config.model), config)
    memory, time = memory_plan(config, shape), time_plan(config, shape)
    ways, least = ([], None) if memory.fits else ways_to_fit(config, shape)
    layouts = []
    if config.plan.search:
        layouts = [_layout_row(way, shape) for way in fastest_layouts(config, shape)]
    rates = rates_of(config.plan.gpu)
    documents, cases = row_documents(config), interruptions(config, time)
    log.info(
        "%d x %s, layers %s, rows of %d tokens in %d document%s",
        time.world,
        config.plan.gpu,
        describe_schedule(shape.is_full),
        config.data.seq_length,
        len(documents),
        "" if len(documents) == 1 else "s",
    )
    lines = (
        _verdict_lines(config, shape, Way(frozenset(), config, memory, time)),
        _ways_lines(ways, least),
        _layout_lines(layouts, time.world) if config.plan.search else (),
        _memory_lines(config, memory),
        _time_lines(time),
        _interruption_lines(config, cases),
    )
    for line in chain(*lines):
        log.info("%s", line)
    assumed = dict.fromkeys(n.split(",")[0] for n, rate in rates.items() if not rate.measured)
    log.info("assumed, not measured on a %s: %s", config.plan.gpu, ", ".join(assumed))
    record = {
        "gpu": config.plan.gpu,
        "world": time.world,
        "documents": documents,
        "memory": memory.as_record(),
        "time": time.as_record(),
        "interruptions": cases,
        "layouts": layouts,
        "ways_to_fit": [
            {
                "changes": way.describe(),
                "memory": way.memory.as_record(),
                "step_seconds": way.time.step_seconds,
            }
            for way in ways
        ],
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "config": depends_on(config),
    }
    (context.out / "plan.json").write_text(json.dumps(record, indent=2) + "\n")
    return {
        "gpu_peak_bytes": memory.peak.total,
        "host_bytes": sum(memory.host.values()),
        "fits": memory.fits,
        "step_seconds": round(time.step_seconds, 3),
        "hours": round(time.hours, 2),
    }

"""Bytes of weights, gradients and optimizer states of one rank, by part, as DeepSpeed keeps them.

Read off DeepSpeed 0.19.8 (runtime/bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py) under
the settings of pipeline/training/engine.py. Which buffers there are depends on ZeRO's stage, on the
dtype in which gradients accumulate and on where the optimizer lies. Letters: P parameters of a
tensor-parallel rank, D ranks that ZeRO divides among.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, prod
from types import SimpleNamespace

import torch

from model.config import ModelConfig
from model.mapping import EMBEDDING, OUTPUT, megatron_to_hf_names
from model.sharding import shard_shape
from pipeline.schema import Config
from pipeline.training.engine import (
    REDUCE_BUCKET,
    ZERO3_KEPT_WHOLE,
    accumulation_steps,
    parameter_groups,
)

# DeepSpeed's defaults, in elements: what ZeRO 3 keeps gathered and prefetches, what it updates at
# once, and what it takes a norm of at once.
ZERO3_GATHERED = 1_000_000_000 + 50_000_000
ZERO3_SUB_GROUP = 1_000_000_000
ZERO3_NORM_BUFFER = 250_000_000
FP32, FP64 = 4, 8
# Adam's two moments.
MOMENTS = 2 * FP32


@dataclass(frozen=True)
class States:
    """Bytes of one rank. On the GPU, unless the name says host.

    gradients: alive when `share` (0 to 1) of the layers' backwards have run. bucket: while any
    backward runs. reduce: beside all that, when the last gradients are reduced. step_gradients:
    alive when the step begins; step: what the step allocates beside them. host: by part.
    built: weights while the engine is built; ZeRO 3 divides a model that was whole, the others
    copy it into flat groups, one after another.
    """

    built: int
    weights: int
    embeddings: int
    gathered: int
    masters: int
    moments: int
    gradients: Callable[[float], int]
    accumulators: int
    bucket: int
    reduce: int
    step_gradients: int
    step: int
    checkpoint: int
    host: dict[str, int] = field(default_factory=dict)


@lru_cache(maxsize=16)
def rank_shapes(shape: ModelConfig, tensor: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter on one tensor-parallel rank, by Megatron's name, in its order."""
    # Layers are alike, and the shapes of many take long to look up.
    one = replace(shape, num_layers=1, is_full=(True,))
    sizes = {name: shard_shape(name, one, tensor) for name in megatron_to_hf_names(one)}
    before, layer, after = {}, {}, {}
    for name, size in sizes.items():
        found = layer if ".layers.0." in name else after if layer else before
        found[name] = size
    # Megatron's attention registers its output projection before QKV.
    names = list(layer)
    qkv = next(i for i, name in enumerate(names) if "linear_qkv" in name)
    names[qkv : qkv + 2] = reversed(names[qkv : qkv + 2])
    for index in range(shape.num_layers):
        before |= {name.replace(".0.", f".{index}."): layer[name] for name in names}
    return before | after


def zero_size(config: Config) -> int:
    """Ranks among which DeepSpeed divides: data-parallel times Ulysses."""
    return world_size(config) // config.parallel.tensor


def world_size(config: Config) -> int:
    """All GPUs."""
    return config.parallel.nodes * config.parallel.gpus_per_node


def accumulation(config: Config) -> int:
    """Micro-batches of a rank in one step."""
    parallel = config.parallel
    rows = world_size(config) // (parallel.tensor * parallel.ulysses)
    return accumulation_steps(config.train, rows)


def weight_bytes(config: Config) -> int:
    """Of one element of the weights that train."""
    return 2 if config.train.precision == "bf16" else FP32


def accumulation_bytes(config: Config) -> int:
    """Of one element of the gradients that accumulate: fp32 where more than one adds up."""
    return weight_bytes(config) if accumulation(config) == 1 else FP32


def optimizer_groups(shapes: dict[str, tuple[int, ...]]) -> list[list[int]]:
    """Elements of the parameters in each of AdamW's groups."""
    return _groups_of(tuple(shapes.values()))


@lru_cache(maxsize=16)
def _groups_of(shapes: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    parameters = [torch.empty(size, device="meta") for size in shapes]
    alike = SimpleNamespace(parameters=lambda: parameters)
    return [[p.numel() for p in group["params"]] for group in parameter_groups(alike, 0.0)]


def partitions(config: Config, groups: list[list[int]]) -> list[int]:
    """Elements of each flat tensor of masters that a rank's optimizer updates, with padding."""
    size = zero_size(config)
    if config.parallel.zero_stage < 3:
        # Flat groups are padded to two elements for each rank.
        return [ceil(sum(group) / (2 * size)) * 2 for group in groups]
    found = []
    for group in groups:
        found.append(0)
        for elements in group:
            if found[-1] >= ZERO3_SUB_GROUP:
                found.append(0)
            found[-1] += ceil(elements / size)
    return found


def updated_elements(config: Config, shape: ModelConfig) -> int:
    """Elements that a rank's optimizer updates, with padding."""
    groups = optimizer_groups(rank_shapes(shape, config.parallel.tensor))
    return sum(partitions(config, groups))


def shared_elements(config: Config, groups: list[list[int]]) -> int:
    """Elements of the parameters of which a rank updates a part, each counted whole; of the rank
    that has most.

    ZeRO 1 and 2 copy such gradients as wholes where they do not accumulate in fp32.
    """
    size = zero_size(config)
    found = [0] * size
    for part, group in zip(partitions(config, groups), groups, strict=True):
        start = 0
        for elements in group:
            for rank in range(start // part, (start + elements - 1) // part + 1):
                found[rank] += elements
            start += elements
    return max(found)


def rounded_pinned(size: int) -> int:
    """Bytes that torch's allocator of pinned memory takes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _is_bf16_optimizer(config: Config) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer for stage 1: bf16 weights, fp32 accumulation."""
    parallel = config.parallel
    separate = weight_bytes(config) != accumulation_bytes(config)
    return parallel.zero_stage == 1 and separate and not parallel.optimizer_offload


def states(config: Config, shape: ModelConfig) -> States:
    """Bytes of one rank's weights, gradients and optimizer states."""
    parallel = config.parallel
    stage, offload, size = parallel.zero_stage, parallel.optimizer_offload, zero_size(config)
    shapes = rank_shapes(shape, parallel.tensor)
    elements = {name: prod(s) for name, s in shapes.items()}
    whole, largest = sum(elements.values()), max(elements.values())
    groups = optimizer_groups(shapes)
    parts = partitions(config, groups)
    mine, most = sum(parts), max(parts)
    width, wide = weight_bytes(config), accumulation_bytes(config)
    bucket = min(REDUCE_BUCKET, whole)
    steps, separate = accumulation(config), width != wide
    ends = sum(count for name, count in elements.items() if name in (EMBEDDING, OUTPUT))
    ends_share = ends / whole
    # Of ZeRO 1 and 2: the flat bf16 groups are whole, with their padding.
    held = mine * size
    gathered = accumulators = reduce = step = 0
    step_gradients = 0

    # What accumulates is there from the first micro-batch on; what does not grows layer by layer.
    def growing(count: int) -> Callable[[float], int]:
        first = 0 if steps == 1 else 1
        return lambda share: int(count * max(share, first))

    def constant(count: int) -> Callable[[float], int]:
        return lambda share: count

    if stage == 3:
        # Small parameters stay whole beside their part.
        held = mine + sum(n for n in elements.values() if n <= ZERO3_KEPT_WHOLE)
        gathered = width * min(whole, ZERO3_GATHERED)
        accumulators = 0 if offload else wide * mine
        gradients = constant(0)
        # The bucket, its copy in the order of the ranks, and the reduced part in `wide`.
        buckets = 2 * width * bucket + (wide * ceil(bucket / size) if separate else 0)
        step_gradients = accumulators
        norm = FP64 * min(ceil(largest / size), ZERO3_NORM_BUFFER)
        step = 0 if offload else max(norm, wide * most + (0 if wide == FP32 else FP32 * most))
    elif _is_bf16_optimizer(config):
        gradients = growing(width * whole)
        # fp32 gradients of all parameters, not of a part; reduced in bf16, a group at a time.
        accumulators = FP32 * held
        buckets, reduce = 0, width * most * size
        step_gradients = width * whole + accumulators
    else:
        attribute = stage == 1 and separate
        copies = 2 if size > 1 or separate else 1
        buckets = (wide if attribute else width) * bucket * (copies if stage == 2 else 1)
        reduce = 0 if stage == 2 else (wide if attribute else width) * bucket * (copies - 1)
        grown = (wide if attribute else width) * whole
        gradients = growing(grown) if stage == 1 else constant(0)
        if separate:
            # The reduced part, in fp32; the step takes it without a copy.
            accumulators = FP32 * mine if stage == 2 else 0
            reduce += FP32 * mine if stage == 1 else 0
            step_gradients, step = FP32 * mine, FP64 * largest
        elif not offload:
            # The reduced part in the weights' dtype; the step flattens it, then casts it.
            copy = width * shared_elements(config, groups) * (2 if stage == 2 and steps > 1 else 1)
            accumulators = copy if stage == 2 else 0
            reduce += copy if stage == 1 else 0
            step_gradients = copy
            step = max(FP64 * largest, width * most + (FP32 * most if width < FP32 else 0))
        if offload:
            buckets += width * largest
            step = 0
    host = {}
    if offload:
        host["masters"], host["moments"] = FP32 * mine, MOMENTS * mine
        host["fp32 gradients"] = FP32 * mine
        if stage == 3:
            host["reduced gradients"] = wide * mine
        else:
            host["weights to copy back"] = width * most
            if steps > 1 and not separate:
                host["accumulated gradients"] = width * mine
    checkpoint = sum(3 * rounded_pinned(FP32 * part) for part in parts)
    return States(
        built=width * (whole if stage == 3 else held + most * size),
        weights=int(width * held * (1 - ends_share)),
        embeddings=width * held - int(width * held * (1 - ends_share)),
        gathered=gathered,
        masters=0 if offload else FP32 * mine,
        moments=0 if offload else MOMENTS * mine,
        gradients=gradients,
        accumulators=accumulators,
        bucket=buckets,
        reduce=reduce,
        step_gradients=step_gradients,
        step=step,
        checkpoint=checkpoint,
        host=host,
    )

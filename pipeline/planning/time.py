"""Seconds of a step, part by part, from FLOPs and bytes at the rates of rates.py.

Compute and pointwise work of one rank follow one another; communication does not overlap with them
(engine.py sets overlap_comm=false, and Ulysses and tensor parallelism wait); copies of what is kept
to the host and back do, so that only what exceeds compute is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.cost import attention_flops, matrix_parameters, parameters, training_flops
from model.sharding import padded_vocab
from pipeline.planning.memory import kept_tensors, layer_tensors
from pipeline.planning.rates import DISK, GPUS, HOST_MEMORY, PAGEABLE, PCIE, Rate
from pipeline.planning.states import (
    FP32,
    MOMENTS,
    accumulation,
    rank_shapes,
    updated_elements,
    weight_bytes,
    world_size,
    zero_size,
)
from pipeline.schema import Config

# Of attention's backward, in forwards: five products instead of two.
BACKWARD = 2.5
# Of a weight's three products (forward, two in backward), in FLOPs per weight and token.
FORWARD_FLOPS, ALL_FLOPS = 2.0, 6.0
# Bytes that AdamW on a GPU reads and writes per element of its part: norm (read, fp64 written and
# read), flatten and cast, clip, fused AdamW (7 fp32), weights.
OPTIMIZER_BYTES = 18 + 10 + 8 + 28 + 6
# Bytes of host memory that it moves per element there: clip, fused AdamW, weights.
HOST_ADAM_BYTES = 8 + 28 + 6


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one step by part, FLOPs of one step of all GPUs, and what a run takes.

    within: by part, the error bar of its rate as a share of its seconds.
    """

    parts: dict[str, float]
    within: dict[str, float]
    model_flops: float
    recomputed_flops: float
    tokens: int
    world: int
    peak_flops: float
    checkpoint_bytes: int
    checkpoint_seconds: float
    blocked_seconds: float
    saves: int
    validation_seconds: float
    validations: int
    steps: int

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return sum(self.parts.values())

    @property
    def step_error(self) -> float:
        """Seconds that a step may take more or less, if every rate errs by all of its bar."""
        return sum(seconds * self.within[part] for part, seconds in self.parts.items())

    @property
    def hours(self) -> float:
        """Hours of the whole run, with its saves and validations."""
        seconds = self.steps * self.step_seconds + self.saves * self.blocked_seconds
        return (seconds + self.validations * self.validation_seconds) / 3600

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        seconds = self.step_seconds
        return {
            "step_seconds": seconds,
            "step_error": self.step_error,
            "step_parts": self.parts,
            "model_flops": self.model_flops,
            "recomputed_flops": self.recomputed_flops,
            "tokens_a_step": self.tokens,
            "tokens_per_second_a_gpu": self.tokens / seconds / self.world,
            "mfu": self.model_flops / seconds / self.world / self.peak_flops,
            "hours": self.hours,
            "gpu_hours": self.hours * self.world,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_seconds": self.checkpoint_seconds,
            "checkpoint_blocks_seconds": self.blocked_seconds,
            "validation_seconds": self.validation_seconds,
        }


def row_documents(config: Config) -> list[int]:
    """Lengths of the documents of one row; the last one is cut where the row ends.

    Without document masks a row is one document.
    """
    left, lengths = config.data.seq_length, config.plan.document_lengths
    if not lengths or not config.train.document_mask:
        return [left]
    found: list[int] = []
    while left > 0:
        found.append(min(lengths[len(found) % len(lengths)], left))
        left -= found[-1]
    return found


def _layer_matrices(shape: ModelConfig) -> int:
    return matrix_parameters(shape) - shape.hidden_size * shape.vocab_size


def attention_by_kind(shape: ModelConfig, documents: list[int]) -> dict[bool, float]:
    """Forward FLOPs of one row's attention in all layers of each kind, full (True) and sparse."""
    return {
        full: shape.is_full.count(full)
        * attention_flops(shape, shape.is_full.index(full), documents)
        for full in set(shape.is_full)
    }


def recomputed_flops(config: Config, shape: ModelConfig, documents: list[int]) -> float:
    """FLOPs beside the model's: layers computed again, and the loss's logits."""
    tokens = sum(documents)
    flops = FORWARD_FLOPS * shape.hidden_size * shape.vocab_size * tokens
    if config.train.recompute != "none":
        flops += FORWARD_FLOPS * _layer_matrices(shape) * tokens
    if config.train.recompute == "full":
        flops += sum(attention_by_kind(shape, documents).values())
    return flops


def _attention_seconds(
    config: Config, shape: ModelConfig, documents: list[int]
) -> dict[str, float]:
    """Seconds of one row's attention on one GPU by pass, all layers and heads."""
    gpu, seconds = GPUS[config.plan.gpu], {"forward": 0.0, "backward": 0.0}
    strided = "sparse" if shape.pattern.stride is None else "strided"
    for full, flops in attention_by_kind(shape, documents).items():
        kind = "full" if full else strided
        for way, times in (("forward", 1.0), ("backward", BACKWARD)):
            rate = gpu.attention[kind, way].value
            if config.train.precision == "fp32":
                rate = gpu.gemm_fp32.value
            seconds[way] += times * flops / rate
    return seconds


def pointwise_bytes(config: Config, shape: ModelConfig) -> dict[str, float]:
    """Bytes that norms, RoPE, SwiGLU, residuals and the loss read and write in one rank's
    micro-batch, by pass, of all layers.

    In elements per position. Forward: two norms 2 * 2D; two residual additions 2 * 3D; RoPE and
    split, read and write QKV; SwiGLU 3F. Backward: two norms 2 * 5D (input and gradient twice, for
    the input's gradient and for the weight's); additions of residual gradients 2 * 3D; gradients
    put into place tile by tile 2D; RoPE as forward; SwiGLU 5F. Of the fp32 logits, forward:
    maximum, difference, exponential, sum; backward: exponential, product, cast.
    """
    train, parallel = config.train, config.parallel
    width = weight_bytes(config)
    tokens = config.data.seq_length * train.micro_batch_rows // parallel.ulysses
    own = tokens // (parallel.tensor if parallel.sequence_parallel else 1)
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) // parallel.tensor * shape.head_dim
    ffn, hidden = shape.ffn_hidden_size // parallel.tensor, shape.hidden_size
    vocab = padded_vocab(shape.vocab_size, parallel.tensor) // parallel.tensor
    forward = width * (10 * hidden * own + (2 * qkv + 3 * ffn) * tokens) * shape.num_layers
    backward = width * (18 * hidden * own + (2 * qkv + 5 * ffn) * tokens) * shape.num_layers
    again = forward if train.recompute != "none" else 0
    logits = vocab * tokens * FP32
    return {
        "forward": forward + 6 * logits,
        "backward": backward + again + 5.5 * logits,
    }


def _link(config: Config, extent: int) -> Rate:
    """Bytes/s of a group of ranks that lie within `extent` neighbouring ones."""
    gpu = GPUS[config.plan.gpu]
    return gpu.nvlink if extent <= config.parallel.gpus_per_node else gpu.network


def communication(config: Config, shape: ModelConfig) -> dict[str, tuple[float, Rate]]:
    """Bytes of one step's communication of one rank and the link, by group. Ranks of a tensor-
    parallel group are neighbours, then those of a Ulysses group, then data-parallel ones
    (Megatron's order)."""
    parallel, train, tensors = config.parallel, config.train, layer_tensors(config, shape)
    steps, size, ulysses = accumulation(config), zero_size(config), parallel.ulysses
    width, tensor = weight_bytes(config), parallel.tensor
    again = {"none": 0, "attention": 1, "full": 1}[train.recompute]
    found = {}
    if tensor > 1:
        stream = layer_tensors(config, shape)["h"]
        stream *= tensor if parallel.sequence_parallel else 1
        # Per layer an all-reduce behind attention and one behind the MLP, forward and backward
        # alike; under sequence parallelism a reduce-scatter and an all-gather, and one more
        # all-gather for each weight gradient. Each ring moves the tensor once.
        rings = (4 + 4 + 4 * again + (2 if parallel.sequence_parallel else 0)) * shape.num_layers
        share = (tensor - 1) / tensor
        moved = rings * share * stream * steps
        found["tensor parallel"] = moved, _link(config, tensor)
    if ulysses > 1:
        # q, k, v there and the output back; their gradients the other way; and q, k, v again.
        forth, back = tensors["whole qkv"], tensors["out"]
        times = 2 * (forth + back) + again * forth + (back if again else 0)
        moved = times * (ulysses - 1) / ulysses * shape.num_layers * steps
        found["Ulysses"] = moved, _link(config, tensor * ulysses)
    if size > 1:
        whole = width * sum(
            rows * (rest[0] if rest else 1) for rows, *rest in rank_shapes(shape, tensor).values()
        )
        # Stage 1 sums gradients once a step, stage 2 with every micro-batch, both by all-reduce
        # (DeepSpeed's use_multi_rank_bucket_allreduce), and gathers weights; stage 3 gathers
        # weights for forward and for backward, and scatters gradients, in every micro-batch.
        rings = {1: 2 + 1, 2: 2 * steps + 1, 3: 3 * steps}[parallel.zero_stage]
        moved = rings * (size - 1) / size * whole
        found["ZeRO"] = moved, _link(config, world_size(config))
    return found


def _kept_bytes(config: Config, shape: ModelConfig) -> int:
    """What one micro-batch sends to the host, and gets back."""
    if not config.train.offload_activations:
        return 0
    kept = kept_tensors(config, layer_tensors(config, shape))
    return shape.num_layers * sum(size for part, size in kept.items() if part != "kept LSE")


def _optimizer_seconds(config: Config, shape: ModelConfig) -> dict[str, float]:
    mine = updated_elements(config, shape)
    if not config.parallel.optimizer_offload:
        return {"optimizer": OPTIMIZER_BYTES * mine / GPUS[config.plan.gpu].hbm.value}
    ranks = config.parallel.gpus_per_node
    copied = (FP32 + weight_bytes(config)) * mine / PAGEABLE.value
    return {
        "optimizer on the host": HOST_ADAM_BYTES * mine * ranks / HOST_MEMORY.value,
        "gradients to the host, weights back": copied,
    }


def time_plan(config: Config, shape: ModelConfig) -> TimePlan:
    """Seconds of a step and hours of the run of this recipe on its GPUs."""
    train, parallel, gpu = config.train, config.parallel, GPUS[config.plan.gpu]
    documents, steps = row_documents(config), accumulation(config)
    world, rows = world_size(config), train.rows_per_step
    products = gpu.gemm if train.precision == "bf16" else gpu.gemm_fp32
    gemm, links = products.value, communication(config, shape)
    attends = max(rate.within for rate in gpu.attention.values())
    length = config.data.seq_length
    # Of all GPUs together: each row's work is shared evenly by those that hold it.
    matrices, logits = _layer_matrices(shape), shape.hidden_size * shape.vocab_size
    row_gpus = world / rows
    attention = _attention_seconds(config, shape, documents)
    pointwise = {k: v / gpu.hbm.value for k, v in pointwise_bytes(config, shape).items()}
    forward_gemm = FORWARD_FLOPS * (matrices + logits) * length / gemm / row_gpus
    backward_gemm = (ALL_FLOPS - FORWARD_FLOPS) * (matrices + logits) * length / gemm / row_gpus
    again_gemm = FORWARD_FLOPS * logits * length / gemm / row_gpus
    if train.recompute != "none":
        again_gemm += FORWARD_FLOPS * matrices * length / gemm / row_gpus
    again_attention = attention["forward"] / row_gpus if train.recompute == "full" else 0.0
    forward_attention = attention["forward"] / row_gpus
    backward_attention = attention["backward"] / row_gpus
    forward = forward_gemm + forward_attention + steps * pointwise["forward"]
    backward = backward_gemm + again_gemm + backward_attention + again_attention
    backward += steps * pointwise["backward"]
    # The ranks of a host share its memory.
    to_host = min(
        PCIE,
        Rate(HOST_MEMORY.value / parallel.gpus_per_node, "", within=HOST_MEMORY.within),
        key=lambda rate: rate.value,
    )
    copy = steps * _kept_bytes(config, shape) / to_host.value
    parts = {
        "matrix products": forward_gemm + backward_gemm,
        "matrix products again": again_gemm,
        "attention, forward": forward_attention,
        "attention, backward": backward_attention,
        "attention again": again_attention,
        "pointwise": steps * sum(pointwise.values()),
        **{group: moved / link.value for group, (moved, link) in links.items()},
        "copies to the host, exposed": max(0.0, copy - forward),
        "copies from the host, exposed": max(0.0, copy - backward),
        **_optimizer_seconds(config, shape),
    }
    within = {
        **dict.fromkeys(("matrix products", "matrix products again"), products.within),
        **dict.fromkeys(
            ("attention, forward", "attention, backward", "attention again"),
            attends if train.precision == "bf16" else products.within,
        ),
        **dict.fromkeys(("pointwise", "optimizer"), gpu.hbm.within),
        **{group: link.within for group, (_, link) in links.items()},
        "copies to the host, exposed": to_host.within,
        "copies from the host, exposed": to_host.within,
        "optimizer on the host": HOST_MEMORY.within,
        "gradients to the host, weights back": PAGEABLE.within,
    }
    mine, ranks = updated_elements(config, shape), parallel.gpus_per_node
    write = (FP32 + MOMENTS) * mine * ranks / DISK.value
    validation_rows = -(-train.validation_rows // (world // (parallel.tensor * parallel.ulysses)))
    return TimePlan(
        parts={part: seconds for part, seconds in parts.items() if seconds},
        within=within,
        model_flops=training_flops(shape, documents) * rows,
        recomputed_flops=recomputed_flops(config, shape, documents) * rows,
        tokens=rows * length,
        world=world,
        peak_flops=gpu.peak_flops,
        checkpoint_bytes=(FP32 + MOMENTS) * parameters(shape),
        checkpoint_seconds=write,
        blocked_seconds=(FP32 + MOMENTS) * mine / PCIE.value if train.save_background else write,
        saves=-(-train.steps // train.save_every),
        validation_seconds=validation_rows * forward / steps / train.micro_batch_rows,
        validations=1 + -(-train.steps // train.validate_every),
        steps=train.steps,
    )

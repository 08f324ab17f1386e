"""Bytes of one GPU and of one host, part by part, in every phase of a step.

The parts that are alive in each phase of a layer are read off model/hybrid_layer.py, and stand in
one table below; those of the loss off deepspeed/sequence/linear_cross_entropy.py; gradients and
optimizer states are in states.py.

Letters: T tokens of this rank between attentions (S * B / ulysses), N query heads, G KV heads of
this tensor-parallel rank, H head dim.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from model.config import ModelConfig
from model.sharding import padded_vocab
from pipeline.planning.rates import CUDA_CONTEXT, GPUS, HOST_BYTES_A_GPU, HOST_PROCESS, NCCL_BUFFERS
from pipeline.planning.states import (
    FP32,
    States,
    rank_shapes,
    rounded_pinned,
    states,
    weight_bytes,
    world_size,
)
from pipeline.schema import Config

# Of a GPU's memory, left free: for what the allocator cannot use, and the plan's own error.
HEADROOM = 0.03
# What KeptTensors holds on the GPU beside the layer at work (model/kept.py).
NEAR = 2


@dataclass(frozen=True)
class Phase:
    """Bytes by part that one GPU holds at once."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The largest phase of each kind, what the GPU and its host have, and the host's parts."""

    phases: list[Phase]
    gpu_bytes: int
    host: dict[str, int]
    host_bytes: int

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def over(self) -> int:
        """Bytes that the GPU lacks below its headroom; negative: left."""
        return self.peak.total - int(self.gpu_bytes * (1 - HEADROOM))

    @property
    def host_over(self) -> int:
        """Bytes that the host lacks; negative: left."""
        return sum(self.host.values()) - self.host_bytes

    @property
    def lacks(self) -> int:
        """Bytes that GPU and host lack together."""
        return max(self.over, 0) + max(self.host_over, 0)

    @property
    def fits(self) -> bool:
        """Whether GPU and host hold all."""
        return self.lacks == 0

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "phases": [{**asdict(phase), "total": phase.total} for phase in self.phases],
            "peak": self.peak.name,
            "gpu_bytes": self.gpu_bytes,
            "over": self.over,
            "host": self.host,
            "host_total": sum(self.host.values()),
            "host_bytes": self.host_bytes,
            "host_over": self.host_over,
            "fits": self.fits,
        }


# What is alive at once, by name, while a layer runs that computes again what it does not keep. Its
# input and, under recompute=attention, its attention's output are counted with what is kept.
FORWARD = {
    "QKV": ("normed", "gathered", "mixed", "qkv"),
    "all-to-all": ("qkv", "whole qkv", "send"),
    "attention": ("whole qkv or qkv", "out", "lse"),
    "projection": ("out", "own out", "projected", "h1", "normed"),
    "MLP": ("out", "h1", "normed", "tile fc1", "tile act", "tile out", "tile gathered"),
}
# d_h is the gradient of the layer's output; d_h1 that of the residual between attention and MLP.
# "again": what is only there where attention's forward runs again.
BACKWARD = {
    "attention again": ("d_h", "whole qkv or qkv", "again"),
    "MLP": (
        *("d_h", "again", "own out", "h1", "normed", "d_normed"),
        *("tile fc1", "tile act", "tile out", "tile d_act", "tile d_fc1", "tile out"),
        *("tile gathered", "weight gradient"),
    ),
    "projection": (
        *("d_h", "again", "own out", "h1", "normed", "d_normed", "d_h1", "d_h1"),
        *("out", "own out", "weight gradient"),
    ),
    "attention": (
        *("d_h", "d_h1", "again", "out", "normed", "whole qkv or qkv", "whole qkv or qkv"),
        "workspace",
    ),
    "RoPE": (
        *("d_h", "d_h1", "normed", "whole qkv or qkv", "whole qkv or qkv", "own qkv", "mixed"),
    ),
    "QKV": (
        *("d_h", "d_h1", "normed", "gathered", "whole qkv or qkv", "whole qkv or qkv"),
        *("mixed", "d_normed", "weight gradient"),
    ),
}
# The same where autograd has saved what it needs, which is counted by itself.
SAVED = (
    *("h", "normed", "whole qkv or qkv", "out", "own out", "lse", "h1", "normed"),
    *("fc1", "act"),
)
SAVED_FORWARD = {
    "QKV": ("mixed", "gathered"),
    "all-to-all": ("qkv", "send"),
    "MLP": ("projected", "gathered"),
}
SAVED_BACKWARD = {
    "MLP": ("d_h", "act", "fc1", "d_normed", "gathered", "weight gradient"),
    "attention": ("d_h1", "out", "own out", "whole qkv or qkv", "workspace"),
    "QKV": ("d_h1", "whole qkv or qkv", "qkv", "mixed", "gathered", "d_normed", "weight gradient"),
}


def layer_tensors(config: Config, shape: ModelConfig) -> dict[str, int]:
    """Bytes of each tensor of a layer on one rank, by its name in the tables above."""
    parallel, train = config.parallel, config.train
    width, tensor, ulysses = weight_bytes(config), parallel.tensor, parallel.ulysses
    tokens = config.data.seq_length * train.micro_batch_rows // ulysses
    heads, kv_heads = shape.num_heads // tensor, shape.num_kv_heads // tensor
    # Positions whose residual stream this rank holds.
    shards = tensor if parallel.sequence_parallel else 1
    own = tokens // shards
    tile = min(train.mlp_tile or own, own) if train.recompute != "none" else own
    stream = own * shape.hidden_size * width
    ffn = shape.ffn_hidden_size // tensor * width
    per_head = tokens * shape.head_dim * width
    out = per_head * heads
    qkv = per_head * (heads + 2 * kv_heads)
    # KV heads fewer than Ulysses ranks are replicated.
    whole = per_head * (heads + 2 * max(kv_heads, ulysses)) if ulysses > 1 else 0
    lse = FP32 * tokens * heads
    # The weight whose gradient is on its way into its buffer.
    largest = max(
        rows * columns
        for name, (rows, *rest) in rank_shapes(shape, tensor).items()
        for columns in rest
        if "layers.0." in name
    )
    return {
        "h": stream,
        "normed": stream,
        "gathered": tokens * shape.hidden_size * width if shards > 1 else 0,
        "mixed": qkv,
        "qkv": qkv,
        "own qkv": qkv if ulysses > 1 else 0,
        "whole qkv": whole,
        "whole qkv or qkv": whole or qkv,
        "send": out if ulysses > 1 else 0,
        "out": out,
        "own out": out if ulysses > 1 else 0,
        "lse": lse,
        "again": out + lse if train.recompute == "full" else 0,
        "projected": stream,
        "h1": stream,
        "fc1": 2 * ffn * tokens,
        "act": ffn * tokens,
        "tile fc1": 2 * ffn * tile * shards,
        "tile act": ffn * tile * shards,
        "tile out": tile * shape.hidden_size * width,
        "tile gathered": tile * shards * shape.hidden_size * width if shards > 1 else 0,
        "tile d_act": ffn * tile * shards,
        "tile d_fc1": 2 * ffn * tile * shards,
        "d_h": stream,
        "d_h1": stream,
        "d_normed": stream,
        "weight gradient": largest * width,
    }


def _largest(sets: dict[str, tuple[str, ...]], tensors: dict[str, int]) -> tuple[str, int]:
    """(name, bytes) of the set that takes most."""
    sizes = {name: sum(tensors[key] for key in keys) for name, keys in sets.items()}
    name = max(sizes, key=sizes.get)
    return name, sizes[name]


def kept_tensors(config: Config, tensors: dict[str, int]) -> dict[str, int]:
    """Bytes of what one layer keeps from forward to backward, by part."""
    if config.train.recompute == "none":
        return {"saved by autograd": sum(tensors[key] for key in SAVED)}
    kept = {"kept layer inputs": tensors["h"]}
    if config.train.recompute == "attention":
        kept |= {"kept attention outputs": tensors["out"], "kept LSE": tensors["lse"]}
    return kept


def _kept_on_gpu(config: Config, kept: dict[str, int], layers: int, near: int) -> dict[str, int]:
    """Bytes that `layers` layers keep on the GPU: all, or the LSE and the tensors of `near`."""
    offload = config.train.offload_activations
    return {
        part: size * (min(layers, near) if offload and part != "kept LSE" else layers)
        for part, size in kept.items()
    }


def loss_bytes(config: Config, shape: ModelConfig) -> dict[str, int]:
    """Bytes beside the last hidden state: {"forward": ..., "backward": ...}.

    Tokens in chunks such that a chunk's fp32 logits are about as large as the hidden state; in
    backward, blocks of the vocabulary of that size, with the hidden state's gradient in fp32.
    """
    parallel, width = config.parallel, weight_bytes(config)
    tokens = config.data.seq_length * config.train.micro_batch_rows // parallel.ulysses
    vocab = padded_vocab(shape.vocab_size, parallel.tensor) // parallel.tensor
    chunks = max(1, ceil(vocab / shape.hidden_size))
    rows, columns = ceil(tokens / chunks), ceil(vocab / chunks)
    hidden = tokens * shape.hidden_size
    # Per token: two masks, the label as int64, loss, maximum, sum.
    saved = tokens * (2 + 8 + 3 * FP32)
    stream = hidden * width
    normed = stream // (parallel.tensor if parallel.sequence_parallel else 1)
    gathered = stream if parallel.sequence_parallel else 0
    held = 2 * normed + gathered + saved
    weight_gradient = vocab * shape.hidden_size * width
    block = tokens * columns * (FP32 + (width if width < FP32 else 0))
    backward = held + FP32 * hidden + max(block, stream) + weight_gradient
    return {"forward": held + FP32 * rows * vocab, "backward": backward}


def _always(config: Config, shape: ModelConfig, held: States) -> dict[str, int]:
    tokens = config.data.seq_length * config.train.micro_batch_rows // config.parallel.ulysses
    return {
        "weights, layers": held.weights,
        "weights, embedding and output": held.embeddings,
        "masters (fp32)": held.masters,
        "Adam's moments (fp32)": held.moments,
        # cos and sin in fp32, of full and of sparse layers.
        "RoPE tables": 4 * FP32 * tokens * shape.head_dim,
        "CUDA context": int(CUDA_CONTEXT.value),
        "NCCL": int(NCCL_BUFFERS.value) if world_size(config) > 1 else 0,
    }


def _workspace(config: Config, full: bool, tensors: dict[str, int]) -> int:
    found = GPUS[config.plan.gpu].attention_workspace["full" if full else "sparse"]
    return int(found.value * tensors["out"])


def gpu_phases(config: Config, shape: ModelConfig, held: States) -> list[Phase]:
    """The largest phase of each kind on one GPU, in the order of a step."""
    tensors, none = layer_tensors(config, shape), config.train.recompute == "none"
    kept, layers = kept_tensors(config, tensors), shape.num_layers
    gathered = {"gathered weights (ZeRO 3)": held.gathered}
    always = _always(config, shape, held)
    loss = loss_bytes(config, shape)
    # What is there before a micro-batch's backward: of those before it, if any.
    before = {"gradients": held.gradients(0), "fp32 gradients": held.accumulators}
    name, working = _largest(SAVED_FORWARD if none else FORWARD, tensors)
    if not none:
        # The layer's own input; its output is among the working set.
        working += tensors["h"]
    at_end = _kept_on_gpu(config, kept, layers, 1)
    running = {part: always[part] for part in ("CUDA context", "NCCL")}
    phases = [
        Phase("the model is built", running | {"weights, while they are divided": held.built}),
        Phase(
            f"forward, {name} of the last layer",
            always | gathered | before | at_end | {"working set": working},
        ),
        Phase("loss, forward", always | gathered | before | at_end | {"loss": loss["forward"]}),
        Phase(
            "loss, backward",
            always
            | gathered
            | before
            | at_end
            | {"loss": loss["backward"], "reduce bucket": held.bucket},
        ),
    ]
    backwards, near = [], 1 + NEAR // max(1, len(kept) - 1)
    # From layer to layer of a kind all parts change evenly: the largest is at an end, also of the
    # layers whose kept tensors are near.
    ends = {
        end
        for kind in set(shape.is_full)
        for of_kind in [[i for i, full in enumerate(shape.is_full) if full is kind]]
        for end in (of_kind[0], of_kind[-1], *(i for i in of_kind if i <= near))
    }
    for layer in sorted(ends, reverse=True):
        workspace = {"workspace": _workspace(config, shape.is_full[layer], tensors)}
        name, working = _largest(SAVED_BACKWARD if none else BACKWARD, tensors | workspace)
        here = _kept_on_gpu(config, kept, layer + 1, near)
        done = {
            "gradients": held.gradients((layers - layer) / layers),
            "fp32 gradients": held.accumulators,
            "reduce bucket": held.bucket,
        }
        parts = always | gathered | done | here | {"working set": working}
        backwards.append(Phase(f"backward, {name} of layer {layer}", parts))
    phases.append(max(backwards, key=lambda phase: phase.total))
    done = {"gradients": held.gradients(1.0), "fp32 gradients": held.accumulators}
    reducing = done | {"reduce bucket": held.bucket + held.reduce}
    phases.append(Phase("gradients are reduced", always | gathered | reducing))
    stepping = {"gradients": held.step_gradients, "optimizer's copies": held.step}
    phases.append(Phase("optimizer step", always | stepping))
    return [Phase(p.name, {part: size for part, size in p.parts.items() if size}) for p in phases]


def host_parts(config: Config, shape: ModelConfig, held: States) -> dict[str, int]:
    """Bytes of one host by part, of all its ranks."""
    train = config.train
    parts = {f"optimizer: {part}": size for part, size in held.host.items()}
    if train.offload_activations:
        for part, size in kept_tensors(config, layer_tensors(config, shape)).items():
            if part != "kept LSE":
                parts[f"{part} (pinned)"] = shape.num_layers * rounded_pinned(size)
    if train.save_background:
        parts["checkpoint's copy (pinned)"] = held.checkpoint
    parts["processes"] = int(HOST_PROCESS.value)
    return {part: size * config.parallel.gpus_per_node for part, size in parts.items()}


def memory_plan(config: Config, shape: ModelConfig) -> MemoryPlan:
    """What a GPU and a host of this recipe hold, beside what they have."""
    ranks, host = config.parallel.gpus_per_node, config.plan.host_gib
    held = states(config, shape)
    return MemoryPlan(
        phases=gpu_phases(config, shape, held),
        gpu_bytes=int(GPUS[config.plan.gpu].memory.value),
        host=host_parts(config, shape, held),
        host_bytes=int(HOST_BYTES_A_GPU.value * ranks if host is None else host * 2**30),
    )

"""Hugging Face's Llama tensors <-> Megatron's, one at a time.

Dimension letters: G KV heads, Q query heads per KV head, H head dim, D hidden size, F ffn size,
V vocabulary. Weights are [out, in], as torch.nn.Linear keeps them.

Both transformers and megatron-core rotate halves of a head in RoPE, so that no row moves within a
head. Megatron's names and forms here are those of a model without tensor parallelism (TP=1).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import torch

from model.config import ModelConfig
from model.rope import ROPE_TYPES

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
ROPE_KEYS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class MappingError(ValueError):
    """A model or tensor that has no place in the mapping; the message names the remedy."""


def megatron_to_hf_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """For each Megatron tensor, in the order of the forward pass, the HF tensors it is made of."""
    names: dict[str, tuple[str, ...]] = {EMBEDDING: ("model.embed_tokens.weight",)}
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, parts in (
            ("input_layernorm", ("input_layernorm",)),
            ("self_attention.linear_qkv", tuple(f"self_attn.{p}_proj" for p in "qkv")),
            ("self_attention.linear_proj", ("self_attn.o_proj",)),
            ("pre_mlp_layernorm", ("post_attention_layernorm",)),
            ("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.linear_fc2", ("mlp.down_proj",)),
        ):
            names[f"{ours}{name}.weight"] = tuple(f"{theirs}{part}.weight" for part in parts)
    names[FINAL_NORM] = ("model.norm.weight",)
    if not config.tie_embeddings:
        names[OUTPUT] = ("lm_head.weight",)
    return names


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """For each HF tensor of the model, its shape."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    by_part = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "norm": (hidden,),
    }
    names = [name for parts in megatron_to_hf_names(config).values() for name in parts]
    return {name: by_part[name.split(".")[-2]] for name in names}


def merge(name: str, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """The Megatron tensor `name` (TP=1 form) of its HF tensors, in `megatron_to_hf_names`' order.

    linear_qkv is [G * (Q + 2) * H, D]: per KV group its query heads, then its key, then its value.
    linear_fc1 is [2 * F, D]: the gate, then the up projection. Parts of several dtypes give the
    narrowest dtype that holds all of them exactly.

    Raises:
        MappingError: on an unknown name or a wrong shape.
    """
    sources = _sources(name, config)
    shapes = hf_shapes(config)
    found = [tuple(part.shape) for part in parts]
    expected = [shapes[source] for source in sources]
    if found != expected:
        raise MappingError(
            f"{name}: parts of shapes {found}; must be {expected} ({', '.join(sources)}); "
            "check the model's config.json"
        )
    if "linear_qkv" in name:
        groups = config.num_kv_heads
        per_group = [part.reshape(groups, -1, config.hidden_size) for part in parts]
        return torch.cat(per_group, dim=1).reshape(-1, config.hidden_size)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def split(name: str, tensor: torch.Tensor, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The HF tensors of the Megatron tensor `name` in its TP=1 form: the inverse of `merge`.

    Raises:
        MappingError: on an unknown name or a wrong shape.
    """
    sources = _sources(name, config)
    _check_shape(name, tensor, config)
    if "linear_qkv" in name:
        head, queries = config.head_dim, config.num_heads // config.num_kv_heads
        grouped = tensor.reshape(config.num_kv_heads, -1, config.hidden_size)
        parts = grouped.split([queries * head, head, head], dim=1)
        parts = [part.reshape(-1, config.hidden_size) for part in parts]
    else:
        parts = tensor.chunk(len(sources))
    return dict(zip(sources, (part.contiguous() for part in parts), strict=True))


def megatron_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the Megatron tensor `name` in its TP=1 form.

    Raises:
        MappingError: on an unknown name.
    """
    shapes = hf_shapes(config)
    parts = [shapes[source] for source in _sources(name, config)]
    return (sum(shape[0] for shape in parts), *parts[0][1:])


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The shape of a Hugging Face Llama's config.json: all layers full, both ropes its own.

    transformers' LlamaConfig reads the values, so that defaults, older keys and the precedence of
    keys that contradict each other are its own.

    Raises:
        MappingError: on another architecture, a feature that the Megatron model lacks, a rope type
            outside `model.rope.ROPE_TYPES` or a value that transformers refuses.
    """
    for key, legal in (
        ("model_type", ("llama",)),
        ("hidden_act", ("silu", None)),
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("pretraining_tp", (1, None)),
        ("quantization_config", (None,)),
        # Names the file of the weights: the reader of weights does not look for it.
        ("transformers_weights", (None,)),
    ):
        if values.get(key) not in legal:
            shown = "absent" if legal == (None,) else repr(legal[0])
            raise MappingError(
                f"config.json: {key}={values.get(key)!r}: must be {shown}; choose another "
                "model.source"
            )
    required = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
    )
    for key in required:
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise MappingError(
                f"config.json: {key}={values.get(key)!r}: must be a whole number of at least 1; "
                "correct config.json or fetch the model again"
            )
    # Takes seconds, and most commands read no config.json.
    from transformers import LlamaConfig

    try:
        llama = LlamaConfig.from_dict(copy.deepcopy(dict(values)))
    # Its checks of types and of rope parameters raise errors of several kinds.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MappingError(
            f"config.json: must be what transformers' LlamaConfig takes ({shorten(reason, 200)}); "
            "correct config.json or fetch the model again"
        ) from error
    if llama.num_attention_heads % llama.num_key_value_heads:
        raise MappingError(
            f"config.json: num_attention_heads={llama.num_attention_heads}: must be a multiple of "
            f"num_key_value_heads={llama.num_key_value_heads}; correct config.json or fetch the "
            "model again"
        )
    rope = _rope_parameters(llama.rope_parameters)
    return ModelConfig(
        num_layers=llama.num_hidden_layers,
        hidden_size=llama.hidden_size,
        ffn_hidden_size=llama.intermediate_size,
        num_heads=llama.num_attention_heads,
        num_kv_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        vocab_size=llama.vocab_size,
        max_positions=llama.max_position_embeddings,
        norm_eps=llama.rms_norm_eps,
        tie_embeddings=llama.tie_word_embeddings,
        rope=rope,
        sparse_rope=dict(rope),
        is_full=(True,) * llama.num_hidden_layers,
    )


def _rope_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `model.rope` needs of the rope parameters that transformers read."""
    kind = given.get("rope_type")
    if kind not in ROPE_TYPES:
        raise MappingError(
            f"config.json: rope_type={kind!r}: must be one of {', '.join(ROPE_TYPES)}; choose "
            "another model.source"
        )
    missing = [key for key in ROPE_KEYS[kind] if given.get(key) is None]
    if missing or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise MappingError(
            f"config.json: rope parameters {given}: rope_type {kind!r} needs "
            f"{', '.join(ROPE_KEYS[kind])} and a partial_rotary_factor of 1; correct config.json"
        )
    rope = {key: given[key] for key in ROPE_KEYS[kind]}
    return {"rope_type": kind, **rope, "rope_theta": float(rope["rope_theta"])}


def _sources(name: str, config: ModelConfig) -> tuple[str, ...]:
    names = megatron_to_hf_names(config)
    if name not in names:
        raise MappingError(
            f"{name}: no such Megatron tensor; must be {EMBEDDING}, decoder.layers.0 to "
            f"{config.num_layers - 1}, {FINAL_NORM} or, where embeddings are not tied, {OUTPUT}; "
            "check the model's config.json"
        )
    return names[name]


def _check_shape(name: str, tensor: torch.Tensor, config: ModelConfig) -> None:
    expected = megatron_shape(name, config)
    if tuple(tensor.shape) != expected:
        raise MappingError(
            f"{name}: shape {tuple(tensor.shape)}; must be {expected}; check that the weights "
            "belong to this model"
        )

"""Parameters and FLOPs of a model, from its shape and the pattern's true pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from kernels.pattern import Pattern

from .config import ModelConfig
from .mapping import hf_shapes

# Dense bf16 peak of one GPU in FLOP/s, by the vendor's data sheets (SXM parts, no sparsity).
PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def parameters(config: ModelConfig) -> int:
    """All weights, embedding and norms among them."""
    return sum(prod(shape) for shape in hf_shapes(config).values())


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: layers and output layer, no embedding."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    mlp = 3 * config.hidden_size * config.ffn_hidden_size
    return config.num_layers * (attention + mlp) + config.hidden_size * config.vocab_size


def training_flops(config: ModelConfig, document_lengths: Sequence[int]) -> float:
    """Model FLOPs of forward and backward over these documents, recomputation not counted.

    6 per weight and token; 12 * head_dim per (query, key) pair and query head: two products,
    forward once and backward twice (PaLM, arXiv 2204.02311, appendix B, with true pairs).
    """
    tokens = sum(document_lengths)
    flops = 6.0 * matrix_parameters(config) * tokens
    attention = {
        kind: 3.0 * attention_flops(config, layer, document_lengths)
        for kind, layer in {k: i for i, k in enumerate(config.is_full)}.items()
    }
    return flops + sum(attention[kind] for kind in config.is_full)


def attention_flops(config: ModelConfig, layer: int, document_lengths: Sequence[int]) -> float:
    """FLOPs of the two products of layer `layer`'s attention, forward, over these documents."""
    pairs = _pairs(config.pattern_of(layer), tuple(document_lengths), config.num_kv_heads)
    return 4.0 * config.head_dim * (config.num_heads // config.num_kv_heads) * pairs


@lru_cache(maxsize=4)
def _pairs(pattern: Pattern, document_lengths: tuple[int, ...], kv_heads: int) -> int:
    # Layers of one kind, and the layouts that a plan compares, ask for the same.
    return pattern.pairs(document_lengths, kv_heads)


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU named as torch.cuda names it; None where unknown."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in gpu_name), None)

"""Rotary position embedding with rotated halves, as transformers and megatron-core both apply it.

Shapes: T tokens or any leading shape, H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

ROPE_TYPES = ("default", "linear", "llama3")


def inverse_frequencies(head_dim: int, rope: Mapping[str, Any]) -> torch.Tensor:
    """Inverse frequencies, float32 of shape [head_dim / 2].

    Args:
        rope: rope parameters as transformers 5 writes them: rope_type, rope_theta and, for
            "linear", factor; for "llama3", factor, low_freq_factor, high_freq_factor and
            original_max_position_embeddings.

    Source: RoFormer (arXiv 2104.09864), section 3.2.2; the scaled types as transformers has them.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_type={kind!r}: must be one of {', '.join(ROPE_TYPES)}; convert a model whose "
            "config.json has one of these"
        )
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (rope["rope_theta"] ** exponent)
    if kind == "linear":
        return inverse / rope["factor"]
    if kind == "llama3":
        trained = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi / inverse
        smooth = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inverse / rope["factor"] + smooth * inverse
    return inverse


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., H] rotated by angles of broadcastable shape [..., H]; computed in x's dtype."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin

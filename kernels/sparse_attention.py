"""The public call: attention of packed documents over a pattern, on whatever device they are.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from .dense import dense_attention
from .pattern import Pattern
from .tiled import TiledAttention

log = logging.getLogger("longgen.kernels")


@cache
def _say_once(backend: str, device: str) -> None:
    log.info("sparse layers on %s run by %s", device, backend)


def sparse_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    pattern: Pattern,
    cu_seqlens: torch.Tensor,
    *,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attention in which each query sees the keys of its document that `pattern` names.

    Args:
        q_TNH: queries [T, N, H] of all documents, one after another, after RoPE.
        k_TGH, v_TGH: keys and values [T, G, H]; N is a multiple of G.
        pattern: who sees whom; Pattern.full() for a full layer.
        cu_seqlens: int32 [documents + 1], from 0 to T, best on the host (a CUDA tensor is copied,
            which waits for the device).
        first_kv_head, total_kv_heads: where this shard's KV heads lie in the whole model's, which
            decides per-head phases; by default the shard is the whole.
        softmax_scale: by default 1 / sqrt(H).

    Returns:
        out [T, N, H] in q's dtype, differentiable in q, k and v.

    Raises:
        ValueError: where shapes or cu_seqlens do not fit together.
    """
    (tokens, heads, head_dim), kv_heads = q_TNH.shape, k_TGH.shape[1]
    if heads % kv_heads or k_TGH.shape != v_TGH.shape or k_TGH.shape[::2] != (tokens, head_dim):
        raise ValueError(
            f"q {tuple(q_TNH.shape)}, k {tuple(k_TGH.shape)}, v {tuple(v_TGH.shape)}: must be "
            "[T, N, H], [T, G, H], [T, G, H] with N a multiple of G; check the head counts"
        )
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(
            f"cu_seqlens={bounds[:4]}...{bounds[-1:]}: must ascend from 0 to the {tokens} tokens; "
            "pass the documents' cumulative lengths"
        )
    bounds = [0] + [b for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a]
    total = kv_heads if total_kv_heads is None else total_kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if pattern.is_full:
        return dense_attention(q_TNH, k_TGH, v_TGH, bounds, softmax_scale=scale)
    if q_TNH.is_cuda:
        from .flex import flex_sparse_attention

        _say_once("FlexAttention", "cuda")
        return flex_sparse_attention(
            q_TNH, k_TGH, v_TGH, pattern, bounds, first_kv_head, total, scale
        )
    _say_once("tiled PyTorch", str(q_TNH.device))
    return TiledAttention.apply(q_TNH, k_TGH, v_TGH, pattern, bounds, first_kv_head, total, scale)

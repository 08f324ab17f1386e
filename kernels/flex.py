"""Sparse layers on CUDA through torch's FlexAttention.

The block mask of a row is built once per (pattern, documents) and shared by all layers.
Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .pattern import Pattern

# FlexAttention's Triton backend fails on blocks of 64; the mask stays exact, token by token.
BLOCK_SIZE = 128


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _block_mask(
    pattern: Pattern,
    cu_seqlens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    first: int,
    total: int,
    device: torch.device,
) -> BlockMask:
    lengths = torch.tensor(cu_seqlens).diff()
    tokens = cu_seqlens[-1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    starts = torch.tensor(cu_seqlens[:-1], device=device)
    position = torch.arange(tokens, device=device) - starts[document]
    ratio = heads // kv_heads

    def mask(b, h, q, k):
        kv_head = first + h // ratio
        seen = pattern.visible(position[q], position[k], kv_head, total)
        return seen & (document[q] == document[k])

    per_head = heads if pattern.heads_differ else None
    return create_block_mask(
        mask, None, per_head, tokens, tokens, device=device, BLOCK_SIZE=BLOCK_SIZE, _compile=True
    )


def flex_sparse_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    pattern: Pattern,
    cu_seqlens: list[int],
    first: int,
    total: int,
    scale: float,
) -> torch.Tensor:
    """out [T, N, H]; arguments as in sparse_attention, `cu_seqlens` on the host."""
    heads, kv_heads = q_TNH.shape[1], k_TGH.shape[1]
    mask = _block_mask(pattern, tuple(cu_seqlens), heads, kv_heads, first, total, q_TNH.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TGH, v_TGH))
    out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=heads != kv_heads)
    return out[0].transpose(0, 1)

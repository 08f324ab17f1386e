"""Sparse layers on CUDA through torch's FlexAttention.

The block mask of a row is built once per (pattern, documents) and shared by all layers.
Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from .call import Call
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
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, call: Call, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out [T, N, H], LSE [N, T] or None), with autograd of its own."""
    heads, kv_heads = q_TNH.shape[1], k_TGH.shape[1]
    place = (call.first_kv_head, call.total_kv_heads)
    mask = _block_mask(call.pattern, call.bounds, heads, kv_heads, *place, q_TNH.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TGH, v_TGH))
    aux = AuxRequest(lse=True) if with_lse else None
    found = _compiled()(
        q,
        k,
        v,
        block_mask=mask,
        scale=call.scale,
        enable_gqa=heads != kv_heads,
        return_aux=aux,
    )
    out, lse = (found[0], found[1].lse[0]) if with_lse else (found, None)
    return out[0].transpose(0, 1), lse

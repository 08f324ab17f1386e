"""Adds what far queries give special keys to dK and dV that another kernel (Hopper's) wrote.

Shapes: as in sparse_forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .call import Call
from .sparse_forward import (
    NOT_SPECIALIZED,
    document_start,
    head_phase,
    load_rows,
    special_below,
    special_position,
    store_rows,
)
from .triton_attention import pattern_arguments, stride_arguments

# What the kernel is told of the call.
TOLD = (
    "cu_seqlens",
    "documents",
    "search_steps",
    "first_kv_head",
    "total_kv_heads",
    "scale",
    "sink_tokens",
    "block",
    "stride",
    "STRIDED",
    "PER_HEAD",
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_attention_bwd_add_far_kernel(
    partial_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens,
    slot_tiles,
    documents,
    search_steps,
    slots,
    splits,
    dk_stride_t,
    dk_stride_g,
    dv_stride_t,
    dv_stride_g,
    ratio,
    first_kv_head,
    total_kv_heads,
    scale,
    sink_tokens,
    block,
    stride,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    STRIDED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Adds a tile of special keys' far parts, in order, to dk and dv [T, G, H] in place."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, stride, PER_HEAD)
    document, first_tile = document_start(slot_tiles, documents, search_steps, tile)
    start = tl.load(cu_seqlens + document)
    stop = tl.load(cu_seqlens + document + 1)
    special = special_below(stop - start, sink_tokens, block, stride, phase, STRIDED)
    index_K = (tile - first_tile) * TILE_K + tl.arange(0, TILE_K)
    there_K = index_K < special
    keys_K = start + special_position(index_K, sink_tokens, block, stride, phase, STRIDED)
    dk_KH = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv_KH = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    parts = splits * ratio
    for part in range(parts):
        slot_K = (kv_head * parts + part) * slots + tile * TILE_K + tl.arange(0, TILE_K)
        place = (slot_K, 2 * HEAD_DIM, there_K)
        dk_KH += load_rows(partial_ptr, *place, HEAD_DIM, PADDED_DIM, tl.float32)
        dv_KH += load_rows(partial_ptr + HEAD_DIM, *place, HEAD_DIM, PADDED_DIM, tl.float32)
    dk_ptr += kv_head * dk_stride_g
    dv_ptr += kv_head * dv_stride_g
    dk_KH = dk_KH * scale
    dk_KH += load_rows(dk_ptr, keys_K, dk_stride_t, there_K, HEAD_DIM, PADDED_DIM, tl.float32)
    dv_KH += load_rows(dv_ptr, keys_K, dv_stride_t, there_K, HEAD_DIM, PADDED_DIM, tl.float32)
    store_rows(dk_ptr, keys_K, dk_stride_t, there_K, dk_KH, HEAD_DIM, PADDED_DIM)
    store_rows(dv_ptr, keys_K, dv_stride_t, there_K, dv_KH, HEAD_DIM, PADDED_DIM)


def add_far_keys(
    dk_TGH: torch.Tensor, dv_TGH: torch.Tensor, far: dict, tiles: int, tile_k: int, call: Call
) -> None:
    """Adds the far queries' parts to dK and dV in place, in a fixed order.

    Args:
        dk_TGH, dv_TGH: what the queries within the window gave.
        far: partial_ptr [G, splits * R, slots, 2, H] float32 (dK without the scale, and dV),
            slot_tiles, slots and splits.
        tiles, tile_k: tiles of special keys, and the keys of a tile.
    """
    told = pattern_arguments(call, dk_TGH.device)
    kv_heads, parts, _, _, head_dim = far["partial_ptr"].shape
    with torch.cuda.device_of(dk_TGH):
        sparse_attention_bwd_add_far_kernel[(tiles, kv_heads)](
            dk_ptr=dk_TGH,
            dv_ptr=dv_TGH,
            ratio=parts // far["splits"],
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            TILE_K=tile_k,
            **far,
            **stride_arguments(dk=dk_TGH, dv=dv_TGH),
            **{name: told[name] for name in TOLD},
        )

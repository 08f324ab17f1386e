"""Special keys before the window, for a backward whose window is another kernel's (Hopper's).

The far queries' part of dK and dV comes from sparse_attention_bwd_far_kernel, as on the portable
path; here it is added to the window's, and dQ gets what the far keys add to it.

Shapes: as in sparse_forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .call import Call
from .sparse_backward import query_gradient
from .sparse_forward import (
    LOG2E,
    NOT_SPECIALIZED,
    document_start,
    head_phase,
    load_rows,
    special_below,
    special_position,
    store_rows,
    strided_below,
    whole_tile,
)
from .triton_attention import far_key_parts, run_argument, stride_arguments

FAR_DQ = {"TILE_M": 64, "TILE_K": 64, "num_warps": 4, "num_stages": 2}
# Of the arguments that all kernels of a backward share, those of the one that adds to dK and dV.
ADDING = (
    "cu_seqlens",
    "documents",
    "search_steps",
    "ratio",
    "first_kv_head",
    "total_kv_heads",
    "scale",
    "sink_tokens",
    "block",
    "stride",
    "HEAD_DIM",
    "PADDED_DIM",
    "STRIDED",
    "PER_HEAD",
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_attention_bwd_far_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    near_ptr,
    dq_ptr,
    cu_seqlens,
    documents,
    search_steps,
    tokens,
    q_stride_t,
    q_stride_n,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    d_out_stride_t,
    d_out_stride_n,
    near_stride_t,
    near_stride_n,
    dq_stride_t,
    dq_stride_n,
    ratio,
    first_kv_head,
    total_kv_heads,
    scale,
    sink_tokens,
    window,
    block,
    stride,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    STRIDED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    RUN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dq [T, N, H] = scale * (near [T, N, H] float32, the window's part, + the far keys')."""
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // ratio
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, stride, PER_HEAD)
    q_ptr += head * q_stride_n
    d_out_ptr += head * d_out_stride_n
    k_ptr += kv_head * k_stride_g
    v_ptr += kv_head * v_stride_g
    near_ptr += head * near_stride_n
    first_row = tl.program_id(0) * TILE_M
    stop_row = tl.minimum(first_row + TILE_M, tokens)
    rows_M = first_row + tl.arange(0, TILE_M)
    row_there = rows_M < tokens
    _, row_starts_M = document_start(
        cu_seqlens, documents, search_steps, tl.minimum(rows_M, tokens - 1)
    )
    _, first_start = document_start(cu_seqlens, documents, search_steps, first_row)
    _, last_start = document_start(cu_seqlens, documents, search_steps, stop_row - 1)
    # Keys that are far for the last row; documents that begin within the tile have none there.
    pattern = (sink_tokens, block, stride, phase)
    reach = tl.maximum(stop_row - window - first_start, 0)
    special = special_below(reach, *pattern, STRIDED)
    whole_special = special * 0
    if RUN > 0:
        reach = tl.maximum(first_row + 1 - window - first_start, 0)
        whole_special = special_below(reach, *pattern, STRIDED) // TILE_K
        whole_special = tl.where(first_start == last_start, whole_special, 0)
    q_MH = load_rows(q_ptr, rows_M, q_stride_t, row_there, HEAD_DIM, PADDED_DIM, COMPUTE)
    d_out_MH = load_rows(
        d_out_ptr, rows_M, d_out_stride_t, row_there, HEAD_DIM, PADDED_DIM, COMPUTE
    )
    lse_M = tl.load(lse_ptr + head * tokens + rows_M, mask=row_there, other=0.0) * LOG2E
    delta_M = tl.load(delta_ptr + head * tokens + rows_M, mask=row_there, other=0.0)
    queries = (q_MH, d_out_MH, lse_M, delta_M)
    lanes = tl.arange(0, TILE_K)
    scale_log2 = scale * LOG2E
    dq_MH = load_rows(near_ptr, rows_M, near_stride_t, row_there, HEAD_DIM, PADDED_DIM, tl.float32)
    for number in range(whole_special, tl.cdiv(special, TILE_K)):
        index_K = number * TILE_K + lanes
        there_K = index_K < special
        place_K = special_position(index_K, *pattern, STRIDED)
        keys_K = tl.where(there_K, first_start + place_K, first_start)
        k_KH = load_rows(k_ptr, keys_K, k_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        v_KH = load_rows(v_ptr, keys_K, v_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        seen = there_K[None, :] & (rows_M[:, None] - keys_K[None, :] >= window)
        seen = seen & (row_starts_M == first_start)[:, None]
        dq_MH = query_gradient(*queries, dq_MH, k_KH, v_KH, seen, scale_log2)
    skipped = strided_below(sink_tokens, block, stride, phase)
    runs = (whole_special, first_start, 0, sink_tokens, skipped, stride, phase)
    for number in range(whole_special):
        key = whole_tile(number, *runs, STRIDED, RUN, TILE_K)
        k_at, v_at = k_ptr + key * k_stride_t, v_ptr + key * v_stride_t
        k_KH = load_rows(k_at, lanes, k_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        v_KH = load_rows(v_at, lanes, v_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        dq_MH = query_gradient(*queries, dq_MH, k_KH, v_KH, None, scale_log2)
    dq_ptr += head * dq_stride_n
    store_rows(dq_ptr, rows_M, dq_stride_t, row_there, dq_MH * scale, HEAD_DIM, PADDED_DIM)


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
    near_TNH: torch.Tensor, dk_TGH: torch.Tensor, dv_TGH: torch.Tensor, common: dict, call: Call
) -> torch.Tensor:
    """Completes the gradients of a backward that saw the window only.

    The window must be at least FAR_DQ's tile of queries.

    Args:
        near_TNH: the window's part of dQ, without the scale, float32.
        dk_TGH, dv_TGH: the window's part of dK and dV; the far queries' is added in place.
        common: the arguments that all kernels of the backward share.

    Returns:
        dq [T, N, H] in q's dtype.
    """
    q = common["q_ptr"]
    dq = q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        far, far_tiles, slot_tile = far_key_parts(common, call)
        if far_tiles:
            sparse_attention_bwd_add_far_kernel[(far_tiles, dk_TGH.shape[1])](
                dk_ptr=dk_TGH,
                dv_ptr=dv_TGH,
                TILE_K=slot_tile,
                **stride_arguments(dk=dk_TGH, dv=dv_TGH),
                **far,
                **{name: common[name] for name in ADDING},
            )
        sparse_attention_bwd_far_dq_kernel[(triton.cdiv(q.shape[0], FAR_DQ["TILE_M"]), q.shape[1])](
            near_ptr=near_TNH,
            dq_ptr=dq,
            **stride_arguments(near=near_TNH, dq=dq),
            **common,
            **run_argument(call.pattern, FAR_DQ["TILE_K"]),
            **FAR_DQ,
        )
    return dq

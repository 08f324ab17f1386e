"""Triton backward of the sparse layers: dQ by tiles of queries, dK and dV by tiles of keys.

The window's part of dK and dV of a key tile comes from the queries within the window of it. What
the far queries add to a special key (sinks, strided blocks: all later queries of the document see
them) is computed apart, split over ranges of queries and over the query heads of the group, into
`slots` of float32; the program of the window adds these in a fixed order. There are no atomics: the
same inputs give the same bits.

Shapes: as in sparse_forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sparse_forward import (
    LOG2E,
    NOT_SPECIALIZED,
    document_start,
    head_phase,
    is_special,
    key_tiles,
    load_rows,
    masked_tile,
    special_below,
    special_position,
    store_rows,
    strided_below,
    whole_special_tiles,
    whole_tile,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_attention_bwd_delta_kernel(
    out_ptr,
    d_out_ptr,
    delta_ptr,
    tokens,
    out_stride_t,
    out_stride_n,
    d_out_stride_t,
    d_out_stride_n,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """delta [N, T] = sum over the head dim of out * d_out (FlashAttention, arXiv 2205.14135)."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    there = rows < tokens
    out_ptr += head * out_stride_n
    d_out_ptr += head * d_out_stride_n
    out = load_rows(out_ptr, rows, out_stride_t, there, HEAD_DIM, PADDED_DIM, tl.float32)
    d_out = load_rows(d_out_ptr, rows, d_out_stride_t, there, HEAD_DIM, PADDED_DIM, tl.float32)
    tl.store(delta_ptr + head * tokens + rows, tl.sum(out * d_out, 1), mask=there)


@triton.jit
def query_gradient(
    q_MH,
    d_out_MH,
    lse_M,
    delta_M,
    dq_MH,
    k_KH,
    v_KH,
    seen,
    scale_log2,
):
    """dQ (without the scale) of a tile of queries, with what these keys add.

    lse to base 2; `seen` is None where all queries see all keys.
    """
    scores = tl.dot(q_MH, tl.trans(k_KH), input_precision="tf32x3") * scale_log2
    p = tl.exp2(scores - lse_M[:, None])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(d_out_MH, tl.trans(v_KH), input_precision="tf32x3")
    ds = (p * (dp - delta_M[:, None])).to(k_KH.dtype)
    return tl.dot(ds, k_KH, dq_MH, input_precision="tf32x3")


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
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
    """dq [T, N, H]; the same walk as the forward's."""
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // ratio
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, stride, PER_HEAD)
    q_ptr += head * q_stride_n
    d_out_ptr += head * d_out_stride_n
    k_ptr += kv_head * k_stride_g
    v_ptr += kv_head * v_stride_g
    first_row = tl.program_id(0) * TILE_M
    stop_row = tl.minimum(first_row + TILE_M, tokens)
    rows_M = first_row + tl.arange(0, TILE_M)
    row_there = rows_M < tokens
    _, row_starts_M = document_start(
        cu_seqlens, documents, search_steps, tl.minimum(rows_M, tokens - 1)
    )
    _, first_start = document_start(cu_seqlens, documents, search_steps, first_row)
    _, last_start = document_start(cu_seqlens, documents, search_steps, stop_row - 1)
    pattern = (sink_tokens, window, block, stride, phase)
    special, special_tiles, near, tiles, whole, whole_count = key_tiles(
        first_row, stop_row, first_start, last_start, *pattern, STRIDED, TILE_K
    )
    whole_special = whole_special_tiles(special, first_start, last_start, RUN, TILE_K)
    q_MH = load_rows(q_ptr, rows_M, q_stride_t, row_there, HEAD_DIM, PADDED_DIM, COMPUTE)
    d_out_MH = load_rows(
        d_out_ptr, rows_M, d_out_stride_t, row_there, HEAD_DIM, PADDED_DIM, COMPUTE
    )
    lse_M = tl.load(lse_ptr + head * tokens + rows_M, mask=row_there, other=0.0) * LOG2E
    delta_M = tl.load(delta_ptr + head * tokens + rows_M, mask=row_there, other=0.0)
    queries = (q_MH, d_out_MH, lse_M, delta_M)
    lanes = tl.arange(0, TILE_K)
    scale_log2 = scale * LOG2E
    dq_MH = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    walk = (stop_row, first_start, special, special_tiles, near, whole, whole_count)
    for number in range(whole_special, special_tiles + tiles - whole_count):
        keys, seen = masked_tile(number, rows_M, row_starts_M, *walk, *pattern, STRIDED, TILE_K)
        k_KH = load_rows(k_ptr, keys, k_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        v_KH = load_rows(v_ptr, keys, v_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        dq_MH = query_gradient(*queries, dq_MH, k_KH, v_KH, seen, scale_log2)
    skipped = strided_below(sink_tokens, block, stride, phase)
    runs = (whole_special, first_start, near + whole * TILE_K, sink_tokens, skipped, stride, phase)
    for number in range(whole_special + whole_count):
        key = whole_tile(number, *runs, STRIDED, RUN, TILE_K)
        k_at, v_at = k_ptr + key * k_stride_t, v_ptr + key * v_stride_t
        k_KH = load_rows(k_at, lanes, k_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        v_KH = load_rows(v_at, lanes, v_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        dq_MH = query_gradient(*queries, dq_MH, k_KH, v_KH, None, scale_log2)
    dq_ptr += head * dq_stride_n
    store_rows(dq_ptr, rows_M, dq_stride_t, row_there, dq_MH * scale, HEAD_DIM, PADDED_DIM)


@triton.jit
def _key_gradients(
    dk_KH,
    dv_KH,
    rows_M,
    there,
    seen_KM,
    q_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    k_KH,
    v_KH,
    q_stride_t,
    d_out_stride_t,
    scale,
    HEAD_DIM: tl.constexpr,
):
    """dK (without the scale) and dV of a key tile, with what these queries of one head add.

    The pointers are those of the head. `there` and `seen_KM` are None where all queries exist and
    see all keys.
    """
    PADDED_DIM: tl.constexpr = k_KH.shape[1]
    COMPUTE: tl.constexpr = k_KH.dtype
    q_MH = load_rows(q_ptr, rows_M, q_stride_t, there, HEAD_DIM, PADDED_DIM, COMPUTE)
    d_out_MH = load_rows(d_out_ptr, rows_M, d_out_stride_t, there, HEAD_DIM, PADDED_DIM, COMPUTE)
    if there is None:
        lse_M = tl.load(lse_ptr + rows_M)
        delta_M = tl.load(delta_ptr + rows_M)
    else:
        lse_M = tl.load(lse_ptr + rows_M, mask=there, other=0.0)
        delta_M = tl.load(delta_ptr + rows_M, mask=there, other=0.0)
    scores_KM = tl.dot(k_KH, tl.trans(q_MH), input_precision="tf32x3") * (scale * LOG2E)
    p_KM = tl.exp2(scores_KM - (lse_M * LOG2E)[None, :])
    if seen_KM is not None:
        p_KM = tl.where(seen_KM, p_KM, 0.0)
    dv_KH = tl.dot(p_KM.to(COMPUTE), d_out_MH, dv_KH, input_precision="tf32x3")
    dp_KM = tl.dot(v_KH, tl.trans(d_out_MH), input_precision="tf32x3")
    ds_KM = (p_KM * (dp_KM - delta_M[None, :])).to(COMPUTE)
    dk_KH = tl.dot(ds_KM, q_MH, dk_KH, input_precision="tf32x3")
    return dk_KH, dv_KH


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_attention_bwd_far_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    partial_ptr,
    cu_seqlens,
    slot_tiles,
    documents,
    search_steps,
    tokens,
    slots,
    splits,
    q_stride_t,
    q_stride_n,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    d_out_stride_t,
    d_out_stride_n,
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
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What one part of the far queries adds to dK and dV of a tile of special keys.

    partial [G, splits * R, slots, 2, H] in float32: dK and dV side by side. Every slot is written;
    those beyond a document's special keys hold nothing of use and nobody reads them.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    split = part // ratio
    head = kv_head * ratio + part % ratio
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, stride, PER_HEAD)
    q_ptr += head * q_stride_n
    d_out_ptr += head * d_out_stride_n
    k_ptr += kv_head * k_stride_g
    v_ptr += kv_head * v_stride_g
    lse_ptr += head * tokens
    delta_ptr += head * tokens
    document, first_tile = document_start(slot_tiles, documents, search_steps, tile)
    start = tl.load(cu_seqlens + document)
    stop = tl.load(cu_seqlens + document + 1)
    special = special_below(stop - start, sink_tokens, block, stride, phase, STRIDED)
    index_K = (tile - first_tile) * TILE_K + tl.arange(0, TILE_K)
    there_K = index_K < special
    place_K = special_position(index_K, sink_tokens, block, stride, phase, STRIDED)
    keys_K = tl.where(there_K, start + place_K, start)
    least = tl.min(tl.where(there_K, keys_K, stop), 0)
    k_KH = load_rows(k_ptr, keys_K, k_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
    v_KH = load_rows(v_ptr, keys_K, v_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
    keys = (k_KH, v_KH, q_stride_t, d_out_stride_t, scale)
    at = (q_ptr, d_out_ptr, lse_ptr, delta_ptr)
    dk_KH = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv_KH = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    far = least + window
    chunk = tl.cdiv(tl.cdiv(tl.maximum(stop - far, 0), splits), TILE_M) * TILE_M
    first_row = far + split * chunk
    rows = tl.maximum(tl.minimum(first_row + chunk, stop) - first_row, 0)
    tiles = tl.cdiv(rows, TILE_M)
    # Whole tiles of queries: outside the window of the last key, and not cut by the part's end.
    whole = tl.minimum(
        tl.cdiv(tl.maximum(tl.max(keys_K, 0) + window - first_row, 0), TILE_M), tiles
    )
    count = tl.maximum(rows // TILE_M - whole, 0)
    lanes = tl.arange(0, TILE_M)
    for number in range(tiles - count):
        rows_M = first_row + tl.where(number < whole, number, number + count) * TILE_M + lanes
        there = rows_M < first_row + rows
        seen = (rows_M[None, :] - keys_K[:, None] >= window) & there[None, :]
        dk_KH, dv_KH = _key_gradients(dk_KH, dv_KH, rows_M, there, seen, *at, *keys, HEAD_DIM)
    for number in range(whole, whole + count):
        rows_M = first_row + number * TILE_M + lanes
        dk_KH, dv_KH = _key_gradients(dk_KH, dv_KH, rows_M, None, None, *at, *keys, HEAD_DIM)
    slot_K = (kv_head * splits * ratio + part) * slots + tile * TILE_K + tl.arange(0, TILE_K)
    store_rows(partial_ptr, slot_K, 2 * HEAD_DIM, None, dk_KH, HEAD_DIM, PADDED_DIM)
    store_rows(partial_ptr + HEAD_DIM, slot_K, 2 * HEAD_DIM, None, dv_KH, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_attention_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    partial_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens,
    slot_tiles,
    documents,
    search_steps,
    tokens,
    slots,
    splits,
    q_stride_t,
    q_stride_n,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    d_out_stride_t,
    d_out_stride_n,
    dk_stride_t,
    dk_stride_g,
    dv_stride_t,
    dv_stride_g,
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
    SLOT_TILE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dk, dv [T, G, H]: what the window's queries add, then the far parts in order."""
    kv_head = tl.program_id(1).to(tl.int64)
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, stride, PER_HEAD)
    k_ptr += kv_head * k_stride_g
    v_ptr += kv_head * v_stride_g
    first_key = tl.program_id(0) * TILE_K
    last_key = tl.minimum(first_key + TILE_K, tokens) - 1
    keys_K = first_key + tl.arange(0, TILE_K)
    key_there = keys_K < tokens
    document_K, start_K = document_start(
        cu_seqlens, documents, search_steps, tl.minimum(keys_K, tokens - 1)
    )
    stop_K = tl.load(cu_seqlens + document_K + 1)
    first_stop, last_stop = tl.min(stop_K, 0), tl.max(stop_K, 0)
    stop_row = tl.minimum(last_key + window, last_stop)
    k_KH = load_rows(k_ptr, keys_K, k_stride_t, key_there, HEAD_DIM, PADDED_DIM, COMPUTE)
    v_KH = load_rows(v_ptr, keys_K, v_stride_t, key_there, HEAD_DIM, PADDED_DIM, COMPUTE)
    dk_KH = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv_KH = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    tiles = tl.cdiv(stop_row - first_key, TILE_M)
    # Whole tiles of queries: behind the last key, within the window of the first one and of its
    # document.
    whole = tl.cdiv(last_key - first_key, TILE_M)
    stop_whole = tl.minimum(first_key + window, first_stop)
    count = tl.maximum((stop_whole - first_key) // TILE_M - whole, 0)
    count = tl.where(first_stop == last_stop, count, 0)
    lanes = tl.arange(0, TILE_M)
    keys = (k_KH, v_KH, q_stride_t, d_out_stride_t, scale)
    for each in range(ratio):
        head = kv_head * ratio + each
        q_at, d_out_at = q_ptr + head * q_stride_n, d_out_ptr + head * d_out_stride_n
        at = (q_at, d_out_at, lse_ptr + head * tokens, delta_ptr + head * tokens)
        for number in range(tiles - count):
            rows_M = first_key + tl.where(number < whole, number, number + count) * TILE_M + lanes
            there = rows_M < stop_row
            distance = rows_M[None, :] - keys_K[:, None]
            seen = (distance >= 0) & (distance < window) & (rows_M[None, :] < stop_K[:, None])
            dk_KH, dv_KH = _key_gradients(dk_KH, dv_KH, rows_M, there, seen, *at, *keys, HEAD_DIM)
        for number in range(whole, whole + count):
            rows_M = first_key + number * TILE_M + lanes
            dk_KH, dv_KH = _key_gradients(dk_KH, dv_KH, rows_M, None, None, *at, *keys, HEAD_DIM)
    inside_K = keys_K - start_K
    first_tile_K = tl.load(slot_tiles + document_K)
    has_slots_K = tl.load(slot_tiles + document_K + 1) > first_tile_K
    special_K = is_special(inside_K, sink_tokens, block, stride, phase, STRIDED)
    far_K = special_K & has_slots_K & key_there
    if tl.max(far_K.to(tl.int32), 0) > 0:
        index_K = inside_K
        if STRIDED:
            strided = strided_below(inside_K, block, stride, phase)
            strided -= strided_below(sink_tokens, block, stride, phase)
            index_K = tl.where(inside_K < sink_tokens, inside_K, sink_tokens + strided)
        slot_K = first_tile_K * SLOT_TILE + index_K
        parts = splits * ratio
        for part in range(parts):
            row_K = (kv_head * parts + part) * slots + slot_K
            place = (row_K, 2 * HEAD_DIM, far_K)
            dk_KH += load_rows(partial_ptr, *place, HEAD_DIM, PADDED_DIM, tl.float32)
            dv_KH += load_rows(partial_ptr + HEAD_DIM, *place, HEAD_DIM, PADDED_DIM, tl.float32)
    dk_ptr += kv_head * dk_stride_g
    dv_ptr += kv_head * dv_stride_g
    store_rows(dk_ptr, keys_K, dk_stride_t, key_there, dk_KH * scale, HEAD_DIM, PADDED_DIM)
    store_rows(dv_ptr, keys_K, dv_stride_t, key_there, dv_KH, HEAD_DIM, PADDED_DIM)

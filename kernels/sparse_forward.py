"""Triton forward of the sparse layers: sink tokens, a window and strided blocks, packed documents.

One program takes a tile of queries of one head. What they see is two enumerations of keys: the
*special* keys (sinks, then strided blocks) of the first query's document that lie before the
window, and the window, one run of consecutive keys. Documents that begin inside the tile begin
inside the window too, so that their sinks and strided blocks lie in that run, where the mask finds
them. Nothing is built on the host, and no length is compiled in.

Shapes: T packed tokens, N query heads, G KV heads, R = N / G, H head dim, M queries and K keys of a
tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Whole numbers that lengths, documents, shards and patterns change: one compiled kernel serves all.
NOT_SPECIALIZED = (
    "documents",
    "search_steps",
    "tokens",
    "slots",
    "splits",
    "ratio",
    "first_kv_head",
    "total_kv_heads",
    "sink_tokens",
    "window",
    "block",
    "stride",
)


@triton.jit
def document_start(cu_seqlens, documents, search_steps, token):
    """(index, first token) of the document that holds `token`, by bisection; any shape."""
    low = token * 0
    high = low + documents
    for _ in range(search_steps):
        middle = (low + high) // 2
        right = tl.load(cu_seqlens + middle) <= token
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low, tl.load(cu_seqlens + low)


@triton.jit
def head_phase(kv_head, first_kv_head, total_kv_heads, stride, PER_HEAD: tl.constexpr):
    """Pattern.phase_of this shard's KV head (int64)."""
    phase = kv_head * 0
    if PER_HEAD:
        phase = (first_kv_head + kv_head) * stride // total_kv_heads
    return phase.to(tl.int32)


@triton.jit
def strided_below(limit, block, stride, phase):
    """Keys k < limit in strided blocks of this phase (Pattern._strided_below)."""
    period = stride * block
    rest = limit % period - phase * block
    return limit // period * block + tl.minimum(tl.maximum(rest, 0), block)


@triton.jit
def special_below(limit, sink_tokens, block, stride, phase, STRIDED: tl.constexpr):
    """Special keys k < limit, positions within the document."""
    count = tl.minimum(limit, sink_tokens)
    if STRIDED:
        more = strided_below(tl.maximum(limit, sink_tokens), block, stride, phase)
        count += more - strided_below(sink_tokens, block, stride, phase)
    return count


@triton.jit
def special_position(index, sink_tokens, block, stride, phase, STRIDED: tl.constexpr):
    """Position within the document of its special key number `index`: sinks, then strided."""
    if STRIDED:
        strided = index - sink_tokens + strided_below(sink_tokens, block, stride, phase)
        place = (strided // block * stride + phase) * block + strided % block
        return tl.where(index < sink_tokens, index, place)
    return index


@triton.jit
def is_special(position, sink_tokens, block, stride, phase, STRIDED: tl.constexpr):
    """Whether every later query of the document sees the key at this position of it."""
    seen = position < sink_tokens
    if STRIDED:
        seen = seen | ((position // block) % stride == phase)
    return seen


@triton.jit
def key_tiles(
    first_row,
    stop_row,
    first_start,
    last_start,
    sink_tokens,
    window,
    block,
    stride,
    phase,
    STRIDED: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """How queries [first_row, stop_row) walk their keys.

    Returns:
        (special keys, tiles of them, first key of the window, its tiles, the first of its tiles
        that every query sees whole, the number of such tiles).
    """
    near = tl.maximum(first_row - window + 1, first_start)
    special = special_below(near - first_start, sink_tokens, block, stride, phase, STRIDED)
    tiles = tl.cdiv(stop_row - near, TILE_K)
    whole = tl.cdiv(tl.maximum(stop_row - window - near, 0), TILE_K)
    count = tl.maximum((first_row + 1 - near) // TILE_K - whole, 0)
    count = tl.where(first_start == last_start, count, 0)
    return special, tl.cdiv(special, TILE_K), near, tiles, whole, count


@triton.jit
def masked_tile(
    number,
    rows_M,
    row_starts_M,
    stop_row,
    first_start,
    special,
    special_tiles,
    near,
    whole,
    whole_count,
    sink_tokens,
    window,
    block,
    stride,
    phase,
    STRIDED: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """(keys [K], visible [M, K]) of the tile of that number among special tiles, then those of the
    window that not every query sees whole."""
    lanes = tl.arange(0, TILE_K)
    of_special = number < special_tiles
    index = number * TILE_K + lanes
    place = special_position(index, sink_tokens, block, stride, phase, STRIDED)
    tile = number - special_tiles
    tile = tl.where(tile < whole, tile, tile + whole_count)
    keys = tl.where(of_special, first_start + place, near + tile * TILE_K + lanes)
    there = tl.where(of_special, index < special, keys < stop_row)
    keys = tl.where(there, keys, first_start)
    # A key's document begins where the last row's does that begins no later than the key.
    row_starts = row_starts_M[:, None]
    starts_K = tl.max(tl.where(row_starts <= keys[None, :], row_starts, first_start), 0)
    special_K = is_special(keys - starts_K, sink_tokens, block, stride, phase, STRIDED)
    distance = rows_M[:, None] - keys[None, :]
    seen = ((distance < window) | special_K[None, :]) & (distance >= 0)
    return keys, seen & (starts_K[None, :] == row_starts) & there[None, :]


@triton.jit
def whole_special_tiles(special, first_start, last_start, RUN: tl.constexpr, TILE_K: tl.constexpr):
    """Tiles of special keys that need no mask: one run of keys each, which all queries see.

    RUN is the pattern's block where sinks and blocks are multiples of TILE_K, else 0.
    """
    count = special * 0
    if RUN > 0:
        count = tl.where(first_start == last_start, special // TILE_K, 0)
    return count


@triton.jit
def whole_tile(
    number,
    whole_special,
    first_start,
    first_whole,
    sink_tokens,
    skipped,
    stride,
    phase,
    STRIDED: tl.constexpr,
    RUN: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """First key (int64) of the tile of that number among the special ones that need no mask, then
    the window's, from key `first_whole` on. skipped: strided keys among the sink tokens."""
    key = first_whole + (number - whole_special) * TILE_K
    if RUN > 0:
        place = number * TILE_K
        if STRIDED:
            strided = place - sink_tokens + skipped
            # RUN is a constant: no division.
            strided = (strided // RUN * stride + phase) * RUN + strided % RUN
            place = tl.where(place < sink_tokens, place, strided)
        key = tl.where(number < whole_special, first_start + place, key)
    return key.to(tl.int64)


@triton.jit
def load_rows(
    ptr,
    rows,
    row_stride,
    there,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows of a matrix [., H] as [., PADDED_DIM], zero beyond H and where not `there` (None: all).

    COMPUTE is the dtype of the products: the inputs' own, float32 in the interpreter.
    """
    dims = tl.arange(0, PADDED_DIM)
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    if HEAD_DIM < PADDED_DIM:
        inside = (dims < HEAD_DIM)[None, :]
        if there is not None:
            inside = inside & there[:, None]
        values = tl.load(at, mask=inside, other=0.0)
    elif there is not None:
        values = tl.load(at, mask=there[:, None], other=0.0)
    else:
        values = tl.load(at)
    return values.to(COMPUTE)


@triton.jit
def store_rows(
    ptr, rows, row_stride, there, values, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """The counterpart of load_rows, in the dtype of the memory."""
    dims = tl.arange(0, PADDED_DIM)
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    inside = (dims < HEAD_DIM)[None, :]
    if there is not None:
        inside = inside & there[:, None]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_keys(
    scores_MK,
    v_KH,
    highest_M,
    total_M,
    out_MH,
    scale_log2,
    MASKED: tl.constexpr,
):
    """Online softmax: (highest raw score, sum of exponentials, weighted values) with these keys."""
    higher_M = tl.maximum(highest_M, tl.max(scores_MK, 1))
    shift_M = higher_M * scale_log2
    if MASKED:
        # A row that has seen no key yet has no highest score to subtract.
        shift_M = tl.where(higher_M == float("-inf"), 0.0, shift_M)
    p = tl.exp2(scores_MK * scale_log2 - shift_M[:, None])
    shrink_M = tl.exp2(highest_M * scale_log2 - shift_M)
    total_M = total_M * shrink_M + tl.sum(p, 1)
    out_MH = out_MH * shrink_M[:, None]
    out_MH = tl.dot(p.to(v_KH.dtype), v_KH, out_MH, input_precision="tf32x3")
    return higher_M, total_M, out_MH


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sparse_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    out_stride_t,
    out_stride_n,
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
    """out [T, N, H] and the natural-log LSE [N, T]."""
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // ratio
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, stride, PER_HEAD)
    q_ptr += head * q_stride_n
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
    lanes = tl.arange(0, TILE_K)
    scale_log2 = scale * LOG2E
    highest_M = tl.full([TILE_M], float("-inf"), tl.float32)
    total_M = tl.zeros([TILE_M], tl.float32)
    out_MH = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    walk = (stop_row, first_start, special, special_tiles, near, whole, whole_count)
    for number in range(whole_special, special_tiles + tiles - whole_count):
        keys, seen = masked_tile(number, rows_M, row_starts_M, *walk, *pattern, STRIDED, TILE_K)
        k_KH = load_rows(k_ptr, keys, k_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        v_KH = load_rows(v_ptr, keys, v_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        scores = tl.dot(q_MH, tl.trans(k_KH), input_precision="tf32x3")
        scores = tl.where(seen, scores, float("-inf"))
        highest_M, total_M, out_MH = _add_keys(
            scores, v_KH, highest_M, total_M, out_MH, scale_log2, True
        )
    skipped = strided_below(sink_tokens, block, stride, phase)
    runs = (whole_special, first_start, near + whole * TILE_K, sink_tokens, skipped, stride, phase)
    for number in range(whole_special + whole_count):
        key = whole_tile(number, *runs, STRIDED, RUN, TILE_K)
        k_at, v_at = k_ptr + key * k_stride_t, v_ptr + key * v_stride_t
        k_KH = load_rows(k_at, lanes, k_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        v_KH = load_rows(v_at, lanes, v_stride_t, None, HEAD_DIM, PADDED_DIM, COMPUTE)
        scores = tl.dot(q_MH, tl.trans(k_KH), input_precision="tf32x3")
        highest_M, total_M, out_MH = _add_keys(
            scores, v_KH, highest_M, total_M, out_MH, scale_log2, False
        )
    # Rows beyond the last token may have seen no key; they are not stored.
    total_M = tl.where(row_there, total_M, 1.0)
    out_ptr += head * out_stride_n
    out_MH = out_MH / total_M[:, None]
    store_rows(out_ptr, rows_M, out_stride_t, row_there, out_MH, HEAD_DIM, PADDED_DIM)
    lse_M = highest_M * scale + tl.log2(total_M) / LOG2E
    tl.store(lse_ptr + head * tokens + rows_M, lse_M, mask=row_there)

"""Attention of one or a few new tokens over a cache's slots: split over the keys, merged by LSE.

A step of decoding reads every live key once, so memory sets its time. The query heads of a KV head
and the new tokens share one tile of queries: no key is read twice. Positions tell which slots a
query sees, so that slots may lie in any order (a ring, rows of different lengths, empty slots);
where every query sees every slot there are none, and nothing but keys and values is read. Nothing
depends on the host's knowledge of lengths: a CUDA graph captured once serves every step.

Shapes: B rows, L new tokens, N query heads, G KV heads, R = N / G, P heads whose positions differ
(1 or G), S slots, H head dim, M = L * R queries of a tile, padded, K keys of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .cached import (
    LN2,
    LOG2E,
    add_values,
    check_positions,
    check_shapes,
    pattern_constants,
    readable,
    see_keys,
    whole_vectors,
)
from .call import register_operator
from .pattern import Pattern

MOST_QUERIES = 128


class Settings(NamedTuple):
    """How a tile is worked on."""

    tile_k: int
    num_warps: int
    num_stages: int


# By the padded number of queries of a tile.
SETTINGS = {
    16: Settings(tile_k=64, num_warps=4, num_stages=4),
    32: Settings(tile_k=64, num_warps=4, num_stages=3),
    64: Settings(tile_k=64, num_warps=4, num_stages=3),
    128: Settings(tile_k=64, num_warps=8, num_stages=3),
}
# float32's dots run on the plain units and take many registers.
WIDE_SETTINGS = {
    16: Settings(tile_k=64, num_warps=4, num_stages=2),
    32: Settings(tile_k=32, num_warps=8, num_stages=2),
    64: Settings(tile_k=32, num_warps=8, num_stages=2),
    128: Settings(tile_k=32, num_warps=16, num_stages=2),
}
# Programs that fill a large GPU, and the fewest slots worth one.
PROGRAMS, LEAST_SLOTS = 528, 256
# Splits that the merge takes at a time.
MERGED_SPLITS = 32


@triton.jit(do_not_specialize=["new_tokens", "slots", "splits", "first_kv_head", "total_kv_heads"])
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_positions_ptr,
    k_positions_ptr,
    slots_used_ptr,
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    out_lse_ptr,
    new_tokens,
    slots,
    splits,
    kv_heads,
    ratio,
    position_heads,
    q_stride_b: tl.int64,
    q_stride_l,
    q_stride_n,
    k_stride_b: tl.int64,
    k_stride_g: tl.int64,
    v_stride_b: tl.int64,
    v_stride_g: tl.int64,
    first_kv_head,
    total_kv_heads,
    scale_log2,
    sink_tokens,
    window,
    K_STRIDE_S: tl.constexpr,
    V_STRIDE_S: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FULL: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of one KV head of one row.

    Writes partial [B, G, splits, L * R, H] float32 and its LSE in powers of two; where there is but
    one split, out [B, L, N, H] and the natural LSE [B, L, N] themselves.
    """
    row_head = tl.program_id(0)
    split = tl.program_id(1)
    row = (row_head // kv_heads).to(tl.int64)
    kv_head = row_head % kv_heads
    phase = 0
    if PER_HEAD:
        phase = (first_kv_head + kv_head) * STRIDE // total_kv_heads
    lanes_M = tl.arange(0, TILE_M)
    there_M = lanes_M < new_tokens * ratio
    token_M = tl.minimum(lanes_M // ratio, new_tokens - 1)
    head_M = kv_head * ratio + lanes_M % ratio
    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < HEAD_DIM
    q_at = token_M[:, None] * q_stride_l + head_M[:, None] * q_stride_n + dims[None, :]
    q_mask = there_M[:, None] & in_dim[None, :]
    q_MH = tl.load(q_ptr + row * q_stride_b + q_at, mask=q_mask, other=0.0)
    if MASKED:
        q_positions_ptr += row * new_tokens
        k_positions_ptr += (row * position_heads + kv_head % position_heads) * slots
        positions_M = tl.load(q_positions_ptr + token_M).to(tl.int32)
    used = slots
    if RAGGED:
        used = tl.minimum(tl.load(slots_used_ptr + row).to(tl.int32), slots)

    # The splits of a row are equal to within a tile, whatever its length.
    tiles = tl.cdiv(used, TILE_K)
    first = split * tiles // splits
    stop = (split + 1) * tiles // splits
    lanes_K = tl.arange(0, TILE_K)
    k_ptr += row * k_stride_b + kv_head * k_stride_g
    v_ptr += row * v_stride_b + kv_head * v_stride_g
    k_at = lanes_K[:, None] * K_STRIDE_S + dims[None, :]
    v_at = lanes_K[:, None] * V_STRIDE_S + dims[None, :]
    highest_M = tl.full([TILE_M], float("-inf"), tl.float32)
    total_M = tl.zeros([TILE_M], tl.float32)
    out_MH = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    for tile in range(first, stop):
        slot_K = tile * TILE_K + lanes_K
        base = tl.cast(tile, tl.int64) * TILE_K
        in_use_K = slot_K < used
        mask = in_use_K[:, None] & in_dim[None, :]
        k_KH = tl.load(k_ptr + base * K_STRIDE_S + k_at, mask=mask, other=0.0)
        v_KH = tl.load(v_ptr + base * V_STRIDE_S + v_at, mask=mask, other=0.0)
        seen = in_use_K[None, :] & there_M[:, None]
        if MASKED:
            key_K = tl.load(k_positions_ptr + slot_K, mask=in_use_K, other=-1).to(tl.int32)
            seen = see_keys(positions_M, key_K, phase, sink_tokens, window, FULL, BLOCK, STRIDE)
        scores = tl.dot(q_MH, tl.trans(k_KH), input_precision=PRECISION)
        scores = tl.where(seen, scores, float("-inf"))
        highest_M, total_M, out_MH = add_values(
            scores, v_KH, highest_M, total_M, out_MH, scale_log2, PRECISION
        )

    # A split without a visible key leaves zeros with an LSE of -inf.
    whole_M = tl.where(total_M > 0, total_M, 1.0)
    out_MH = out_MH / whole_M[:, None]
    lse_M = highest_M + tl.log2(whole_M)
    if splits == 1:
        at_M = (row * new_tokens + token_M) * kv_heads * ratio + head_M
        out = out_MH.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at_M[:, None] * HEAD_DIM + dims[None, :], out, mask=q_mask)
        tl.store(out_lse_ptr + at_M, lse_M * LN2, mask=there_M)
    else:
        at_M = (row_head.to(tl.int64) * splits + split) * new_tokens * ratio + lanes_M
        tl.store(partial_ptr + at_M[:, None] * HEAD_DIM + dims[None, :], out_MH, mask=q_mask)
        tl.store(partial_lse_ptr + at_M, lse_M, mask=there_M)


@triton.jit(do_not_specialize=["new_tokens", "splits"])
def merge_splits_kernel(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    out_lse_ptr,
    new_tokens,
    splits,
    heads,
    ratio,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """The splits of one query of one head, in order: the same bits at every run."""
    query = tl.program_id(0)
    row_token = query // heads
    head = query % heads
    queries = new_tokens * ratio
    row_head = row_token // new_tokens * (heads // ratio) + head // ratio
    of_tile = row_token % new_tokens * ratio + head % ratio
    partial_at = row_head.to(tl.int64) * splits * queries + of_tile
    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < HEAD_DIM
    highest = float("-inf")
    total = 0.0
    out_H = tl.zeros([PADDED_DIM], tl.float32)
    for first in range(0, splits, TILE_S):
        split_S = first + tl.arange(0, TILE_S)
        there_S = split_S < splits
        at_S = partial_at + split_S * queries
        lse_S = tl.load(partial_lse_ptr + at_S, mask=there_S, other=float("-inf"))
        mask = there_S[:, None] & in_dim[None, :]
        part_at = partial_ptr + at_S[:, None] * HEAD_DIM + dims[None, :]
        part_SH = tl.load(part_at, mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(lse_S, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight_S = tl.exp2(lse_S - shift)
        shrink = tl.exp2(highest - shift)
        out_H = out_H * shrink + tl.sum(part_SH * weight_S[:, None], 0)
        total = total * shrink + tl.sum(weight_S, 0)
        highest = higher
    whole = tl.where(total > 0, total, 1.0)
    out = (out_H / whole).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query.to(tl.int64) * HEAD_DIM + dims, out, mask=in_dim)
    tl.store(out_lse_ptr + query, (highest + tl.log2(whole)) * LN2)


def _run(
    q_BLNH,
    k_BGSH,
    v_BGSH,
    q_positions_BL,
    k_positions_BPS,
    slots_used_B,
    sink_tokens,
    window,
    block,
    stride,
    phase,
    first_kv_head,
    total_kv_heads,
    scale,
):
    out = torch.empty_like(q_BLNH, memory_format=torch.contiguous_format)
    # A view of a larger projection is read as it lies.
    if not whole_vectors(q_BLNH):
        q_BLNH = q_BLNH.contiguous()
    tensors = {"q": q_BLNH, "k": k_BGSH, "v": v_BGSH}
    q_BLNH, k_BGSH, v_BGSH = readable(decode_attention_kernel, **tensors)
    pattern = Pattern(sink_tokens, window, block, stride, phase)
    batch, new_tokens, heads, head_dim = q_BLNH.shape
    kv_heads, slots = k_BGSH.shape[1:3]
    ratio = heads // kv_heads
    tile_m = max(16, triton.next_power_of_2(new_tokens * ratio))
    wide = q_BLNH.dtype == torch.float32
    settings = (WIDE_SETTINGS if wide else SETTINGS)[tile_m]
    splits = max(1, min(PROGRAMS // (batch * kv_heads), slots // LEAST_SLOTS))
    masked, ragged = k_positions_BPS is not None, slots_used_B is not None
    out_lse = q_BLNH.new_empty(q_BLNH.shape[:3], dtype=torch.float32)
    partial_shape = (batch, kv_heads, splits, new_tokens * ratio)
    partial = q_BLNH.new_empty(*partial_shape, head_dim, dtype=torch.float32)
    partial_lse = q_BLNH.new_empty(partial_shape, dtype=torch.float32)
    dims = {"HEAD_DIM": head_dim, "PADDED_DIM": triton.next_power_of_2(head_dim)}
    decode_attention_kernel[(batch * kv_heads, splits)](
        q_BLNH,
        k_BGSH,
        v_BGSH,
        q_positions_BL.contiguous() if masked else q_BLNH,
        k_positions_BPS.contiguous() if masked else q_BLNH,
        slots_used_B.contiguous() if ragged else q_BLNH,
        partial,
        partial_lse,
        out,
        out_lse,
        new_tokens,
        slots,
        splits,
        kv_heads,
        ratio,
        k_positions_BPS.shape[1] if masked else 1,
        *q_BLNH.stride()[:3],
        *k_BGSH.stride()[:2],
        *v_BGSH.stride()[:2],
        first_kv_head,
        total_kv_heads,
        scale * LOG2E,
        sink_tokens,
        window or 0,
        K_STRIDE_S=k_BGSH.stride(2),
        V_STRIDE_S=v_BGSH.stride(2),
        MASKED=masked,
        RAGGED=ragged,
        TILE_M=tile_m,
        TILE_K=settings.tile_k,
        PRECISION="ieee" if wide else "tf32",
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        **pattern_constants(pattern),
        **dims,
    )
    if splits > 1:
        merge_splits_kernel[(batch * new_tokens * heads,)](
            partial,
            partial_lse,
            out,
            out_lse,
            new_tokens,
            splits,
            heads,
            ratio,
            TILE_S=MERGED_SPLITS,
            **dims,
        )
    return out, out_lse


def _fake(q_BLNH, *others):
    return q_BLNH.new_empty(q_BLNH.shape), q_BLNH.new_empty(q_BLNH.shape[:3], dtype=torch.float32)


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? q_positions, Tensor? k_positions, "
    "Tensor? slots_used, int sink_tokens, int? window, int block, int? stride, str phase, "
    "int first_kv_head, int total_kv_heads, float scale) -> (Tensor, Tensor)"
)
_decode = register_operator("decode_attention", _run, _fake, SCHEMA)


def decode_attention(
    q_BLNH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: Pattern,
    q_positions_BL: torch.Tensor | None = None,
    k_positions_BPS: torch.Tensor | None = None,
    *,
    slots_used_B: torch.Tensor | None = None,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of new tokens over a cache that already holds their own keys.

    A custom op (longgen::decode_attention) that never waits for the device: it may be captured in a
    CUDA graph, after one call that compiles it. No gradients: a backward through it is an error.

    Args:
        q_BLNH: queries [B, L, N, H] after RoPE; L * N / G is at most 128.
        k_BGSH, v_BGSH: the slots [B, G, S, H], in any order; any strides with H innermost.
        pattern: who sees whom.
        q_positions_BL: positions of the new tokens, -1 for padding; None, as k_positions_BPS, where
            every query sees every slot (in use), whatever the pattern.
        k_positions_BPS: positions of the slots, -1 for an empty one; P is 1 or G.
        slots_used_B: how many slots of each row are in use: those from there on are not read.
            None for all. On the device, so that a cache may grow under a captured graph.
        first_kv_head, total_kv_heads: where this shard's KV heads lie in the whole model's, which
            decides per-head phases; by default the shard is the whole.
        softmax_scale: by default 1 / sqrt(H).

    Returns:
        out [B, L, N, H] in q's dtype and the natural-log LSE [B, L, N] in float32; zeros and -inf
        where a query sees no key (padding).

    Raises:
        ValueError: for shapes, dtypes, devices or strides that do not fit, one of the two positions
            without the other, or more queries than one tile takes.
    """
    total = k_BGSH.shape[1] if total_kv_heads is None else total_kv_heads
    scale = q_BLNH.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    check_shapes(q_BLNH, k_BGSH, v_BGSH, first_kv_head, total, scale)
    (batch, new_tokens, heads), (kv_heads, slots) = q_BLNH.shape[:3], k_BGSH.shape[1:3]
    if new_tokens * heads // kv_heads > MOST_QUERIES:
        raise ValueError(
            f"{new_tokens} new tokens of {heads // kv_heads} query heads a KV head: at most "
            f"{MOST_QUERIES} queries in all; use chunk_attention"
        )
    if (q_positions_BL is None) != (k_positions_BPS is None):
        missing = "q_positions_BL" if q_positions_BL is None else "k_positions_BPS"
        raise ValueError(f"{missing} is missing: pass positions of both queries and slots, or none")
    if q_positions_BL is not None:
        check_positions("q_positions_BL", q_positions_BL, ((batch, new_tokens),), q_BLNH.device)
        legal = ((batch, 1, slots), (batch, kv_heads, slots))
        check_positions("k_positions_BPS", k_positions_BPS, legal, q_BLNH.device)
    if slots_used_B is not None:
        check_positions("slots_used_B", slots_used_B, ((batch,),), q_BLNH.device)
    return _decode(
        q_BLNH,
        k_BGSH,
        v_BGSH,
        q_positions_BL,
        k_positions_BPS,
        slots_used_B,
        pattern.sink_tokens,
        pattern.window,
        pattern.block,
        pattern.stride,
        pattern.phase,
        first_kv_head,
        total,
        scale,
    )

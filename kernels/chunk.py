"""Chunked prefill: a chunk of new tokens attends to a cache's slots and to its own keys.

A tile of queries walks tiles of slots: those of its window, and before them only those that hold
sinks or strided blocks. Two short lists say which: of the tiles with such keys, and of the span of
each tile of queries. Both are built on the device from the positions; nothing has the size of
queries x slots. Slots may hold positions in any order: ascending ones make the walk short.

Shapes: B rows, L new tokens, N query heads, G KV heads, P heads whose positions differ (1 or G),
S slots, H head dim, M queries and K keys of a tile, T tiles of slots, U tiles of queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
)
from .call import register_operator
from .pattern import Pattern

# Beyond every position.
FAR = tl.constexpr(2**30)


class Settings(NamedTuple):
    """How a tile is worked on."""

    tile_m: int
    tile_k: int
    num_warps: int
    num_stages: int


# The first whose tile holds all queries, or the last.
SETTINGS = (Settings(16, 64, 4, 3), Settings(64, 64, 4, 3), Settings(128, 64, 8, 3))
# float32's dots run on the plain units, in smaller tiles.
WIDE_SETTINGS = (Settings(32, 64, 4, 2),)


@triton.jit(do_not_specialize=["new_tokens", "slots", "tiles", "first_kv_head", "total_kv_heads"])
def chunk_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_positions_ptr,
    k_positions_ptr,
    newest_ptr,
    oldest_ptr,
    always_ptr,
    walks_ptr,
    out_ptr,
    lse_ptr,
    new_tokens,
    slots,
    tiles,
    heads,
    ratio,
    plan_heads,
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
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of one head of one row: out [B, L, N, H] and its natural LSE [B, L, N]."""
    query_tile = tl.program_id(0)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    kv_head = head // ratio
    phase = 0
    if PER_HEAD:
        phase = (first_kv_head + kv_head) * STRIDE // total_kv_heads
    query_M = query_tile * TILE_M + tl.arange(0, TILE_M)
    there_M = query_M < new_tokens
    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < HEAD_DIM
    q_mask = there_M[:, None] & in_dim[None, :]
    q_ptr += row * q_stride_b + query_tile.to(tl.int64) * TILE_M * q_stride_l + head * q_stride_n
    q_at = tl.arange(0, TILE_M)[:, None] * q_stride_l + dims[None, :]
    q_MH = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)
    positions_M = tl.load(q_positions_ptr + row * new_tokens + query_M, mask=there_M, other=-1)
    positions_M = positions_M.to(tl.int32)
    lowest = tl.min(tl.where(positions_M < 0, FAR, positions_M))
    uppermost = tl.max(positions_M)

    plan = row * plan_heads + kv_head % plan_heads
    walk_ptr = walks_ptr + (plan * tl.num_programs(0) + query_tile) * 3
    always = tl.load(walk_ptr)
    near = tl.load(walk_ptr + 1)
    near_tiles = tl.load(walk_ptr + 2)
    newest_ptr += plan * tiles
    oldest_ptr += plan * tiles
    always_ptr += plan * tiles
    k_positions_ptr += plan * tiles * TILE_K
    k_ptr += row * k_stride_b + kv_head * k_stride_g
    v_ptr += row * v_stride_b + kv_head * v_stride_g
    lanes_K = tl.arange(0, TILE_K)
    k_at = lanes_K[:, None] * K_STRIDE_S + dims[None, :]
    v_at = lanes_K[:, None] * V_STRIDE_S + dims[None, :]
    highest_M = tl.full([TILE_M], float("-inf"), tl.float32)
    total_M = tl.zeros([TILE_M], tl.float32)
    out_MH = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    for number in range(always + near_tiles):
        tile = near + number - always
        if not FULL:
            listed = tl.load(always_ptr + number, mask=number < always, other=0)
            tile = tl.where(number < always, listed, tile)
        base = tile.to(tl.int64) * TILE_K
        mask = (tile * TILE_K + lanes_K < slots)[:, None] & in_dim[None, :]
        k_KH = tl.load(k_ptr + base * K_STRIDE_S + k_at, mask=mask, other=0.0)
        v_KH = tl.load(v_ptr + base * V_STRIDE_S + v_at, mask=mask, other=0.0)
        scores = tl.dot(q_MH, tl.trans(k_KH), input_precision=PRECISION)
        # Padding among the queries has no say: what it would see is thrown away below.
        some_unseen = tl.load(newest_ptr + tile) > lowest
        if not FULL:
            some_unseen = some_unseen | (uppermost - tl.load(oldest_ptr + tile) >= window)
        if some_unseen:
            key_K = tl.load(k_positions_ptr + base + lanes_K)
            seen = see_keys(positions_M, key_K, phase, sink_tokens, window, FULL, BLOCK, STRIDE)
            scores = tl.where(seen, scores, float("-inf"))
        highest_M, total_M, out_MH = add_values(
            scores, v_KH, highest_M, total_M, out_MH, scale_log2, PRECISION
        )

    # Queries that see nothing, padding among them, get zeros with an LSE of -inf.
    some_M = (total_M > 0) & (positions_M >= 0)
    whole_M = tl.where(some_M, total_M, 1.0)
    out_MH = tl.where(some_M[:, None], out_MH / whole_M[:, None], 0.0)
    lse_M = tl.where(some_M, (highest_M + tl.log2(whole_M)) * LN2, float("-inf"))
    at_M = (row * new_tokens + query_M) * heads + head
    out = out_MH.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at_M[:, None] * HEAD_DIM + dims[None, :], out, mask=q_mask)
    tl.store(lse_ptr + at_M, lse_M, mask=there_M)


class Plan(NamedTuple):
    """What the kernel walks, int32; heads: G where positions or phases differ by head, else 1.

    k_positions: [B, heads, T * K], -1 for empty slots and beyond the last.
    newest: of each tile of slots [B, heads, T] its last position; FAR where a slot is empty.
    oldest: its first position; FAR where sinks or strided blocks fill it: no window cuts it.
    always: [B, heads, T] the tiles that hold sinks or strided blocks, in order; then the others.
    walks: [B, heads, U, 3] of each tile of queries: how many of `always` it walks, the first tile
        of its window, and how many tiles from there.
    """

    k_positions: torch.Tensor
    newest: torch.Tensor
    oldest: torch.Tensor
    always: torch.Tensor
    walks: torch.Tensor


def _tiled(positions: torch.Tensor, tile: int) -> torch.Tensor:
    """[..., X] to int32 [..., tiles, tile], padded with -1."""
    padding = -positions.shape[-1] % tile
    return F.pad(positions.to(torch.int32), (0, padding), value=-1).unflatten(-1, (-1, tile))


def plan_chunk(
    pattern: Pattern,
    q_positions_BL: torch.Tensor,
    k_positions_BPS: torch.Tensor,
    kv_heads: int,
    first_kv_head: int,
    total_kv_heads: int,
    tile_m: int,
    tile_k: int,
) -> Plan:
    """The plan of one chunk, made on the positions' device without waiting for it."""
    far = FAR.value
    if pattern.heads_differ:
        k_positions_BPS = k_positions_BPS.expand(-1, kv_heads, -1)
    k = _tiled(k_positions_BPS, tile_k)
    empty = k < 0
    newest = k.amax(-1)
    oldest = k.masked_fill(empty, far).amin(-1)
    always = (k < pattern.sink_tokens) & ~empty
    if pattern.stride is not None:
        head = first_kv_head + torch.arange(k.shape[1], device=k.device).view(1, -1, 1, 1)
        phase = head * pattern.stride // total_kv_heads if pattern.heads_differ else 0
        always |= ((k // pattern.block) % pattern.stride == phase) & ~empty
    q = _tiled(q_positions_BL, tile_m)[:, None].expand(-1, k.shape[1], -1, -1)
    lowest, uppermost = q.masked_fill(q < 0, far).amin(-1), q.amax(-1)
    # The window's tiles: from the first that reaches it to the last that begins before its end.
    after = torch.searchsorted(
        oldest.flip(-1).cummin(-1).values.flip(-1).contiguous(), uppermost.contiguous(), right=True
    )
    if pattern.is_full:
        near, listed = torch.zeros_like(after), torch.zeros_like(after)
    else:
        start = (lowest - pattern.window + 1).clamp(min=0)
        near = torch.searchsorted(newest.cummax(-1).values.contiguous(), start.contiguous())
        near = near.minimum(after)
        before = F.pad(always.any(-1).cumsum(-1), (1, 0))
        listed = before.gather(-1, near)
    return Plan(
        k.flatten(-2).contiguous(),
        newest.masked_fill(empty.any(-1), far),
        oldest.masked_fill(always.all(-1), far),
        (~always.any(-1)).int().argsort(dim=-1, stable=True).to(torch.int32),
        torch.stack((listed, near, after - near), -1).to(torch.int32),
    )


def _run(
    q_BLNH,
    k_BGSH,
    v_BGSH,
    q_positions_BL,
    k_positions_BPS,
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
    tensors = {"q": q_BLNH.contiguous(), "k": k_BGSH, "v": v_BGSH}
    q_BLNH, k_BGSH, v_BGSH = readable(chunk_attention_kernel, **tensors)
    pattern = Pattern(sink_tokens, window, block, stride, phase)
    batch, new_tokens, heads, head_dim = q_BLNH.shape
    kv_heads, slots = k_BGSH.shape[1:3]
    wide = q_BLNH.dtype == torch.float32
    choices = WIDE_SETTINGS if wide else SETTINGS
    settings = next((s for s in choices if s.tile_m >= new_tokens), choices[-1])
    tile_m, tile_k = settings.tile_m, settings.tile_k
    shard = kv_heads, first_kv_head, total_kv_heads
    plan = plan_chunk(pattern, q_positions_BL, k_positions_BPS, *shard, tile_m, tile_k)
    lse = q_BLNH.new_empty(q_BLNH.shape[:3], dtype=torch.float32)
    chunk_attention_kernel[(triton.cdiv(new_tokens, tile_m), batch * heads)](
        q_BLNH,
        k_BGSH,
        v_BGSH,
        q_positions_BL.contiguous(),
        *plan,
        out,
        lse,
        new_tokens,
        slots,
        plan.newest.shape[2],
        heads,
        heads // kv_heads,
        plan.newest.shape[1],
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
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE_M=tile_m,
        TILE_K=tile_k,
        PRECISION="ieee" if wide else "tf32",
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        **pattern_constants(pattern),
    )
    return out, lse


def _fake(q_BLNH, *others):
    return q_BLNH.new_empty(q_BLNH.shape), q_BLNH.new_empty(q_BLNH.shape[:3], dtype=torch.float32)


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor q_positions, Tensor k_positions, "
    "int sink_tokens, int? window, int block, int? stride, str phase, "
    "int first_kv_head, int total_kv_heads, float scale) -> (Tensor, Tensor)"
)
_chunk = register_operator("chunk_attention", _run, _fake, SCHEMA)


def chunk_attention(
    q_BLNH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: Pattern,
    q_positions_BL: torch.Tensor,
    k_positions_BPS: torch.Tensor,
    *,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk of new tokens over cached keys and the chunk's own, each in a slot.

    A custom op (longgen::chunk_attention) that never waits for the device. Its time follows the
    pairs that the pattern needs, not L * S. No gradients: a backward through it is an error.

    Args:
        q_BLNH: queries [B, L, N, H] after RoPE, any number.
        k_BGSH, v_BGSH: the slots [B, G, S, H], any strides with H innermost; fastest where each
            row's positions ascend, empty slots aside.
        pattern: who sees whom.
        q_positions_BL: positions of the new tokens, -1 for padding.
        k_positions_BPS: positions of the slots, -1 for an empty one; P is 1 or G.
        first_kv_head, total_kv_heads: where this shard's KV heads lie in the whole model's, which
            decides per-head phases; by default the shard is the whole.
        softmax_scale: by default 1 / sqrt(H).

    Returns:
        out [B, L, N, H] in q's dtype and the natural-log LSE [B, L, N] in float32; zeros and -inf
        where a query sees no key (padding).

    Raises:
        ValueError: for shapes, dtypes, devices or strides that do not fit.
    """
    total = k_BGSH.shape[1] if total_kv_heads is None else total_kv_heads
    scale = q_BLNH.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    check_shapes(q_BLNH, k_BGSH, v_BGSH, first_kv_head, total, scale)
    (batch, new_tokens), (kv_heads, slots) = q_BLNH.shape[:2], k_BGSH.shape[1:3]
    check_positions("q_positions_BL", q_positions_BL, ((batch, new_tokens),), q_BLNH.device)
    legal = ((batch, 1, slots), (batch, kv_heads, slots))
    check_positions("k_positions_BPS", k_positions_BPS, legal, q_BLNH.device)
    return _chunk(
        q_BLNH,
        k_BGSH,
        v_BGSH,
        q_positions_BL,
        k_positions_BPS,
        pattern.sink_tokens,
        pattern.window,
        pattern.block,
        pattern.stride,
        pattern.phase,
        first_kv_head,
        total,
        scale,
    )

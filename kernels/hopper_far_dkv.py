"""dK and dV of special keys from the queries behind the window, on Hopper, in Gluon.

A special key (sink token, strided block) is far for the queries at least a window behind it. Tiles
of 128 special keys walk a part of their far queries; each of two consumer warpgroups has 64 of the
keys, and its sums stay in registers until they go to slots of float32, which far_keys adds up.
Special keys come in halves of 64 consecutive keys: first the sinks', then the strided blocks'.

Shapes: T packed tokens, N query heads, G KV heads, R = N / G, H head dim. PATTERN is (sink tokens,
window, block, stride or 0, phases differ by head). `call` is the documents' bounds on the device,
their number, the steps of a bisection among them, T, R, and where the KV heads lie in the whole
model's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .gluon_names import async_load, async_load_elements
from .hopper_walk import (
    CONSUMERS,
    HALF,
    LOG2E,
    NOT_SPECIALIZED,
    PANEL,
    ROWS,
    TILE,
    document_of,
    far_limit,
    head_phase,
    special_place,
)


@gluon.jit
def _far_part(tile, part, kv_head, splits, slot_tiles, call, PATTERN: gl.constexpr):
    """Which far queries this program walks for its tile of special keys.

    The queries behind the window of their document's first key are cut into `splits` ranges, the
    same for every tile, so that programs side by side share what they load; of its range a tile
    walks the queries for which its first key is far.

    Returns:
        first query, the query after the last, head, and the first keys of the tile's halves.
    """
    cu_seqlens, documents, search_steps, tokens, ratio, first_kv_head, total_kv_heads = call
    WINDOW: gl.constexpr = PATTERN[1]
    document = document_of(slot_tiles, documents, search_steps, tile)
    start = gl.load(cu_seqlens + document)
    stop = gl.load(cu_seqlens + document + 1)
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, PATTERN)
    number = (tile - gl.load(slot_tiles + document)) * 2
    key0 = start + special_place(number, phase, PATTERN)
    key1 = start + special_place(number + 1, phase, PATTERN)
    if PATTERN[3] == 0:
        # Behind the sinks no key is special: one that is far for nobody.
        key1 = gl.where(number + 1 < PATTERN[0] // HALF, key1, stop)
    far = start + WINDOW
    chunk = (gl.maximum(stop - far, 0) + splits * ROWS - 1) // (splits * ROWS) * ROWS
    first = far + part // ratio * chunk
    last = gl.minimum(first + chunk, stop)
    first = gl.maximum(first, gl.minimum(key0, stop) + WINDOW)
    return first, last, kv_head * ratio + part % ratio, key0, key1


@gluon.jit
def _far_tiles(first, last, key, PATTERN: gl.constexpr):
    """(tiles of queries, those for which none of the half's keys is far, those where some is not).

    The half begins at `key`; both counts are of the first tiles.
    """
    tiles = (gl.maximum(last - first, 0) + ROWS - 1) // ROWS
    # The last key that is far for the first query.
    reach = first - PATTERN[1]
    idle = gl.minimum(gl.maximum(key - reach, 0) // ROWS, tiles)
    cut = (gl.maximum(key + HALF - 1 - reach, 0) + ROWS - 1) // ROWS
    return tiles, idle, cut


@gluon.jit
def _load_queries(descs, row_ptrs, bufs, barriers, part, call, PATTERN: gl.constexpr):
    q_desc, d_out_desc, k_desc, v_desc = descs
    lse_ptr, delta_ptr = row_ptrs
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs = bufs
    q_ready, q_empty, row_ready, kv_ready = barriers
    first, last, head, kv_head, key0, key1 = part
    tokens = call[3]
    STAGES: gl.constexpr = lse_bufs.type.shape[0]
    PANELS: gl.constexpr = k_bufs.type.shape[0] // CONSUMERS
    D: gl.constexpr = PANELS * PANEL
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    lanes = gl.arange(0, ROWS, layout=LINE)
    tiles, idle, cut = _far_tiles(first, last, key0, PATTERN)
    mbarrier.expect(kv_ready, 2 * CONSUMERS * PANELS * k_desc.block_type.nbytes)
    for c in gl.static_range(PANELS):
        at0 = [key0, kv_head * D + c * PANEL]
        at1 = [key1, kv_head * D + c * PANEL]
        async_load(k_desc, at0, kv_ready, k_bufs.index(c))
        async_load(k_desc, at1, kv_ready, k_bufs.index(PANELS + c))
        async_load(v_desc, at0, kv_ready, v_bufs.index(c))
        async_load(v_desc, at1, kv_ready, v_bufs.index(PANELS + c))
    for m in range(tiles):
        stage = m % STAGES
        row = first + m * ROWS
        bar = q_ready.index(stage)
        mbarrier.wait(q_empty.index(stage), (m // STAGES & 1) ^ 1)
        mbarrier.expect(bar, 2 * PANELS * q_desc.block_type.nbytes)
        for c in gl.static_range(PANELS):
            at = [row, head * D + c * PANEL]
            async_load(q_desc, at, bar, q_bufs.index(stage * PANELS + c))
            async_load(d_out_desc, at, bar, do_bufs.index(stage * PANELS + c))
        row_at = head.to(gl.int64) * tokens + gl.minimum(row + lanes, tokens - 1)
        async_load_elements(lse_bufs.index(stage), lse_ptr + row_at)
        async_load_elements(delta_bufs.index(stage), delta_ptr + row_at)
        async_copy.mbarrier_arrive(row_ready.index(stage), increment_count=False)


@gluon.jit
def _key_products(a_bufs, b_bufs, stage, zero, WG: gl.constexpr, PANELS: gl.constexpr):
    """Starts this warpgroup's keys (or values) times queries (or their gradients), [64, 64]."""
    b_buf = b_bufs.index(stage * PANELS).permute((1, 0))
    token = warpgroup_mma(a_bufs.index(WG * PANELS), b_buf, zero, use_acc=False, is_async=True)
    if PANELS == 2:
        b_buf = b_bufs.index(stage * PANELS + 1).permute((1, 0))
        token = warpgroup_mma(a_bufs.index(WG * PANELS + 1), b_buf, token, is_async=True)
    return token


@gluon.jit
def _consume_queries(
    WG: gl.constexpr,
    slot_ptr,
    bufs,
    barriers,
    part,
    scale,
    PATTERN: gl.constexpr,
):
    """slot_ptr is this warpgroup's first slot in `partial`."""
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs = bufs
    q_ready, q_empty, row_ready, kv_ready = barriers
    first, last, head, kv_head, key0, key1 = part
    STAGES: gl.constexpr = lse_bufs.type.shape[0]
    PANELS: gl.constexpr = k_bufs.type.shape[0] // CONSUMERS
    D: gl.constexpr = PANELS * PANEL
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    zero = gl.zeros([HALF, ROWS], gl.float32, layout=LAYOUT)
    scale_log2 = scale * LOG2E
    key = key0
    if WG == 1:
        key = key1
    tiles, idle, cut = _far_tiles(first, last, key, PATTERN)
    lines = gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
    keys = key + lines
    dk0 = gl.zeros([HALF, PANEL], gl.float32, layout=LAYOUT)
    dk1 = gl.zeros([HALF, PANEL], gl.float32, layout=LAYOUT)
    dv0 = gl.zeros([HALF, PANEL], gl.float32, layout=LAYOUT)
    dv1 = gl.zeros([HALF, PANEL], gl.float32, layout=LAYOUT)
    # Only the other half has keys that are far for these.
    for m in range(idle):
        stage = m % STAGES
        mbarrier.wait(q_ready.index(stage), m // STAGES & 1)
        mbarrier.wait(row_ready.index(stage), m // STAGES & 1)
        mbarrier.arrive(q_empty.index(stage), count=1)
    mbarrier.wait(kv_ready, 0)
    mbarrier.wait(q_ready.index(idle % STAGES), idle // STAGES & 1, pred=idle < tiles)
    # Waited for at once: one that is underway while the sums above are set to zero would make the
    # assembler wait after every product.
    s_token = _key_products(k_bufs, q_bufs, idle % STAGES, zero, WG, PANELS)
    s_token = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[s_token]))
    for m in range(idle, tiles):
        stage = m % STAGES
        row = first + m * ROWS
        s = warpgroup_mma_wait(0, deps=[s_token])
        dp_token = _key_products(v_bufs, do_bufs, stage, zero, WG, PANELS)
        mbarrier.wait(row_ready.index(stage), m // STAGES & 1)
        lse = lse_bufs.index(stage).load(COLUMN) * LOG2E
        p = gl.exp2(s * scale_log2 - lse[None, :])
        if (m < cut) | (row + ROWS > last):
            limit = far_limit(row + gl.arange(0, ROWS, layout=COLUMN), last, PATTERN)
            p = gl.where(keys[:, None] <= limit[None, :], p, 0.0)
        p_a = gl.convert_layout(p.to(q_bufs.dtype), A_LAYOUT)
        dv0 = warpgroup_mma(p_a, do_bufs.index(stage * PANELS), dv0, is_async=True)
        if PANELS == 2:
            dv1 = warpgroup_mma(p_a, do_bufs.index(stage * PANELS + 1), dv1, is_async=True)
        dp = warpgroup_mma_wait(PANELS, deps=[dp_token])
        delta = delta_bufs.index(stage).load(COLUMN)
        ds = (p * (dp - delta[None, :])).to(q_bufs.dtype)
        ds_a = gl.convert_layout(ds, A_LAYOUT)
        dk0 = warpgroup_mma(ds_a, q_bufs.index(stage * PANELS), dk0, is_async=True)
        if PANELS == 2:
            dk1 = warpgroup_mma(ds_a, q_bufs.index(stage * PANELS + 1), dk1, is_async=True)
        # Past the last tile, scores that nobody reads.
        after = (m + 1) % STAGES
        mbarrier.wait(q_ready.index(after), (m + 1) // STAGES & 1, pred=m + 1 < tiles)
        s_token = _key_products(k_bufs, q_bufs, after, s, WG, PANELS)
        if PANELS == 2:
            dk0, dk1, dv0, dv1, p_a, ds_a = warpgroup_mma_wait(
                PANELS, deps=[dk0, dk1, dv0, dv1, p_a, ds_a]
            )
        else:
            dk0, dv0, p_a, ds_a = warpgroup_mma_wait(PANELS, deps=[dk0, dv0, p_a, ds_a])
        mbarrier.arrive(q_empty.index(stage), count=1)
    warpgroup_mma_wait(0, deps=[s_token])
    dims = gl.arange(0, PANEL, layout=gl.SliceLayout(0, LAYOUT))
    at = slot_ptr + (lines * (2 * D))[:, None] + dims[None, :]
    gl.store(at, dk0)
    gl.store(at + D, dv0)
    if PANELS == 2:
        gl.store(at + PANEL, dk1)
        gl.store(at + D + PANEL, dv1)


@gluon.jit(do_not_specialize=[*NOT_SPECIALIZED, "slots", "splits"])
def hopper_bwd_far_dkv_kernel(
    q_desc,
    d_out_desc,
    k_desc,
    v_desc,
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
    ratio,
    first_kv_head,
    total_kv_heads,
    scale,
    HEAD_DIM: gl.constexpr,
    PATTERN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What one part of the far queries adds to dK (without the scale) and dV of special keys.

    partial [G, splits * R, slots, 2, H] in float32: dK and dV side by side. Every slot is written;
    those beyond a document's special keys hold nothing of use and nobody reads them. slot_tiles
    [documents + 1] is the first tile of 128 slots of each document. The grid is (tiles of slots,
    splits * R, G). STAGES is 2 or more.
    """
    dtype: gl.constexpr = q_desc.dtype
    PANELS: gl.constexpr = HEAD_DIM // PANEL
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, ROWS, PANEL], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, ROWS, PANEL], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS * PANELS, HALF, PANEL], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS * PANELS, HALF, PANEL], k_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    row_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
        # Copies of single rows arrive by the producer's 32 threads.
        mbarrier.init(row_ready.index(i), count=32)
    mbarrier.init(kv_ready, count=1)
    fence_async_shared()
    tile = gl.program_id(0)
    each = gl.program_id(1)
    kv_head = gl.program_id(2)
    call = (cu_seqlens, documents, search_steps, tokens, ratio, first_kv_head, total_kv_heads)
    first, last, head, key0, key1 = _far_part(
        tile, each, kv_head, splits, slot_tiles, call, PATTERN
    )
    part = (first, last, head, kv_head, key0, key1)
    slot = (kv_head.to(gl.int64) * splits * ratio + each) * slots + tile * TILE
    slot_ptr0 = partial_ptr + slot * (2 * HEAD_DIM)
    slot_ptr1 = slot_ptr0 + HALF * 2 * HEAD_DIM
    descs = (q_desc, d_out_desc, k_desc, v_desc)
    rows = (lse_ptr, delta_ptr)
    bufs = (q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs)
    barriers = (q_ready, q_empty, row_ready, kv_ready)
    gl.warp_specialize(
        [
            (_consume_queries, (0, slot_ptr0, bufs, barriers, part, scale, PATTERN)),
            (_consume_queries, (1, slot_ptr1, bufs, barriers, part, scale, PATTERN)),
            (_load_queries, (descs, rows, bufs, barriers, part, call, PATTERN)),
        ],
        [4, 1],
        [240, 24],
    )

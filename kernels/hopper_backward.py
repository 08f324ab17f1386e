"""The window's part of the backward on Hopper, in Gluon: dK, dV and dQ of each pair of tiles.

A program draws tiles of 128 keys, one after another, and for each walks the queries of its window,
64 at a time; each consumer warpgroup has 64 of the keys. dK and dV stay in registers. dQ is added
to float32 in memory by TMA, by a warp of its own. Programs walk side by side, so that what they
share stays in the L2 cache. The tiles of keys that meet a tile of queries take turns there, the
last of them first, which is the order in which they are drawn, and so come: the same bits every
time, and the first one stores where the others add, so that nothing need be zeroed. Which program
has which tile depends on who is free, as documents make tiles of very different lengths; a fixed
deal left programs to wait for the longest at every round of turns.

Special keys (sink tokens, strided blocks) before a query's window are left to hopper_far_dq and
hopper_far_dkv.

Shapes: T packed tokens, N query heads, G KV heads, R = N / G, H head dim. `call` is the documents'
bounds on the device, their number, the steps of a bisection among them, and T; `work` the
counter that items (tiles of keys, of a KV head) are drawn from, the tiles of a head, all of them
(items), R, and how many KV heads are walked at once.
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

from .gluon_names import async_add, async_load, async_load_elements, async_store, store_wait
from .hopper_items import draw_item, drawn_item
from .hopper_walk import PANEL
from .hopper_window import DIAGONAL, KEYS, QUERIES, item_place, query_tiles, walk_part


@gluon.jit
def _wait_for_writes(value, PENDING: gl.constexpr):
    """Waits until others see all of this thread's TMA writes but the last PENDING; gives value."""
    if PENDING == 0:
        asm: gl.constexpr = "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, $1;"
    elif PENDING == 1:
        asm: gl.constexpr = "cp.async.bulk.wait_group 1; fence.proxy.async; mov.b32 $0, $1;"
    else:
        asm: gl.constexpr = "cp.async.bulk.wait_group 2; fence.proxy.async; mov.b32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _hidden_zero(it):
    """0, which the compiler cannot know: addresses computed with it are not kept in registers."""
    asm: gl.constexpr = "mov.b32 $0, 0;"
    return gl.inline_asm_elementwise(asm, "=r,r", [it], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _produce(
    descs, row_ptrs, bufs, barriers, work, call, WINDOW: gl.constexpr, PANELS: gl.constexpr
):
    q_desc, d_out_desc, k_desc, v_desc = descs
    lse_ptr, delta_ptr, lowest_ptr = row_ptrs
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs, lowest_bufs, ds_bufs, dq_bufs = bufs[1:]
    q_ready, q_empty, row_ready, kv_ready, kv_empty, ds_ready, ds_empty, dq_ready, dq_empty = (
        barriers[1:]
    )
    ticket_ptr, key_tiles, items, ratio, at_once = work
    tokens = call[3]
    STAGES: gl.constexpr = lse_bufs.type.shape[0]
    D: gl.constexpr = PANELS * PANEL
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    lanes = gl.arange(0, QUERIES, layout=LINE)
    it = 0
    n = 0
    item = draw_item(n, ticket_ptr, barriers[0], bufs[0])
    while item < items:
        tile, kv_head = item_place(item, work)
        first_key = tile * KEYS
        tiles, whole, stop_whole = query_tiles(first_key, call, WINDOW)
        mbarrier.wait(kv_empty, (n & 1) ^ 1)
        mbarrier.expect(kv_ready, 4 * PANELS * k_desc.block_type.nbytes)
        for c in gl.static_range(PANELS):
            for h in gl.static_range(2):
                at = [first_key + h * 64, kv_head * D + c * PANEL]
                k_buf = k_bufs.index(c).slice(h * 64, 64, dim=0)
                v_buf = v_bufs.index(c).slice(h * 64, 64, dim=0)
                async_load(k_desc, at, kv_ready, k_buf)
                async_load(v_desc, at, kv_ready, v_buf)
        for part in range(2 * ratio):
            head = kv_head * ratio + part % ratio
            first, stop = walk_part(part, tiles, ratio)
            for m in range(first, stop):
                stage = it % STAGES
                first_row = first_key + m * QUERIES
                bar = q_ready.index(stage)
                mbarrier.wait(q_empty.index(stage), (it // STAGES & 1) ^ 1)
                mbarrier.expect(bar, 2 * PANELS * q_desc.block_type.nbytes)
                for c in gl.static_range(PANELS):
                    at = [first_row, head * D + c * PANEL]
                    q_buf = q_bufs.index(stage * PANELS + c)
                    do_buf = do_bufs.index(stage * PANELS + c)
                    async_load(q_desc, at, bar, q_buf)
                    async_load(d_out_desc, at, bar, do_buf)
                row_at = head.to(gl.int64) * tokens + first_row + lanes
                there = first_row + lanes < tokens
                async_load_elements(lse_bufs.index(stage), lse_ptr + row_at, mask=there)
                async_load_elements(delta_bufs.index(stage), delta_ptr + row_at, mask=there)
                async_load_elements(
                    lowest_bufs.index(stage), lowest_ptr + first_row + lanes, mask=there
                )
                async_copy.mbarrier_arrive(row_ready.index(stage), increment_count=False)
                it += 1
        n += 1
        item = draw_item(n, ticket_ptr, barriers[0], bufs[0])


@gluon.jit
def _scores(a_bufs, b_bufs, stage, spare, first, WG: gl.constexpr, PANELS: gl.constexpr):
    """Starts this warpgroup's keys (or values) times queries (or their gradients), [64, 64].

    They come to lie in the registers of `spare`; `first` is 0.
    """
    a_buf = a_bufs.index(first).slice(WG * 64, 64, dim=0)
    b_buf = b_bufs.index(stage * PANELS).permute((1, 0))
    token = warpgroup_mma(a_buf, b_buf, spare, use_acc=False, is_async=True)
    if PANELS == 2:
        a_buf = a_bufs.index(first + 1).slice(WG * 64, 64, dim=0)
        b_buf = b_bufs.index(stage * PANELS + 1).permute((1, 0))
        token = warpgroup_mma(a_buf, b_buf, token, is_async=True)
    return token


@gluon.jit
def _next_scores(it, last, k_bufs, q_bufs, q_ready, spare, WG: gl.constexpr, PANELS: gl.constexpr):
    """Starts the scores of the next tile of queries, or, past the last, some that nobody reads."""
    STAGES: gl.constexpr = q_bufs.type.shape[0] // PANELS
    mbarrier.wait(q_ready.index(it % STAGES), it // STAGES & 1, pred=it < last)
    stage = it % STAGES
    return _scores(k_bufs, q_bufs, stage, spare, _hidden_zero(it), WG, PANELS)


@gluon.jit
def _consume(
    WG: gl.constexpr,
    dk_ptr,
    dv_ptr,
    bufs,
    barriers,
    dk_stride_t,
    work,
    call,
    scale,
    WINDOW: gl.constexpr,
    PANELS: gl.constexpr,
):
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs, lowest_bufs, ds_bufs, dq_bufs = bufs[1:]
    q_ready, q_empty, row_ready, kv_ready, kv_empty, ds_ready, ds_empty, dq_ready, dq_empty = (
        barriers[1:]
    )
    ticket_ptr, key_tiles, items, ratio, at_once = work
    cu_seqlens, documents, search_steps, tokens = call
    STAGES: gl.constexpr = lse_bufs.type.shape[0]
    D: gl.constexpr = PANELS * PANEL
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    zero = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
    scale_log2 = scale * 1.4426950408889634
    it = 0
    n = 0
    item = drawn_item(n, barriers[0], bufs[0], 4)
    while item < items:
        tile, kv_head = item_place(item, work)
        first_key = tile * KEYS
        tiles, whole, stop_whole = query_tiles(first_key, call, WINDOW)
        dk0 = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
        dk1 = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
        dv0 = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
        dv1 = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
        mbarrier.wait(kv_ready, n & 1)
        m = 0
        diagonal = gl.minimum(tiles, DIAGONAL)
        last_of_diagonal = it + diagonal * ratio
        last = it + tiles * ratio
        mbarrier.wait(q_ready.index(it % STAGES), it // STAGES & 1)
        # Waited for at once: one that is underway while the sums above are set to zero would make
        # the assembler wait after every product.
        s_token = _scores(k_bufs, q_bufs, it % STAGES, zero, 0, WG, PANELS)
        s_token = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[s_token]))
        for _ in range(tiles * ratio):
            first_row = first_key + m * QUERIES
            stage = it % STAGES
            parity = it // STAGES & 1
            pair = it & 1
            s = warpgroup_mma_wait(0, deps=[s_token])
            first = _hidden_zero(it)
            dp_token = _scores(v_bufs, do_bufs, stage, zero, first, WG, PANELS)
            mbarrier.wait(row_ready.index(stage), parity)
            lse = lse_bufs.index(stage).load(COLUMN) * 1.4426950408889634
            p = gl.exp2(s * scale_log2 - lse[None, :])
            if (m < whole) | (m >= stop_whole):
                rows = first_row + gl.arange(0, QUERIES, layout=COLUMN)
                keys = first_key + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
                lowest = lowest_bufs.index(stage).load(COLUMN)
                highest = gl.where(rows < tokens, rows, -1)
                seen = (keys[:, None] <= highest[None, :]) & (keys[:, None] >= lowest[None, :])
                p = gl.where(seen, p, 0.0)
            p_a = gl.convert_layout(p.to(q_bufs.dtype), A_LAYOUT)
            dv0 = warpgroup_mma(p_a, do_bufs.index(stage * PANELS), dv0, is_async=True)
            if PANELS == 2:
                dv1 = warpgroup_mma(p_a, do_bufs.index(stage * PANELS + 1), dv1, is_async=True)
            dp = warpgroup_mma_wait(PANELS, deps=[dp_token])
            delta = delta_bufs.index(stage).load(COLUMN)
            ds = (p * (dp - delta[None, :])).to(q_bufs.dtype)
            ds_a = gl.convert_layout(ds, A_LAYOUT)
            mbarrier.wait(ds_empty.index(pair), (it // 2 & 1) ^ 1)
            ds_bufs.index(pair).slice(WG * 64, 64, dim=0).store(ds)
            fence_async_shared()
            mbarrier.arrive(ds_ready.index(pair), count=1)
            dk0 = warpgroup_mma(ds_a, q_bufs.index(stage * PANELS), dk0, is_async=True)
            if PANELS == 2:
                dk1 = warpgroup_mma(ds_a, q_bufs.index(stage * PANELS + 1), dk1, is_async=True)
            mbarrier.wait(ds_ready.index(pair), it // 2 & 1)
            # A warpgroup has 64 of the head dim's columns of dQ, over the keys of both.
            if WG < PANELS:
                ds_buf = ds_bufs.index(pair).permute((1, 0))
                dq_token = warpgroup_mma(
                    ds_buf, k_bufs.index(first + WG), zero, use_acc=False, is_async=True
                )
                if PANELS == 2:
                    dk0, dk1, dv0, dv1, p_a, ds_a = warpgroup_mma_wait(
                        1, deps=[dk0, dk1, dv0, dv1, p_a, ds_a]
                    )
                else:
                    dk0, dv0, p_a, ds_a = warpgroup_mma_wait(1, deps=[dk0, dv0, p_a, ds_a])
                mbarrier.arrive(q_empty.index(stage), count=1)
                s_token = _next_scores(it + 1, last, k_bufs, q_bufs, q_ready, p, WG, PANELS)
                dq = warpgroup_mma_wait(PANELS, deps=[dq_token])
                mbarrier.arrive(ds_empty.index(pair), count=1)
                mbarrier.wait(dq_empty.index(WG), (it & 1) ^ 1)
                dq_bufs.index(WG).store(dq)
                fence_async_shared()
                mbarrier.arrive(dq_ready.index(WG), count=1)
            else:
                dk0, dv0, p_a, ds_a = warpgroup_mma_wait(0, deps=[dk0, dv0, p_a, ds_a])
                mbarrier.arrive(q_empty.index(stage), count=1)
                mbarrier.arrive(ds_empty.index(pair), count=1)
                s_token = _next_scores(it + 1, last, k_bufs, q_bufs, q_ready, p, WG, PANELS)
            stop = gl.where(it < last_of_diagonal, diagonal, tiles)
            it += 1
            m += 1
            m = gl.where(m == stop, gl.where(it < last_of_diagonal, 0, diagonal), m)
        warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(kv_empty, count=1)
        rows = first_key + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        dims = kv_head * D + gl.arange(0, PANEL, layout=gl.SliceLayout(0, LAYOUT))
        at = rows.to(gl.int64)[:, None] * dk_stride_t + dims[None, :]
        there = (rows < tokens)[:, None]
        gl.store(dk_ptr + at, (dk0 * scale).to(q_bufs.dtype), mask=there)
        gl.store(dv_ptr + at, dv0.to(q_bufs.dtype), mask=there)
        if PANELS == 2:
            gl.store(dk_ptr + at + PANEL, (dk1 * scale).to(q_bufs.dtype), mask=there)
            gl.store(dv_ptr + at + PANEL, dv1.to(q_bufs.dtype), mask=there)
        n += 1
        item = drawn_item(n, barriers[0], bufs[0], 4)


@gluon.jit
def _write(
    dq_desc, turn_ptr, bufs, barriers, work, call, WINDOW: gl.constexpr, PANELS: gl.constexpr
):
    """Adds what the consumers have for a tile of queries when its turn has come."""
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs, lowest_bufs, ds_bufs, dq_bufs = bufs[1:]
    q_ready, q_empty, row_ready, kv_ready, kv_empty, ds_ready, ds_empty, dq_ready, dq_empty = (
        barriers[1:]
    )
    ticket_ptr, key_tiles, items, ratio, at_once = work
    D: gl.constexpr = PANELS * PANEL
    it = 0
    last_at = turn_ptr
    n = 0
    item = drawn_item(n, barriers[0], bufs[0], 1)
    while item < items:
        tile, kv_head = item_place(item, work)
        first_key = tile * KEYS
        tiles, whole, stop_whole = query_tiles(first_key, call, WINDOW)
        steps = 0
        for part in range(2 * ratio):
            head = kv_head * ratio + part % ratio
            first, stop = walk_part(part, tiles, ratio)
            for m in range(first, stop):
                first_row = first_key + m * QUERIES
                turn_at = turn_ptr + (head * key_tiles * 2 + first_row // QUERIES)
                turn = gl.load(turn_at, volatile=True)
                for c in gl.static_range(PANELS):
                    mbarrier.wait(dq_ready.index(c), it & 1)
                # As many tiles of keys come before. They belong to items drawn earlier, by programs
                # that run: the wait ends.
                before = m // 2
                while turn < before:
                    turn = gl.load(turn_at, volatile=True)
                for c in gl.static_range(PANELS):
                    at = [first_row, head * D + c * PANEL]
                    if before == 0:
                        async_store(dq_desc, at, dq_bufs.index(c))
                    else:
                        async_add(dq_desc, at, dq_bufs.index(c))
                store_wait(0)
                for c in gl.static_range(PANELS):
                    mbarrier.arrive(dq_empty.index(c), count=1)
                # The turn before is over when its writes are done; these are left to run.
                one = _wait_for_writes(m * 0 + 1, PANELS)
                if steps > 0:
                    gl.atomic_add(last_at, one, sem="release")
                last_at = turn_at
                steps += 1
                it += 1
        # Others may end on the same tile: the last turn does not wait for the next item.
        one = _wait_for_writes(n * 0 + 1, 0)
        gl.atomic_add(last_at, one, sem="release")
        n += 1
        item = drawn_item(n, barriers[0], bufs[0], 1)


@gluon.jit(
    do_not_specialize=["documents", "search_steps", "tokens", "key_tiles", "items", "at_once"]
)
def hopper_bwd_window_kernel(
    q_desc,
    d_out_desc,
    k_desc,
    v_desc,
    dq_desc,
    lse_ptr,
    delta_ptr,
    lowest_ptr,
    turn_ptr,
    ticket_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens,
    documents,
    search_steps,
    tokens,
    dk_stride_t,
    key_tiles,
    items,
    at_once,
    ratio,
    scale,
    HEAD_DIM: gl.constexpr,
    WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dK, dV [T, G, H] and, without the scale, dQ [T, N, H] float32, of the window alone.

    lowest [T] int32 is the first key of each query's window; turn [N, 2 * key_tiles] and ticket [1]
    are int32 zeros.
    """
    PANELS: gl.constexpr = HEAD_DIM // PANEL
    dtype: gl.constexpr = q_desc.dtype
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, QUERIES, PANEL], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, QUERIES, PANEL], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [PANELS, KEYS, PANEL], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [PANELS, KEYS, PANEL], k_desc.layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [2, KEYS, QUERIES], k_desc.layout)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [PANELS, QUERIES, PANEL], dq_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], FLAT)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], FLAT)
    lowest_bufs = gl.allocate_shared_memory(gl.int32, [STAGES, QUERIES], FLAT)
    item_buf = gl.allocate_shared_memory(gl.int32, [1], FLAT)
    item_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    item_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    row_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        # Copies of single rows arrive by the producer's 32 threads.
        mbarrier.init(row_ready.index(i), count=32)
    for i in gl.static_range(2):
        mbarrier.init(ds_ready.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
        mbarrier.init(dq_ready.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    mbarrier.init(kv_ready, count=1)
    mbarrier.init(kv_empty, count=2)
    # Read by two consumers and the writer.
    mbarrier.init(item_ready, count=1)
    mbarrier.init(item_empty, count=3)
    fence_async_shared()
    bufs = (
        item_buf,
        q_bufs,
        do_bufs,
        k_bufs,
        v_bufs,
        lse_bufs,
        delta_bufs,
        lowest_bufs,
        ds_bufs,
        dq_bufs,
    )
    barriers = (
        (item_ready, item_empty),
        q_ready,
        q_empty,
        row_ready,
        kv_ready,
        kv_empty,
        ds_ready,
        ds_empty,
        dq_ready,
        dq_empty,
    )
    call = (cu_seqlens, documents, search_steps, tokens)
    work = (ticket_ptr, key_tiles, items, ratio, at_once)
    descs = (q_desc, d_out_desc, k_desc, v_desc)
    rows = (lse_ptr, delta_ptr, lowest_ptr)
    gl.warp_specialize(
        [
            (
                _consume,
                (0, dk_ptr, dv_ptr, bufs, barriers, dk_stride_t, work, call, scale, WINDOW, PANELS),
            ),
            (
                _consume,
                (1, dk_ptr, dv_ptr, bufs, barriers, dk_stride_t, work, call, scale, WINDOW, PANELS),
            ),
            (_produce, (descs, rows, bufs, barriers, work, call, WINDOW, PANELS)),
            (_write, (dq_desc, turn_ptr, bufs, barriers, work, call, WINDOW, PANELS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )

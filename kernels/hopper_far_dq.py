"""dQ of special keys before the window on Hopper, in Gluon, added to the window's.

A special key (sink token, strided block) is far for the queries at least a window behind it. Tiles
of 128 queries walk all their far keys; each of two consumer warpgroups has 64 of the queries, and
its sums stay in registers. Special keys come in halves of 64 consecutive keys: first the sinks',
then the strided blocks'.

Shapes: T packed tokens, N query heads, G KV heads, R = N / G, H head dim. PATTERN is (sink tokens,
window, block, stride or 0, phases differ by head). `call` is the documents' bounds on the device,
their number, the steps of a bisection among them, T, R, and where the KV heads lie in the whole
model's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .gluon_names import async_load, async_store, reinterpret, store_wait
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
    first_strided,
    head_phase,
    program_item,
    program_turns,
    special_place,
)


@gluon.jit
def _far_walk(n, row_tiles, call, PATTERN: gl.constexpr):
    """How the program's n-th tile of queries walks its far keys.

    Those of the first query's document: documents that begin inside the tile have none there.

    Returns:
        first query, head, KV head, special halves, how many of the first of them need no mask, and
        the document's first token, the token after it, and its phase.
    """
    cu_seqlens, documents, search_steps, tokens, ratio, first_kv_head, total_kv_heads = call
    SINKS: gl.constexpr = PATTERN[0]
    WINDOW: gl.constexpr = PATTERN[1]
    BLOCK: gl.constexpr = PATTERN[2]
    STRIDE: gl.constexpr = PATTERN[3]
    item = program_item(n)
    head = item // row_tiles
    kv_head = head // ratio
    first_row = item % row_tiles * TILE
    document = document_of(cu_seqlens, documents, search_steps, first_row)
    start = gl.load(cu_seqlens + document)
    stop = gl.load(cu_seqlens + document + 1)
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, PATTERN)
    # Keys below are far for the last query of the document, or for the first one too.
    reach = gl.maximum(gl.minimum(first_row + TILE, stop) - WINDOW - start, 0)
    free_reach = gl.maximum(first_row + 1 - WINDOW - start, 0)
    halves = (gl.minimum(SINKS, reach) + HALF - 1) // HALF
    free = gl.minimum(SINKS, free_reach) // HALF
    if STRIDE > 0:
        first = first_strided(phase, PATTERN)
        blocks = ((reach + BLOCK - 1) // BLOCK - first + STRIDE - 1) // STRIDE
        free_blocks = (free_reach // BLOCK - first + STRIDE - 1) // STRIDE
        halves += gl.maximum(blocks, 0) * (BLOCK // HALF)
        free += gl.maximum(free_blocks, 0) * (BLOCK // HALF)
    free = gl.where(first_row + TILE <= gl.minimum(stop, tokens), free, 0)
    return first_row, head, kv_head, halves, free, (start, stop, phase)


@gluon.jit
def _load_rows(q_desc, d_out_desc, near_desc, dq_desc, bufs, barriers, work):
    """Loads queries, their gradients and the window's dQ, and stores dQ where that was."""
    row_tiles, items = work
    q_bufs, do_bufs, k_bufs, v_bufs, near_bufs, dq_bufs = bufs
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, near_ready, dq_ready = barriers
    PANELS: gl.constexpr = q_bufs.type.shape[0] // CONSUMERS
    D: gl.constexpr = PANELS * PANEL
    turns = program_turns(items)
    last_row = 0
    last_head = 0
    for n in range(turns):
        item = program_item(n)
        head = item // row_tiles
        first_row = item % row_tiles * TILE
        mbarrier.wait(q_empty, (n & 1) ^ 1)
        mbarrier.expect(q_ready, 2 * CONSUMERS * PANELS * q_desc.block_type.nbytes)
        for w in gl.static_range(CONSUMERS):
            for c in gl.static_range(PANELS):
                at = [first_row + w * ROWS, head * D + c * PANEL]
                q_buf = q_bufs.index(w * PANELS + c)
                do_buf = do_bufs.index(w * PANELS + c)
                async_load(q_desc, at, q_ready, q_buf)
                async_load(d_out_desc, at, q_ready, do_buf)
        for w in gl.static_range(CONSUMERS):
            if n > 0:
                mbarrier.wait(dq_ready.index(w), (n & 1) ^ 1)
                for c in gl.static_range(PANELS):
                    at = [last_row + w * ROWS, last_head * D + c * PANEL]
                    dq_buf = dq_bufs.index(2 * (w * PANELS + c))
                    async_store(dq_desc, at, dq_buf)
                store_wait(0)
            bar = near_ready.index(w)
            mbarrier.expect(bar, PANELS * near_desc.block_type.nbytes)
            for c in gl.static_range(PANELS):
                at = [first_row + w * ROWS, head * D + c * PANEL]
                near_buf = near_bufs.index(w * PANELS + c)
                async_load(near_desc, at, bar, near_buf)
        last_row = first_row
        last_head = head
    for w in gl.static_range(CONSUMERS):
        mbarrier.wait(dq_ready.index(w), (turns & 1) ^ 1)
        for c in gl.static_range(PANELS):
            at = [last_row + w * ROWS, last_head * D + c * PANEL]
            async_store(dq_desc, at, dq_bufs.index(2 * (w * PANELS + c)))
    store_wait(0)


@gluon.jit
def _load_keys(k_desc, v_desc, bufs, barriers, work, call, PATTERN: gl.constexpr):
    row_tiles, items = work
    q_bufs, do_bufs, k_bufs, v_bufs, near_bufs, dq_bufs = bufs
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, near_ready, dq_ready = barriers
    PANELS: gl.constexpr = q_bufs.type.shape[0] // CONSUMERS
    STAGES: gl.constexpr = k_bufs.type.shape[0] // PANELS
    D: gl.constexpr = PANELS * PANEL
    it = 0
    for n in range(program_turns(items)):
        first_row, head, kv_head, halves, free, walk = _far_walk(n, row_tiles, call, PATTERN)
        for i in range(halves):
            stage = it % STAGES
            parity = (it // STAGES & 1) ^ 1
            key = walk[0] + special_place(i, walk[2], PATTERN)
            bar = k_ready.index(stage)
            mbarrier.wait(k_empty.index(stage), parity)
            mbarrier.expect(bar, PANELS * k_desc.block_type.nbytes)
            for c in gl.static_range(PANELS):
                at = [key, kv_head * D + c * PANEL]
                async_load(k_desc, at, bar, k_bufs.index(stage * PANELS + c))
            bar = v_ready.index(stage)
            mbarrier.wait(v_empty.index(stage), parity)
            mbarrier.expect(bar, PANELS * v_desc.block_type.nbytes)
            for c in gl.static_range(PANELS):
                at = [key, kv_head * D + c * PANEL]
                async_load(v_desc, at, bar, v_bufs.index(stage * PANELS + c))
            it += 1


@gluon.jit
def _row_products(a0, a1, b_bufs, stage, zero, PANELS: gl.constexpr):
    """Starts rows of registers times a stage of keys (or values), [64, 64]."""
    b_buf = b_bufs.index(stage * PANELS).permute((1, 0))
    token = warpgroup_mma(a0, b_buf, zero, use_acc=False, is_async=True)
    if PANELS == 2:
        b_buf = b_bufs.index(stage * PANELS + 1).permute((1, 0))
        token = warpgroup_mma(a1, b_buf, token, is_async=True)
    return token


@gluon.jit
def _consume_keys(
    WG: gl.constexpr,
    lse_ptr,
    delta_ptr,
    bufs,
    barriers,
    work,
    call,
    scale,
    PATTERN: gl.constexpr,
):
    row_tiles, items = work
    q_bufs, do_bufs, k_bufs, v_bufs, near_bufs, dq_bufs = bufs
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, near_ready, dq_ready = barriers
    tokens = call[3]
    PANELS: gl.constexpr = q_bufs.type.shape[0] // CONSUMERS
    STAGES: gl.constexpr = k_bufs.type.shape[0] // PANELS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    lanes = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    zero = gl.zeros([ROWS, HALF], gl.float32, layout=LAYOUT)
    scale_log2 = scale * LOG2E
    it = 0
    for n in range(program_turns(items)):
        first_row, head, kv_head, halves, free, walk = _far_walk(n, row_tiles, call, PATTERN)
        rows = first_row + WG * ROWS + gl.arange(0, ROWS, layout=ROW)
        limit = far_limit(rows, walk[1], PATTERN)
        row_at = head.to(gl.int64) * tokens + gl.minimum(rows, tokens - 1)
        lse = gl.load(lse_ptr + row_at) * LOG2E
        delta = gl.load(delta_ptr + row_at)
        dq0 = gl.zeros([ROWS, PANEL], gl.float32, layout=LAYOUT)
        dq1 = gl.zeros([ROWS, PANEL], gl.float32, layout=LAYOUT)
        mbarrier.wait(q_ready, n & 1)
        q0 = q_bufs.index(WG * PANELS).load(A_LAYOUT)
        do0 = do_bufs.index(WG * PANELS).load(A_LAYOUT)
        q1 = q0
        do1 = do0
        if PANELS == 2:
            q1 = q_bufs.index(WG * PANELS + 1).load(A_LAYOUT)
            do1 = do_bufs.index(WG * PANELS + 1).load(A_LAYOUT)
        mbarrier.arrive(q_empty, count=1)
        mbarrier.wait(k_ready.index(it % STAGES), it // STAGES & 1, pred=halves > 0)
        # Waited for at once: one that is underway while the sums above are set to zero would make
        # the assembler wait after every product.
        s_token = _row_products(q0, q1, k_bufs, it % STAGES, zero, PANELS)
        s_token = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[s_token]))
        for i in range(halves):
            stage = it % STAGES
            s = warpgroup_mma_wait(0, deps=[s_token])
            mbarrier.wait(v_ready.index(stage), it // STAGES & 1)
            dp_token = _row_products(do0, do1, v_bufs, stage, zero, PANELS)
            p = gl.exp2(s * scale_log2 - lse[:, None])
            if i >= free:
                keys = walk[0] + special_place(i, walk[2], PATTERN) + lanes
                p = gl.where(keys[None, :] <= limit[:, None], p, 0.0)
            dp = warpgroup_mma_wait(0, deps=[dp_token])
            mbarrier.arrive(v_empty.index(stage), count=1)
            ds = gl.convert_layout((p * (dp - delta[:, None])).to(q_bufs.dtype), A_LAYOUT)
            dq0 = warpgroup_mma(ds, k_bufs.index(stage * PANELS), dq0, is_async=True)
            if PANELS == 2:
                dq1 = warpgroup_mma(ds, k_bufs.index(stage * PANELS + 1), dq1, is_async=True)
            it += 1
            # Past the last half, scores that nobody reads.
            after = it % STAGES
            mbarrier.wait(k_ready.index(after), it // STAGES & 1, pred=i + 1 < halves)
            s_token = _row_products(q0, q1, k_bufs, after, s, PANELS)
            if PANELS == 2:
                dq0, dq1, ds = warpgroup_mma_wait(PANELS, deps=[dq0, dq1, ds])
            else:
                dq0, ds = warpgroup_mma_wait(PANELS, deps=[dq0, ds])
            mbarrier.arrive(k_empty.index(stage), count=1)
        warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.wait(near_ready.index(WG), n & 1)
        dq0 = (dq0 + near_bufs.index(WG * PANELS).load(LAYOUT)) * scale
        if PANELS == 2:
            dq1 = (dq1 + near_bufs.index(WG * PANELS + 1).load(LAYOUT)) * scale
        dq_bufs.index(2 * WG * PANELS).store(dq0.to(q_bufs.dtype))
        if PANELS == 2:
            dq_bufs.index(2 * WG * PANELS + 2).store(dq1.to(q_bufs.dtype))
        fence_async_shared()
        mbarrier.arrive(dq_ready.index(WG), count=1)


@gluon.jit(do_not_specialize=[*NOT_SPECIALIZED, "row_tiles", "items"])
def hopper_bwd_far_dq_kernel(
    q_desc,
    k_desc,
    v_desc,
    d_out_desc,
    near_desc,
    dq_desc,
    lse_ptr,
    delta_ptr,
    cu_seqlens,
    documents,
    search_steps,
    tokens,
    row_tiles,
    items,
    ratio,
    first_kv_head,
    total_kv_heads,
    scale,
    HEAD_DIM: gl.constexpr,
    PATTERN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dq [T, N, H] = scale * (near [T, N, H] float32, the window's part, + the far keys').

    items = N * row_tiles (tiles of 128 queries), dealt to the programs. Descriptors are of the
    tensors as [T, N * H] or [T, G * H], in boxes of 64 x 64. STAGES is 2 or more.
    """
    dtype: gl.constexpr = q_desc.dtype
    PANELS: gl.constexpr = HEAD_DIM // PANEL
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS * PANELS, ROWS, PANEL], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS * PANELS, ROWS, PANEL], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, HALF, PANEL], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, HALF, PANEL], v_desc.layout)
    near_bufs = gl.allocate_shared_memory(
        gl.float32, [CONSUMERS * PANELS, ROWS, PANEL], near_desc.layout
    )
    # dQ lies where the window's part was: every second panel, as it takes half as much.
    dq_bufs = reinterpret(near_bufs, dtype, [2 * CONSUMERS * PANELS, ROWS, PANEL], dq_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    near_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    dq_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(near_ready.index(i), count=1)
        mbarrier.init(dq_ready.index(i), count=1)
    fence_async_shared()
    bufs = (q_bufs, do_bufs, k_bufs, v_bufs, near_bufs, dq_bufs)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, near_ready, dq_ready)
    call = (cu_seqlens, documents, search_steps, tokens, ratio, first_kv_head, total_kv_heads)
    work = (row_tiles, items)
    gl.warp_specialize(
        [
            (_consume_keys, (0, lse_ptr, delta_ptr, bufs, barriers, work, call, scale, PATTERN)),
            (_consume_keys, (1, lse_ptr, delta_ptr, bufs, barriers, work, call, scale, PATTERN)),
            (_load_rows, (q_desc, d_out_desc, near_desc, dq_desc, bufs, barriers, work)),
            (_load_keys, (k_desc, v_desc, bufs, barriers, work, call, PATTERN)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )

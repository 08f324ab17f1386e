"""Forward of the sparse layers on Hopper, in Gluon: TMA, warpgroup MMA, a producer, two consumers.

A program takes tiles of 128 queries of one head, one after another; each consumer warpgroup has 64
of them. Keys are walked in halves of 64, two to a tile: special halves (sink tokens, strided
blocks) of the first query's document, then the window. Documents that begin inside the tile of
queries begin inside the window too, where the mask finds their sinks and strided blocks. Scores of
a tile of keys are computed while the probabilities of the one before meet their values.

Three things that cost more than they seem to: the amount of code (hence one loop with a branch for
the mask, not three), a prologue per tile of queries (hence programs that stay and load ahead), and
tiles of uneven length dealt out by a fixed step.

Shapes: T packed tokens, N query heads, G KV heads, H head dim. PATTERN is (sink tokens, window,
block, stride or 0, phases differ by head). `walk` is what `_walk` returns, `call` the documents'
bounds on the device, their number, the steps of a bisection among them, T, N / G, and where the KV
heads lie in the whole model's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_names import async_load, async_store, store_wait
from .hopper_walk import (
    CONSUMERS,
    HALF,
    PANEL,
    ROWS,
    TILE,
    document_of,
    first_strided,
    head_phase,
    program_item,
    program_turns,
    special_place,
)


@gluon.jit
def _walk(n, row_tiles, call, PATTERN: gl.constexpr):
    """How the program's n-th tile of queries walks its keys.

    Returns:
        first query, head, KV head, tiles of keys, the first of them that needs no mask, the first
        after these, and the walk: (first token of the document, first key of the window, special
        halves, phase).
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
    stop_row = gl.minimum(first_row + TILE, tokens)
    search = (documents, search_steps)
    first_start = gl.load(cu_seqlens + document_of(cu_seqlens, *search, first_row))
    last_start = gl.load(cu_seqlens + document_of(cu_seqlens, *search, stop_row - 1))
    near = gl.maximum(first_row - WINDOW + 1, first_start) - first_start
    phase = head_phase(kv_head, first_kv_head, total_kv_heads, PATTERN)
    if STRIDE > 0:
        # The window begins at the edge of a strided block, so that none lies half before it.
        near = near // BLOCK * BLOCK
        special = gl.minimum(SINKS, near) // HALF
        first = first_strided(phase, PATTERN)
        blocks = gl.maximum((near // BLOCK - first + STRIDE - 1) // STRIDE, 0)
        special += blocks * (BLOCK // HALF)
    else:
        near = near // HALF * HALF
        special = gl.minimum(SINKS, near) // HALF
    near += first_start
    tiles = gl.cdiv(special + gl.cdiv(stop_row - near, HALF), 2)
    # Whole halves lie behind the window's left edge and before the first query.
    left = special + gl.cdiv(gl.maximum(stop_row - WINDOW - near, 0), HALF)
    right = special + (first_row + 1 - near) // HALF
    one = first_start == last_start
    free_from = gl.where(one, (left + 1) // 2, tiles)
    free_to = gl.where(one, right // 2, tiles)
    walk = (first_start, near, special, phase)
    return first_row, head, kv_head, tiles, free_from, free_to, walk


@gluon.jit
def _half(number, walk, PATTERN: gl.constexpr):
    """First key of the half of that number."""
    first_start, near, special, phase = walk
    place = special_place(number, phase, PATTERN)
    return gl.where(number < special, first_start + place, near + (number - special) * HALF)


@gluon.jit
def _load(base0, base1, column, desc, bufs, stage, ready, PANELS: gl.constexpr):
    """Starts the copy of two halves into a stage."""
    bar = ready.index(stage)
    mbarrier.expect(bar, 2 * PANELS * desc.block_type.nbytes)
    for c in gl.static_range(PANELS):
        buf = bufs.index(stage * PANELS + c)
        at = column + c * PANEL
        async_load(desc, [base0, at], bar, buf.slice(0, HALF, dim=0))
        async_load(desc, [base1, at], bar, buf.slice(HALF, HALF, dim=0))


@gluon.jit
def _produce(descs, bufs, barriers, work, call, PATTERN: gl.constexpr):
    row_tiles, items = work
    q_desc, k_desc, v_desc = descs
    q_bufs, k_bufs, v_bufs = bufs
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns = barriers
    PANELS: gl.constexpr = q_bufs.type.shape[0] // (2 * CONSUMERS)
    STAGES: gl.constexpr = k_bufs.type.shape[0] // PANELS
    D: gl.constexpr = PANELS * PANEL
    it = 0
    for n in range(program_turns(items)):
        first_row, head, kv_head, tiles, free_from, free_to, walk = _walk(
            n, row_tiles, call, PATTERN
        )
        buffer = n & 1
        mbarrier.wait(q_empty.index(buffer), (n // 2 & 1) ^ 1)
        mbarrier.expect(q_ready.index(buffer), CONSUMERS * PANELS * q_desc.block_type.nbytes)
        for w in gl.static_range(CONSUMERS):
            for c in gl.static_range(PANELS):
                at = [first_row + w * ROWS, head * D + c * PANEL]
                buf = q_bufs.index((buffer * CONSUMERS + w) * PANELS + c)
                async_load(q_desc, at, q_ready.index(buffer), buf)
        for i in range(tiles):
            stage = it % STAGES
            parity = (it // STAGES & 1) ^ 1
            base0 = _half(2 * i, walk, PATTERN)
            base1 = _half(2 * i + 1, walk, PATTERN)
            mbarrier.wait(k_empty.index(stage), parity)
            _load(base0, base1, kv_head * D, k_desc, k_bufs, stage, k_ready, PANELS)
            mbarrier.wait(v_empty.index(stage), parity)
            _load(base0, base1, kv_head * D, v_desc, v_bufs, stage, v_ready, PANELS)
            it += 1


@gluon.jit
def _reach(key, walk, tokens, PATTERN: gl.constexpr):
    """How many tokens on a query still sees the half that begins at this key."""
    inside = key - walk[0]
    special = inside < PATTERN[0]
    if PATTERN[3] > 0:
        special = special | (inside // PATTERN[2] % PATTERN[3] == walk[3])
    return gl.where(special, tokens, PATTERN[1])


@gluon.jit
def _masked(scores, i, rows, starts, walk, tokens, PATTERN: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Halves are aligned to the first document; queries of others see their sinks by the window."""
    lanes = gl.arange(0, 2 * HALF, layout=gl.SliceLayout(0, S_LAYOUT))
    base0 = _half(2 * i, walk, PATTERN)
    base1 = _half(2 * i + 1, walk, PATTERN)
    reach0 = _reach(base0, walk, tokens, PATTERN)
    reach1 = _reach(base1, walk, tokens, PATTERN)
    keys = lanes + gl.where(lanes < HALF, base0, base1 - HALF)
    reach = keys + gl.where(lanes < HALF, reach0, reach1)
    seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= starts[:, None])
    seen = seen & (rows[:, None] < reach[None, :])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _softmax(scores, highest, total, scale_log2):
    """(probabilities, highest, total, shrink) with these scores, in powers of two."""
    higher = gl.maximum(highest, gl.max(scores, 1))
    scaled = higher * scale_log2
    probabilities = gl.exp2(scores * scale_log2 - scaled[:, None])
    # Of the difference: exactly 1 for a row that has seen no key yet.
    shrink = gl.exp2((highest - higher) * scale_log2)
    return probabilities, higher, total * shrink + gl.sum(probabilities, 1), shrink


@gluon.jit
def _scores(at, stage, q_bufs, k_bufs, zero, PANELS: gl.constexpr):
    """Starts queries times keys, [64, 128]."""
    k_buf = k_bufs.index(stage * PANELS).permute((1, 0))
    token = warpgroup_mma(q_bufs.index(at), k_buf, zero, use_acc=False, is_async=True)
    if PANELS == 2:
        k_buf = k_bufs.index(stage * PANELS + 1).permute((1, 0))
        token = warpgroup_mma(q_bufs.index(at + 1), k_buf, token, is_async=True)
    return token


@gluon.jit
def _consume(
    WG: gl.constexpr,
    bufs,
    barriers,
    out_desc,
    lse_ptr,
    work,
    call,
    scale_log2,
    PATTERN: gl.constexpr,
):
    row_tiles, items = work
    q_bufs, k_bufs, v_bufs = bufs
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns = barriers
    cu_seqlens, documents, search_steps, tokens, ratio, first_kv_head, total_kv_heads = call
    PANELS: gl.constexpr = q_bufs.type.shape[0] // (2 * CONSUMERS)
    STAGES: gl.constexpr = k_bufs.type.shape[0] // PANELS
    D: gl.constexpr = PANELS * PANEL
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    # One warpgroup's products run beside the other's exponentials.
    TURNS: gl.constexpr = PANELS == 2
    turn = 0
    zero = gl.zeros([ROWS, 2 * HALF], gl.float32, layout=S_LAYOUT)
    it = 0
    for n in range(program_turns(items)):
        first_row, head, kv_head, tiles, free_from, free_to, walk = _walk(
            n, row_tiles, call, PATTERN
        )
        buffer = n & 1
        at = (buffer * CONSUMERS + WG) * PANELS
        rows = first_row + WG * ROWS + gl.arange(0, ROWS, layout=ROW)
        document = document_of(cu_seqlens, documents, search_steps, gl.minimum(rows, tokens - 1))
        starts = gl.load(cu_seqlens + document)
        highest = gl.full([ROWS], -1e30, gl.float32, layout=ROW)
        total = gl.zeros([ROWS], gl.float32, layout=ROW)
        out0 = gl.zeros([ROWS, PANEL], gl.float32, layout=O_LAYOUT)
        out1 = gl.zeros([ROWS, PANEL], gl.float32, layout=O_LAYOUT)
        mbarrier.wait(q_ready.index(buffer), n // 2 & 1)
        stage = it % STAGES
        mbarrier.wait(k_ready.index(stage), it // STAGES & 1)
        s_token = _scores(at, stage, q_bufs, k_bufs, zero, PANELS)
        scores = warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if (free_from > 0) | (free_to <= 0):
            scores = _masked(scores, 0, rows, starts, walk, tokens, PATTERN, S_LAYOUT)
        probabilities, highest, total, shrink = _softmax(scores, highest, total, scale_log2)
        p = gl.convert_layout(probabilities.to(q_bufs.dtype), P_LAYOUT)
        # The output of the tile before has left its buffer by now.
        store_wait(0)
        mbarrier.arrive(q_empty.index(buffer ^ 1), count=1, pred=n > 0)
        for i in range(1, tiles):
            before = it % STAGES
            parity = it // STAGES & 1
            it += 1
            stage = it % STAGES
            mbarrier.wait(k_ready.index(stage), it // STAGES & 1)
            if TURNS:
                mbarrier.wait(turns.index(WG), (turn & 1) ^ (1 - WG))
                turn += 1
            s_token = _scores(at, stage, q_bufs, k_bufs, zero, PANELS)
            mbarrier.wait(v_ready.index(before), parity)
            o0_token = warpgroup_mma(p, v_bufs.index(before * PANELS), out0, is_async=True)
            if PANELS == 2:
                o1_token = warpgroup_mma(p, v_bufs.index(before * PANELS + 1), out1, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index(1 - WG), count=1)
            scores = warpgroup_mma_wait(PANELS, deps=[s_token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if (i < free_from) | (i >= free_to):
                scores = _masked(scores, i, rows, starts, walk, tokens, PATTERN, S_LAYOUT)
            probabilities, highest, total, shrink = _softmax(scores, highest, total, scale_log2)
            shrink_o = gl.convert_layout(shrink, OUT_ROW)[:, None]
            if PANELS == 2:
                out0, out1, probabilities = warpgroup_mma_wait(
                    0, deps=[o0_token, o1_token, probabilities]
                )
                out1 = out1 * shrink_o
            else:
                out0, probabilities = warpgroup_mma_wait(0, deps=[o0_token, probabilities])
            mbarrier.arrive(v_empty.index(before), count=1)
            out0 = out0 * shrink_o
            p = gl.convert_layout(probabilities.to(q_bufs.dtype), P_LAYOUT)
        last = it % STAGES
        mbarrier.wait(v_ready.index(last), it // STAGES & 1)
        it += 1
        out0 = warpgroup_mma(p, v_bufs.index(last * PANELS), out0, is_async=True)
        if PANELS == 2:
            out1 = warpgroup_mma(p, v_bufs.index(last * PANELS + 1), out1, is_async=True)
            out0, out1 = warpgroup_mma_wait(0, deps=[out0, out1])
        else:
            out0 = warpgroup_mma_wait(0, deps=[out0])
        mbarrier.arrive(v_empty.index(last), count=1)
        scale_o = 1.0 / gl.convert_layout(total, OUT_ROW)[:, None]
        # The queries' buffer, read for the last time above, takes the output.
        q_bufs.index(at).store((out0 * scale_o).to(q_bufs.dtype))
        if PANELS == 2:
            q_bufs.index(at + 1).store((out1 * scale_o).to(q_bufs.dtype))
        fence_async_shared()
        for c in gl.static_range(PANELS):
            place = [first_row + WG * ROWS, head * D + c * PANEL]
            async_store(out_desc, place, q_bufs.index(at + c))
        lse = (highest * scale_log2 + gl.log2(total)) * 0.6931471805599453
        gl.store(lse_ptr + head.to(gl.int64) * tokens + rows, lse, mask=rows < tokens)
    store_wait(0)


@gluon.jit(do_not_specialize=["documents", "search_steps", "tokens", "row_tiles", "items"])
def hopper_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    cu_seqlens,
    documents,
    search_steps,
    tokens,
    row_tiles,
    items,
    ratio,
    first_kv_head,
    total_kv_heads,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    PATTERN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out [T, N, H] and the natural-log LSE [N, T]; items = N * row_tiles, dealt to the programs.

    Descriptors are of the tensors as [T, N * H] or [T, G * H], in boxes of 64 x 64.
    """
    dtype: gl.constexpr = q_desc.dtype
    PANELS: gl.constexpr = HEAD_DIM // PANEL
    q_bufs = gl.allocate_shared_memory(dtype, [2 * CONSUMERS * PANELS, ROWS, PANEL], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 2 * HALF, PANEL], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 2 * HALF, PANEL], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc)
    bufs = (q_bufs, k_bufs, v_bufs)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns)
    call = (cu_seqlens, documents, search_steps, tokens, ratio, first_kv_head, total_kv_heads)
    work = (row_tiles, items)
    gl.warp_specialize(
        [
            (_consume, (0, bufs, barriers, out_desc, lse_ptr, work, call, scale_log2, PATTERN)),
            (_consume, (1, bufs, barriers, out_desc, lse_ptr, work, call, scale_log2, PATTERN)),
            (_produce, (descs, bufs, barriers, work, call, PATTERN)),
        ],
        [4, 1],
        [240, 24],
    )

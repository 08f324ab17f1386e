"""What the Gluon kernels' programs walk: their share of the work, documents, special keys.

PATTERN is (sink tokens, window, block, stride or 0, phases differ by head); sink tokens and block
are multiples of HALF, and the block divides the sink tokens.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Special keys (sink tokens, strided blocks) come in runs of this many.
HALF = gl.constexpr(64)
# Rows of a consumer warpgroup, columns of a buffer, consumers, and rows of them all.
ROWS = gl.constexpr(64)
PANEL = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
TILE = gl.constexpr(128)
LOG2E = gl.constexpr(1.4426950408889634)
# What may change from call to call without being compiled for.
NOT_SPECIALIZED = (
    "documents",
    "search_steps",
    "tokens",
    "ratio",
    "first_kv_head",
    "total_kv_heads",
)


@gluon.jit
def program_turns(items):
    """How many of the items this program takes."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    rounds = items // programs
    last = gl.where(rounds % 2 == 0, program, programs - 1 - program)
    return rounds + gl.where(rounds * programs + last < items, 1, 0)


@gluon.jit
def program_item(n):
    """The n-th item of this program.

    Programs are dealt items forwards and backwards in turn, so that none has the long ones only.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    return n * programs + gl.where(n % 2 == 0, program, programs - 1 - program)


@gluon.jit
def document_of(bounds, documents, search_steps, place):
    """The document (of those that start at `bounds`) that holds `place`, by bisection."""
    low = place * 0
    high = low + documents
    for _ in range(search_steps):
        middle = (low + high) // 2
        right = gl.load(bounds + middle) <= place
        low = gl.where(right, middle, low)
        high = gl.where(right, high, middle)
    return low


@gluon.jit
def head_phase(kv_head, first_kv_head, total_kv_heads, PATTERN: gl.constexpr):
    """The strided blocks' phase of this shard's KV head."""
    phase = 0
    if PATTERN[4]:
        phase = (first_kv_head + kv_head) * PATTERN[3] // total_kv_heads
    return phase


@gluon.jit
def first_strided(phase, PATTERN: gl.constexpr):
    """The first strided block behind the sinks."""
    STRIDE: gl.constexpr = PATTERN[3]
    skipped = gl.maximum((PATTERN[0] // PATTERN[2] - phase + STRIDE - 1) // STRIDE, 0)
    return phase + skipped * STRIDE


@gluon.jit
def special_place(number, phase, PATTERN: gl.constexpr):
    """Position within its document of the special half of that number: sinks, then blocks."""
    SINK_HALVES: gl.constexpr = PATTERN[0] // HALF
    place = number * HALF
    if PATTERN[3] > 0:
        BLOCK_HALVES: gl.constexpr = PATTERN[2] // HALF
        strided = number - SINK_HALVES
        block = first_strided(phase, PATTERN) + strided // BLOCK_HALVES * PATTERN[3]
        strided = block * PATTERN[2] + strided % BLOCK_HALVES * HALF
        place = gl.where(number < SINK_HALVES, place, strided)
    return place


@gluon.jit
def far_limit(rows, stop, PATTERN: gl.constexpr):
    """The last key that is far for each row; none (-1) for rows of later documents."""
    return gl.where(rows < stop, rows - PATTERN[1], -1)

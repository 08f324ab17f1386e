"""Items of work that the programs of a Gluon kernel draw from a counter, in order.

One warp of a program draws, the others are told. Who has drawn an item runs, so that nobody waits
in vain for an item drawn before its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def draw_item(n, ticket_ptr, barriers, item_buf):
    """Draws the program's n-th item, and tells the program's other warps; the producer's."""
    item_ready, item_empty = barriers
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    item = gl.atomic_add(ticket_ptr, 1, sem="relaxed")
    mbarrier.wait(item_empty, (n & 1) ^ 1)
    item_buf.store(gl.full([1], 0, gl.int32, layout=LINE) + item)
    fence_async_shared()
    mbarrier.arrive(item_ready, count=1)
    return item


@gluon.jit
def drawn_item(n, barriers, item_buf, WARPS: gl.constexpr):
    """The item that the producer drew n-th."""
    item_ready, item_empty = barriers
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(item_ready, n & 1)
    item = gl.max(item_buf.load(LINE), 0)
    mbarrier.arrive(item_empty, count=1)
    return item

"""Which queries a tile of keys meets within the window, and in which order, in Gluon.

`call` is the documents' bounds on the device, their number, the steps of a bisection among them,
and the number of tokens.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_walk import document_of

KEYS = gl.constexpr(128)
QUERIES = gl.constexpr(64)
# Tiles of queries that begin within their tile of keys.
DIAGONAL = gl.constexpr(2)


@gluon.jit
def item_place(item, work):
    """(tile of keys, KV head) of an item.

    KV heads come `at_once` together, the last tile of each of them first: a tile of keys then
    begins some time after the next tile of its head, and finds that its turns at dQ have come.
    """
    ticket_ptr, key_tiles, items, ratio, at_once = work
    group = item // (key_tiles * at_once)
    first_head = group * at_once
    heads = gl.minimum(at_once, items // key_tiles - first_head)
    place = item - first_head * key_tiles
    return key_tiles - 1 - place // heads, first_head + place % heads


@gluon.jit
def query_tiles(first_key, call, WINDOW: gl.constexpr):
    """(query tiles of a key tile, the first that sees it whole, the first after these)."""
    cu_seqlens, documents, search_steps, tokens = call
    last_key = gl.minimum(first_key + KEYS, tokens) - 1
    search = (documents, search_steps)
    first_stop = gl.load(cu_seqlens + document_of(cu_seqlens, *search, first_key) + 1)
    last_stop = gl.load(cu_seqlens + document_of(cu_seqlens, *search, last_key) + 1)
    stop_row = gl.minimum(last_key + WINDOW, last_stop)
    tiles = gl.cdiv(stop_row - first_key, QUERIES)
    whole = (last_key - first_key + QUERIES - 1) // QUERIES
    stop_whole = (gl.minimum(first_key + WINDOW, first_stop) - first_key) // QUERIES
    one = (first_stop == last_stop) & (first_key + KEYS <= tokens)
    return tiles, whole, gl.where(one, stop_whole, 0)


@gluon.jit
def walk_part(part, tiles, ratio):
    """The query tiles [first, stop) of the part of that number of an item's walk.

    All query heads' diagonal tiles come first, then the others head by head: where a document ends
    in a tile of keys, the document's other tiles of keys wait on the diagonal for their turn.
    """
    diagonal = gl.minimum(tiles, DIAGONAL)
    first = gl.where(part < ratio, 0, diagonal)
    return first, gl.where(part < ratio, diagonal, tiles)

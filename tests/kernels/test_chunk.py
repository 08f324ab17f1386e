"""Chunked prefill against the definition; with decoding, through the cache, against one forward."""

import pytest
import torch

from kernels.chunk import FAR, chunk_attention, plan_chunk
from kernels.decode import decode_attention
from kernels.pattern import Pattern
from kernels.reference import reference_attention
from model.cache import LongGenCache
from tests.closeness import assert_close_by_norm
from tests.kernels.over_slots import (
    DEVICE,
    FIRST,
    PATTERNS,
    PLANTS,
    TOTAL,
    assert_close,
    attention_over_slots,
    tensors,
)


def positions(pattern, new_tokens, kv_heads, cached, seed=0):
    """Two rows, their cached keys (a fifth empty) and then the chunk's, one row padded."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads if pattern.heads_differ else 1
    before = torch.arange(cached).expand(2, heads, -1).clone()
    before[torch.rand(before.shape, generator=generator) < 0.2] = -1
    new = (torch.arange(new_tokens) + cached).expand(2, -1).clone()
    new[1, :5] = -1
    new[1, -1] = -1
    k_positions = torch.cat((before, new[:, None].expand(-1, heads, -1)), 2)
    return new.to(DEVICE), k_positions.to(DEVICE)


def assert_matches(pattern, new_tokens, heads, kv_heads, head_dim, cached, plant=None, tamper=None):
    q, k, v = tensors(2, new_tokens, heads, kv_heads, cached + new_tokens, head_dim)
    where = positions(pattern, new_tokens, kv_heads, cached)
    asked, first = plant(pattern, FIRST) if plant else (pattern, FIRST)
    found = chunk_attention(q, k, v, asked, *where, first_kv_head=first, total_kv_heads=TOTAL)
    found = tamper(*found) if tamper else found
    assert_close(found, attention_over_slots(q, k, v, pattern, *where))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("new_tokens", "heads", "kv_heads", "head_dim", "cached"),
    [(41, 4, 2, 64, 100), (9, 3, 3, 80, 60), (9, 2, 1, 32, 60)],
)
def test_matches_the_definition(name, new_tokens, heads, kv_heads, head_dim, cached):
    assert_matches(PATTERNS[name], new_tokens, heads, kv_heads, head_dim, cached)


@pytest.mark.parametrize(
    ("pattern", "cached"),
    [(Pattern.full(), 126), (Pattern(0, 157), 126), (Pattern(64, 30), 95), (Pattern(0, 158), 96)],
)
def test_a_mask_is_left_out_only_where_every_query_sees_every_key(pattern, cached):
    """No slot is empty, and what is seen ends one key before or after an edge of a tile."""
    new_tokens = 40
    q, k, v = tensors(1, new_tokens, 1, 1, cached + new_tokens, 64)
    k_positions = torch.arange(cached + new_tokens, device=DEVICE)[None, None]
    where = k_positions[0, :, cached:], k_positions
    found = chunk_attention(q, k, v, pattern, *where)
    assert_close(found, attention_over_slots(q, k, v, pattern, *where, first=0, total=1))


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_off_by_one_is_caught(plant):
    with pytest.raises(AssertionError, match="out"):
        assert_matches(PATTERNS["per_head"], 20, 2, 2, 64, 90, PLANTS[plant])


def test_a_wrong_lse_is_caught():
    with pytest.raises(AssertionError, match="LSE"):
        assert_matches(
            PATTERNS["strided"], 9, 2, 2, 64, 60, tamper=lambda out, lse: (out, lse * 1.4427)
        )


def test_slots_in_any_order():
    pattern = PATTERNS["per_head"]
    q, k, v = tensors(2, 33, 4, 2, 140, 64, torch.bfloat16)
    q_positions, k_positions = positions(pattern, 33, 2, 107)
    where = q_positions.int(), k_positions[..., torch.randperm(140)].int()
    shard = {"first_kv_head": FIRST, "total_kv_heads": TOTAL}
    found = chunk_attention(q, k, v, pattern, *where, **shard)
    assert found[0].dtype == torch.bfloat16
    assert_close(found, attention_over_slots(q, k, v, pattern, *where), tolerance=1e-2)


def walked(plan, pattern):
    """Of each row, head, tile of queries and tile of slots: whether it is walked, [B, P, U, T]."""
    tiles = torch.arange(plan.newest.shape[-1], device=plan.newest.device)
    listed, near, count = (x[..., None] for x in plan.walks.unbind(-1))
    window = (tiles >= near) & (tiles < near + count)
    place = plan.always.argsort(-1)[:, :, None]
    assert not (window & (place < listed)).any(), "a tile is walked twice"
    return window | (place < listed)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_no_visible_key_is_skipped_and_no_unseen_one_goes_unmasked(name, shuffled):
    pattern, (tile_m, tile_k) = PATTERNS[name], (4, 8)
    q_positions, k_positions = positions(pattern, 150, 3, 197)
    if shuffled:
        k_positions = k_positions[..., torch.randperm(347)]
    plan = plan_chunk(pattern, q_positions, k_positions, 3, FIRST, TOTAL, tile_m, tile_k)
    heads = plan.newest.shape[1]
    assert heads == (3 if pattern.heads_differ else 1)
    k = plan.k_positions[:, :, None]
    q = torch.nn.functional.pad(q_positions, (0, 2), value=-1)[:, None, :, None]
    head = FIRST + torch.arange(heads, device=DEVICE).view(1, -1, 1, 1)
    # Padding has no say: neither must it be reached nor masked for.
    seen = pattern.visible(q, k, head, TOTAL) & (k >= 0)
    tiled = (
        (seen & (q >= 0)).unflatten(2, (-1, tile_m)).unflatten(4, (-1, tile_k)),
        seen | (q < 0),
    )
    some = tiled[0].any(-1).any(3)
    every = tiled[1].unflatten(2, (-1, tile_m)).unflatten(4, (-1, tile_k)).all(-1).all(3)
    assert not (some & ~walked(plan, pattern)).any()
    tile = q.unflatten(2, (-1, tile_m))[..., 0]
    lowest, uppermost = tile.masked_fill(tile < 0, FAR.value).amin(-1), tile.amax(-1)
    masked = plan.newest[:, :, None] > lowest[..., None]
    if not pattern.is_full:
        masked |= uppermost[..., None] - plan.oldest[:, :, None] >= pattern.window
    assert not (walked(plan, pattern) & ~masked & ~every).any()
    assert not pattern.is_full or (walked(plan, pattern) & ~masked).any()


@pytest.mark.parametrize(("stride", "most"), [(None, 36), (16, 50)])
def test_the_walk_follows_the_pattern_not_the_cache(stride, most):
    """4096 tokens after 8000: 36 tiles of sinks, window and queries, and two a strided block."""
    pattern = Pattern(64, 2048, 64, stride)
    live = pattern.live(8000)
    q_positions = torch.arange(8000, 12096)[None]
    k_positions = torch.cat((live, q_positions[0]))[None, None]
    plan = plan_chunk(pattern, q_positions, k_positions, 1, 0, 1, 128, 64)
    listed, _, count = plan.walks.unbind(-1)
    assert (listed + count).max() <= most
    assert count.max() <= 35


def in_chunks(pattern, q, k, v, chunk, decoded):
    """Attention of a row, `chunk` tokens at a time through a cache, and the last ones singly."""
    tokens, kv_heads = k.shape[:2]
    cache = LongGenCache([pattern], kv_heads)
    cuts = [*range(0, tokens - decoded, chunk), *range(tokens - decoded, tokens), tokens]
    outs, lses = [], []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        cache.advance(torch.ones(1, stop - start, dtype=torch.bool, device=q.device))
        new = (x[start:stop].transpose(0, 1)[None] for x in (k, v))
        keys, values = cache.update(*new, 0)
        where = cache.query_positions, cache.shared.steps[pattern].key_positions
        attend = chunk_attention if stop - start > 1 else decode_attention
        out, lse = attend(q[None, start:stop], keys, values, pattern, *where)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("beyond", [-1, 0, 1, 90])
def test_chunks_and_decoding_through_the_cache_equal_one_forward(name, beyond):
    pattern = PATTERNS[name]
    tokens = (pattern.window or 37) + beyond
    q, k, v = tensors(1, tokens, 2, 2, tokens, 64)
    q, k, v = q[0], k[0].transpose(0, 1), v[0].transpose(0, 1)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    out, lse = reference_attention(q.double(), k.double(), v.double(), pattern, bounds)
    found = in_chunks(pattern, q, k, v, chunk=max(7, tokens // 2), decoded=2)
    assert_close(found, (out, lse.T))


def test_positions_are_needed():
    q, k, v = tensors(1, 3, 2, 2, 9, 64)
    with pytest.raises(ValueError, match=r"q_positions_BL \(1, 4\): must be \(1, 3\)"):
        where = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, 9, dtype=torch.int64)
        chunk_attention(q, k, v, Pattern(), *(x.to(DEVICE) for x in where))
    with pytest.raises(ValueError, match=r"k_positions_BPS \(1, 9\): must be \(1, 1, 9\)"):
        where = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)
        chunk_attention(q, k, v, Pattern(), *(x.to(DEVICE) for x in where))


def test_what_decoding_refuses_is_refused_here():
    q, k, v = tensors(1, 3, 4, 2, 9, 64)
    where = torch.arange(3, device=DEVICE)[None], torch.arange(9, device=DEVICE)[None, None]
    with pytest.raises(ValueError, match="head dim 12"):
        chunk_attention(*(x[..., :12].contiguous() for x in (q, k, v)), Pattern(), *where)
    with pytest.raises(ValueError, match="N a multiple of G"):
        chunk_attention(q[:, :, :3], k, v, Pattern(), *where)
    with pytest.raises(ValueError, match="the same for all"):
        chunk_attention(q, k, v.half(), Pattern(), *where)
    with pytest.raises(ValueError, match="v has strides"):
        chunk_attention(q, k, v.mT.contiguous().mT, Pattern(), *where)
    with pytest.raises(ValueError, match="softmax_scale=-1"):
        chunk_attention(q, k, v, Pattern(), *where, softmax_scale=-1)
    with pytest.raises(ValueError, match="first_kv_head=0 with 2 KV heads"):
        chunk_attention(q, k, v, Pattern(), *where, total_kv_heads=1)


def test_it_is_a_custom_op():
    q, k, v = tensors(1, 3, 2, 2, 9, 64)
    where = torch.arange(6, 9, device=DEVICE)[None], torch.arange(9, device=DEVICE)[None, None]
    op = torch.ops.longgen.chunk_attention
    flat = (q, k, v, *where, 3, 19, 8, 4, "shared", 0, 2, 0.125)
    torch.library.opcheck(op, flat, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="autograd"):
        chunk_attention(q.requires_grad_(), k, v, Pattern(), *where)[0].sum().backward()


def test_torch_compile_sees_both_ops():
    q, k, v = tensors(1, 2, 2, 2, 9, 64)
    where = torch.arange(7, 9, device=DEVICE)[None], torch.arange(9, device=DEVICE)[None, None]

    def both(q, k, v):
        decoded = decode_attention(q, k, v, Pattern(1, 3), *where)[0]
        return decoded, chunk_attention(q, k, v, Pattern(1, 3), *where)[0]

    found = torch.compile(both, fullgraph=True, backend="eager")(q, k, v)
    assert_close_by_norm(*found, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["full", "window", "strided", "per_head"])
@pytest.mark.parametrize(
    ("new_tokens", "heads", "kv_heads", "head_dim"),
    [(1000, 8, 8, 128), (333, 16, 2, 128), (60, 9, 3, 64), (13, 4, 4, 96)],
)
def test_large_on_the_gpu(name, new_tokens, heads, kv_heads, head_dim):
    pattern = {
        "full": Pattern.full(),
        "window": Pattern(64, 512),
        "strided": Pattern(64, 256, 64, 8),
        "per_head": Pattern(64, 256, 64, 8, "per_head"),
    }[name]
    cached = 2500
    q, k, v = tensors(2, new_tokens, heads, kv_heads, cached + new_tokens, head_dim, torch.bfloat16)
    where = positions(pattern, new_tokens, kv_heads, cached)
    shard = {"first_kv_head": 1, "total_kv_heads": kv_heads + 3}
    found = chunk_attention(q, k, v, pattern, *where, **shard)
    assert_close(found, attention_over_slots(q, k, v, pattern, *where, *shard.values()), 5e-3)

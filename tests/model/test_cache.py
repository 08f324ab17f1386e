"""The cache: what it holds, to the byte, and that no key is missed for it."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from kernels.pattern import Pattern
from kernels.slots import Slots
from model.cache import LongGenCache, cache_bytes
from tests.closeness import assert_close_by_norm, relative_error
from tests.model.small import PATTERNS, ids, in_chunks, small_model

HEAD_DIM, KV_HEADS = 8, 2
# Of float32: weights of gain 2 amplify rounding to 3e-6 in the worst of these cases.
TOLERANCE = 2e-5
PLANTS = {
    "window-1": lambda p: replace(p, window=p.window - 1),
    "window+1": lambda p: replace(p, window=p.window + 1),
    "sinks-1": lambda p: replace(p, sink_tokens=p.sink_tokens - 1),
    "sinks+1": lambda p: replace(p, sink_tokens=p.sink_tokens + 1),
    "stride+1": lambda p: replace(p, stride=p.stride + 1),
    "phase": lambda p: replace(p, phase="shared"),
}


def lasting(pattern: dict, head: int, k: int) -> bool:
    """Whether every later token sees key k."""
    found = pattern["window"] is None or k < pattern["sink_tokens"]
    if pattern.get("stride"):
        per_head = pattern.get("phase") == "per_head"
        phase = head * pattern["stride"] // KV_HEADS if per_head else 0
        found |= (k // pattern["block"]) % pattern["stride"] == phase
    return found


def counted_bytes(pattern: dict, length: int) -> int:
    """Bytes of one sparse layer's live keys and values in float32, counted key by key."""
    keys = 0
    for head in range(KV_HEADS):
        for k in range(length):
            keys += lasting(pattern, head, k) or length - k < pattern["window"]
    return 2 * keys * HEAD_DIM * 4


def reserved_bytes(pattern: dict, length: int) -> int:
    """Bytes of the slots for rows of `length` tokens: what lasts, and a ring of the window."""
    most, ring = 0, 0
    for head in range(KV_HEADS):
        lasts = sum(lasting(pattern, head, k) for k in range(length))
        most = max(most, lasts)
        ring = max(ring, min(pattern["window"] or 0, length - lasts))
    return 2 * KV_HEADS * (most + ring) * HEAD_DIM * 4


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [6, 7, 8, 9, 61])
def test_chunks_and_decode_equal_one_forward(name, length):
    model, tokens = small_model(PATTERNS[name]), ids(1, length)
    expected = model(tokens).logits
    for chunk in (1, 3, 8, 20):
        found, _ = in_chunks(model, tokens, chunk)
        assert_close_by_norm(found, expected, TOLERANCE, chunk)


def test_a_tile_of_queries_does_not_change_the_result(monkeypatch):
    model, tokens = small_model(PATTERNS["per_head"]), ids(2, 50)
    expected = model(tokens).logits
    monkeypatch.setattr("kernels.cached_attention.MASK_ENTRIES", 300)
    assert_close_by_norm(in_chunks(model, tokens, 13)[0], expected, TOLERANCE)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunk", [1, 9, 100])
def test_bytes_are_those_of_the_live_keys(name, chunk):
    model, tokens = small_model(PATTERNS[name]), ids(1, 61)
    cache = model.new_cache(61)
    assert cache.live_bytes() == cache.allocated_bytes() == 0
    with torch.no_grad():
        for part in tokens.split(chunk, 1):
            model(part, past_key_values=cache)
            for layer, full in enumerate(model.config.is_full):
                pattern = PATTERNS["full"] if full else PATTERNS[name]
                assert cache.live_bytes(layer) == counted_bytes(pattern, cache.columns)
                assert cache.allocated_bytes(layer) == reserved_bytes(pattern, 61)
    assert cache.live_bytes() == sum(cache.live_bytes(layer) for layer in range(3))
    told = cache_bytes(model.config.layer_patterns(), KV_HEADS, HEAD_DIM, 4, 61)
    assert cache.allocated_bytes() == told


def test_a_sink_and_window_cache_holds_what_the_next_token_sees_and_nothing_else():
    """At 7B's shapes, by the slots alone: the live keys and the next token's own, to the byte."""
    for pattern, length in ((Pattern(64, 2048), 131072), (Pattern(64, 1024, 64, 64), 131072)):
        seen = len(pattern.live(length)) + 1
        assert Slots(pattern, length).count == seen
        assert Slots(Pattern.full(), length + 1).count == length + 1


@pytest.mark.parametrize("name", PATTERNS)
def test_a_cache_that_grows_loses_nothing(name):
    model, tokens = small_model(PATTERNS[name]), ids(2, 150)
    mask = torch.ones(2, 150)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(tokens, mask).logits[:, 6:]
        cache, parts = model.new_cache(), []
        for start, stop in [(0, 6), *((i, i + 1) for i in range(6, 80)), (80, 149), (149, 150)]:
            parts.append(model(tokens[:, start:stop], mask[:, :stop], cache).logits)
    assert_close_by_norm(torch.cat(parts[1:], 1), expected, TOLERANCE)
    assert cache.allocated_bytes(1) == reserved_bytes(PATTERNS["full"], cache.tokens) * 2
    # Single tokens do not copy the cache again and again.
    sizes, cache = set(), model.new_cache()
    with torch.no_grad():
        for start in range(150):
            model(tokens[:, start : start + 1], past_key_values=cache)
            sizes.add(cache.tokens)
    assert len(sizes) == 3


def test_a_sparse_layer_stops_growing():
    model = small_model(PATTERNS["window"])
    _, short = in_chunks(model, ids(1, 30), 10)
    _, long = in_chunks(model, ids(1, 90), 10)
    assert short.allocated_bytes(0) == reserved_bytes(PATTERNS["window"], 30)
    assert long.allocated_bytes(0) == short.allocated_bytes(0)
    assert long.allocated_bytes(1) == 3 * short.allocated_bytes(1)


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("view", ["visible", "slots"])
def test_a_planted_off_by_one_is_caught(plant, view, monkeypatch):
    model, tokens = small_model(PATTERNS["per_head"]), ids(1, 61)
    expected = model(tokens).logits
    original = Pattern.visible

    def planted_visible(self, *args):
        return original(self if self.is_full else PLANTS[plant](self), *args)

    def planted_slots(pattern, *args):
        return Slots(pattern if pattern.is_full else PLANTS[plant](pattern), *args)

    if view == "visible":
        monkeypatch.setattr(Pattern, "visible", planted_visible)
    else:
        monkeypatch.setattr("model.cache.Slots", planted_slots)
    found, cache = in_chunks(model, tokens, 20)
    moved = relative_error(found, expected) > 100 * TOLERANCE
    assert moved or cache.allocated_bytes(0) != reserved_bytes(PATTERNS["per_head"], 61)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunk", [4, 11, 40])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_rows(name, chunk, side):
    model, lengths, columns = small_model(PATTERNS[name]), (23, 40, 5), 46
    tokens, mask = torch.zeros(3, columns, dtype=torch.int64), torch.zeros(3, columns)
    spans = []
    for row, length in enumerate(lengths):
        # No row begins with the first column: the first chunk of four is padding alone.
        start = columns - length if side == "left" else 0
        spans.append(slice(start, start + length))
        tokens[row, spans[row]] = ids(length, seed=row)
        mask[row, spans[row]] = 1
    cache, parts = model.new_cache(), []
    with torch.no_grad():
        for start in range(0, columns, chunk):
            stop = min(start + chunk, columns)
            parts.append(model(tokens[:, start:stop], mask[:, :stop], cache).logits)
        whole = model(tokens, mask).logits
    found = torch.cat(parts, 1)
    live = 0
    for row, length in enumerate(lengths):
        alone, single = in_chunks(model, tokens[row : row + 1, spans[row]], length)
        assert_close_by_norm(found[row, spans[row]], alone[0], TOLERANCE)
        assert_close_by_norm(whole[row, spans[row]], alone[0], TOLERANCE)
        live += single.live_bytes()
    assert cache.live_bytes() == live
    assert cache.lengths.tolist() == list(lengths)


def test_rows_are_reordered_repeated_and_selected():
    model, tokens = small_model(PATTERNS["per_head"]), ids(3, 30)
    mask = torch.ones(3, 30)
    mask[1, :9] = 0
    rows = torch.tensor([1, 1, 0])
    cache, next_ids = model.new_cache(), ids(3, 1, seed=9)
    with torch.no_grad():
        model(tokens, mask, cache)
        cache.reorder_cache(rows)
        again = torch.cat((tokens[rows], next_ids), 1), torch.cat((mask[rows], torch.ones(3, 1)), 1)
        expected = model(*again).logits[:, -1]
        found = model(next_ids, again[1], cache).logits[:, -1]
        assert_close_by_norm(found, expected, TOLERANCE)

        cache.batch_select_indices(torch.tensor([2]))
        cache.batch_repeat_interleave(2)
        twice = torch.cat((again[0][2:], next_ids[:1]), 1).repeat(2, 1)
        found = model(twice[:, -1:], past_key_values=cache).logits[:, -1]
        assert_close_by_norm(found, model(twice).logits[:, -1], TOLERANCE)


def test_a_reset_cache_starts_anew():
    model = small_model(PATTERNS["shared"])
    _, cache = in_chunks(model, ids(2, 30), 10)
    cache.reset()
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == cache.allocated_bytes() == 0
    tokens = ids(1, 20)
    with torch.no_grad():
        found = model(tokens, past_key_values=cache).logits
    assert_close_by_norm(found, model(tokens).logits, TOLERANCE)


def test_transformers_questions_are_answered():
    cache = LongGenCache([Pattern.full(), Pattern()], kv_heads=2)
    cache.advance(torch.ones(1, 5, dtype=torch.bool))
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    assert cache.get_seq_length() == cache.layers[0].get_seq_length() == 5
    assert cache.get_mask_sizes(3, 0) == (8, 0)


def test_another_number_of_rows_is_refused():
    model = small_model(PATTERNS["window"])
    _, cache = in_chunks(model, ids(2, 9), 9)
    with pytest.raises(ValueError, match="3 rows: the cache holds 2"):
        model(ids(3, 1), past_key_values=cache)


def test_going_back_is_refused():
    model = small_model(PATTERNS["window"])
    with pytest.raises(ValueError, match="cannot go back"):
        model.new_cache().crop(-1)
    with pytest.raises(ValueError, match="cannot go back"):
        model.generate(ids(1, 9), max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_a_dropped_cache_frees_its_memory_at_once():
    """No reference cycle: at 128K a cache is gigabytes, and the next sample needs them."""
    gc.disable()
    try:
        cache = LongGenCache([Pattern(2, 4), Pattern.full()], kv_heads=1)
        cache.advance(torch.ones(1, 9, dtype=torch.bool))
        for layer in cache.layers:
            layer.update(torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8))
        gone = weakref.ref(cache.layers[0])
        del cache, layer
        assert gone() is None
    finally:
        gc.enable()

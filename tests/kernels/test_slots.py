"""Slots hold every live key, whatever the pattern, the shard, and the length that was reserved."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.pattern import Pattern
from kernels.slots import Slots
from tests.kernels.test_pattern import patterns

PLANTS = {
    "window-1": lambda p: replace(p, window=p.window - 1),
    "sinks-1": lambda p: replace(p, sink_tokens=p.sink_tokens - 1),
    "block+1": lambda p: replace(p, block=p.block + 1),
    "stride+1": lambda p: replace(p, stride=p.stride + 1),
    "phase": lambda p: replace(p, phase="shared"),
}


def check(pattern, tokens, kv_heads, first, total, cuts, plant=lambda p: p):
    """Write rows in chunks that end at `cuts`; at each, every live key lies in its own slot."""
    slots = Slots(plant(pattern), tokens, kv_heads, first, total)
    held = torch.full((kv_heads, slots.count), -1)
    start = 0
    for stop in sorted({*cuts, tokens}):
        new = torch.arange(start, stop)
        places = slots.place(new, stop)
        assert places.shape == (slots.heads, stop - start) and places.max() < slots.count
        for head, own in enumerate(places.expand(kv_heads, -1)):
            kept = own >= 0
            assert own[kept].unique().numel() == kept.sum()
            held[head, own[kept]] = new[kept]
            live = pattern.live(stop, first + head, total)
            assert torch.isin(live, held[head]).all()
            where = slots.place(live)[head if slots.heads > 1 else 0]
            assert torch.equal(held[head, where], live)
            if stop - start == 1:
                seen = torch.arange(stop)[
                    pattern.visible(new, torch.arange(stop), first + head, total)
                ]
                assert torch.isin(seen, held[head]).all()
            assert (held[head, int(slots.used(torch.tensor(stop))) :] == -1).all()
        start = stop
    # As little as that takes: a ring, and what lasts of the head that has most of it.
    lasting = [len(pattern.live(10**6 + tokens, h, total)) for h in range(first, first + kv_heads)]
    assert slots.count <= max(lasting) + tokens
    if not pattern.is_full:
        own = [len(pattern.live(tokens, h, total)) for h in range(first, first + kv_heads)]
        period = (pattern.stride or 1) * pattern.block
        within = pattern.window // period * pattern.block + pattern.block if pattern.stride else 0
        spread = pattern.block if pattern.heads_differ else 0
        assert max(own) <= slots.count <= max(own) + 1 + within + spread + pattern.sink_tokens


@given(patterns, st.integers(1, 90), st.integers(1, 3), st.integers(0, 2), st.data())
@settings(max_examples=50, deadline=None)
def test_every_live_key_has_its_slot(pattern, tokens, kv_heads, first, data):
    cuts = data.draw(st.lists(st.integers(1, tokens), max_size=12))
    check(pattern, tokens, kv_heads, first, first + kv_heads + 1, cuts)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_off_by_one_is_caught(plant):
    pattern = Pattern(sink_tokens=5, window=9, block=4, stride=4, phase="per_head")
    cuts = range(1, 70)
    check(pattern, 70, 2, 1, 3, cuts)
    with pytest.raises((AssertionError, IndexError)):
        check(pattern, 70, 2, 1, 3, cuts, PLANTS[plant])


def test_padding_has_no_slot():
    pattern = Pattern(sink_tokens=2, window=5, block=2, stride=3, phase="per_head")
    positions = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, -1]])
    places = Slots(pattern, 40, 2).place(positions, torch.tensor([[2], [3]]))
    assert torch.equal(places < 0, (positions < 0).expand(places.shape))

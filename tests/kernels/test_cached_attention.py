"""cached_attention reads every argument that it is given, by the kernels and by torch alike."""

import pytest
import torch

from kernels.cached_attention import cached_attention
from kernels.pattern import Pattern
from tests.kernels.over_slots import (
    DEVICE,
    FIRST,
    PATTERNS,
    TOTAL,
    attention_over_slots,
    tensors,
)

SLOTS, HEADS, KV_HEADS = 50, 6, 2
SHARD = {"first_kv_head": FIRST, "total_kv_heads": TOTAL}


@pytest.fixture(params=["decode", "chunk", "torch"], autouse=True)
def path(request, monkeypatch):
    """Triton's interpreter stands in for a GPU; chunk.py takes what is too much for decode.py."""
    served = request.param != "torch"
    monkeypatch.setattr("kernels.cached_attention.kernels_serve", lambda q: served)
    if request.param == "chunk":
        monkeypatch.setattr("kernels.decode.MOST_QUERIES", 2)


def check(pattern, new_tokens, where, used, expected_where, expected_pattern=None):
    """What is not in use must not be read: NaN there would show."""
    q, k, v = tensors(2, new_tokens, HEADS, KV_HEADS, SLOTS, 64)
    expected = attention_over_slots(q, k, v, expected_pattern or pattern, *expected_where)[0]
    if used is not None:
        unused = torch.arange(SLOTS, device=DEVICE) >= used[:, None]
        k[unused[:, None].expand(-1, KV_HEADS, -1)] = 1e4
    found = cached_attention(q, k, v, pattern, *where, slots_used_B=used, **SHARD)
    seen = expected_where[0] >= 0
    error = (found[seen] - expected[seen]).norm() / expected[seen].norm()
    assert error < 1e-5


def positions(new_tokens):
    """Of queries somewhere within the slots, and of slots that are the positions."""
    q_positions = torch.arange(new_tokens, device=DEVICE) + torch.tensor([[9], [20]], device=DEVICE)
    return q_positions, torch.arange(SLOTS, device=DEVICE).expand(2, 1, -1)


@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("name", ["full", "strided"])
@pytest.mark.parametrize("used", [None, [5, 15]])
def test_positions_and_slots_in_use_are_read(name, new_tokens, used):
    q_positions, k_positions = positions(new_tokens)
    used = None if used is None else torch.tensor(used, dtype=torch.int32, device=DEVICE)
    there = k_positions
    if used is not None:
        there = k_positions.masked_fill(k_positions >= used[:, None, None], -1)
    where = q_positions, k_positions
    check(PATTERNS[name], new_tokens, where, used, (q_positions, there))


@pytest.mark.parametrize("used", [None, [5, 15]])
def test_without_positions_every_slot_in_use_is_seen(used):
    used = None if used is None else torch.tensor(used, dtype=torch.int32, device=DEVICE)
    k_positions = positions(1)[1]
    if used is not None:
        k_positions = k_positions.masked_fill(k_positions >= used[:, None, None], -1)
    everywhere = torch.full((2, 1), SLOTS, device=DEVICE)
    expected = (everywhere, k_positions)
    check(PATTERNS["no_sinks"], 1, (None, None), used, expected, Pattern.full())


def test_a_row_without_a_token_gives_no_nan():
    q, k, v = tensors(2, 1, HEADS, KV_HEADS, SLOTS, 64)
    used = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    assert not cached_attention(q, k, v, Pattern.full(), slots_used_B=used).isnan().any()


@pytest.mark.parametrize("given", [0, 1])
def test_one_of_two_positions_is_refused(given):
    q, k, v = tensors(2, 1, HEADS, KV_HEADS, SLOTS, 64)
    where = [x if place == given else None for place, x in enumerate(positions(1))]
    with pytest.raises(ValueError, match=r"_positions_\w+ is missing: pass positions of both"):
        cached_attention(q, k, v, Pattern.full(), *where)

"""The four views of a Pattern agree, and a planted off-by-one in any of them is caught."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.pattern import Pattern

patterns = st.builds(
    Pattern,
    sink_tokens=st.integers(0, 20),
    window=st.one_of(st.none(), st.integers(1, 24)),
    block=st.one_of(st.integers(1, 8), st.just(2**40)),
    stride=st.one_of(st.none(), st.integers(1, 6)),
    phase=st.sampled_from(["shared", "per_head"]),
)


def definition(pattern: Pattern, q: int, k: int, phase: int) -> bool:
    """Written from the paper's words, without the code under test."""
    if k > q:
        return False
    if pattern.window is None or k < pattern.sink_tokens or q - k < pattern.window:
        return True
    return pattern.stride is not None and (k // pattern.block) % pattern.stride == phase


def expected_phase(pattern: Pattern, head: int, heads: int) -> int:
    if pattern.stride is None or pattern.phase == "shared":
        return 0
    return head * pattern.stride // heads


def check_views(pattern: Pattern, lengths: list[int], heads: int, tile: int) -> None:
    pairs = 0
    for head in range(heads):
        phase = expected_phase(pattern, head, heads)
        for length in lengths:
            index = torch.arange(length)
            seen = pattern.visible(index[:, None], index[None, :], head, heads).numpy()
            wanted = np.array(
                [[definition(pattern, q, k, phase) for k in range(length)] for q in range(length)]
            ).reshape(length, length)
            assert (seen == wanted).all()
            pairs += int(wanted.sum())
            for q0 in range(0, length, tile):
                q1 = min(q0 + tile, length)
                keys = pattern.key_ranges(q0, q1, head, heads).positions()
                assert len(set(keys.tolist())) == len(keys)
                # The union over the tile: all that is seen, and no key that nobody sees but for
                # window keys between two queries.
                needed = np.flatnonzero(wanted[q0:q1].any(axis=0))
                assert set(needed) == set(keys.tolist())
            dropped = set()
            for at in range(length):
                live = set(pattern.live(at, head, heads).tolist())
                assert live == {k for k in range(at) if definition(pattern, at, k, phase)}
                assert not live & dropped
                dropped |= set(range(at)) - live
    assert pattern.pairs(lengths, heads) == pairs


@settings(max_examples=150, deadline=None)
@given(
    patterns,
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 33),
)
def test_views_agree(pattern, lengths, heads, tile):
    check_views(pattern, lengths, heads, tile)


EXAMPLE = Pattern(sink_tokens=5, window=9, block=4, stride=3, phase="per_head")


@pytest.mark.parametrize("field", ["sink_tokens", "window", "stride"])
@pytest.mark.parametrize("view", ["visible", "key_ranges", "live", "pairs"])
def test_off_by_one_is_caught(monkeypatch, field, view):
    """Each view alone computed from a pattern that is off by one disagrees with the rest."""
    wrong = Pattern(**{**EXAMPLE.__dict__, field: getattr(EXAMPLE, field) + 1})
    honest = getattr(Pattern, view)

    def planted(self, *args, **kwargs):
        return honest(wrong if self == EXAMPLE else self, *args, **kwargs)

    monkeypatch.setattr(Pattern, view, planted)
    with pytest.raises(AssertionError):
        check_views(EXAMPLE, [60], 3, 7)


def test_off_by_one_phase_is_caught(monkeypatch):
    honest = Pattern.phase_of
    monkeypatch.setattr(
        Pattern, "phase_of", lambda self, h, g: (honest(self, h, g) + 1) % self.stride
    )
    with pytest.raises(AssertionError):
        check_views(EXAMPLE, [60], 3, 7)


def test_papers_budget():
    """2,112 keys at 128K for the sink variant; 2,048 strided ones plus window for the other."""
    sink = Pattern(sink_tokens=64, window=2048)
    assert len(sink.live(131072)) == 64 + 2047
    strided = Pattern(sink_tokens=64, window=1024, block=64, stride=64)
    assert len(strided.live(131072)) == 64 + 31 * 64 + 1023


def test_pairs_of_full_is_a_triangle():
    assert Pattern.full().pairs([131072], 2) == 2 * 131072 * 131073 // 2
    assert Pattern.full().pairs([]) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("sink_tokens", -1), ("window", 0), ("block", 0), ("stride", 0), ("phase", "none")],
)
def test_refusals_name_value_and_remedy(field, value):
    with pytest.raises(ValueError, match=f"pattern.{field}={value!r}.*must be.*set pattern"):
        Pattern(**{field: value})


def test_refuses_head_and_query_range():
    with pytest.raises(ValueError, match="kv_head=4"):
        Pattern(stride=2).visible(torch.tensor(1), torch.tensor(0), 4, 4)
    with pytest.raises(ValueError, match=r"queries \[3, 3\)"):
        Pattern().key_ranges(3, 3)
    with pytest.raises(ValueError, match="document length -1"):
        Pattern().pairs([-1])

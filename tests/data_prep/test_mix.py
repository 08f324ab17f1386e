"""Held-out split, length upsampling and the token budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.mix import (
    Pool,
    Upsampling,
    Wanted,
    choose,
    copies_of_held_out,
    draw,
    hold_out,
    kept,
    repeated,
    share_budget,
)
from data_prep.sources import DataError


def pool(name, lengths, seed=1, digests=None):
    count = len(lengths)
    return Pool(
        name,
        np.array(lengths, np.int64),
        np.array([draw(seed, "held out", name, str(i)) for i in range(count)]),
        np.array([draw(seed, "keep", name, str(i)) for i in range(count)]),
        np.array(range(count) if digests is None else digests, np.uint64),
        np.ones(count, bool),
    )


def test_draws_are_uniform_and_depend_on_every_argument():
    values = np.array([draw(1, "keep", "s", str(i)) for i in range(4000)])
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    assert abs((values < 0.1).mean() - 0.1) < 0.015
    base = (1, "keep", "s", "d")
    for changed in [(2, *base[1:]), (1, "held out", "s", "d"), (1, "keep", "t", "d")]:
        assert draw(*changed) != draw(*base)


@given(
    tokens=st.integers(1_000, 10**12),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
)
def test_shares_sum_to_the_budget_and_follow_the_weights(tokens, weights):
    if min(weights) / sum(weights) * tokens < 2:
        return
    shares = share_budget(tokens, weights)
    assert sum(shares) == tokens
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - tokens * weight / sum(weights)) <= 1 + 1e-9 * tokens


def test_a_budget_too_small_for_a_source_is_refused():
    with pytest.raises(DataError, match=r"data\.tokens=3: gives shares of .*set data\.tokens"):
        share_budget(3, [1000.0, 1.0])


def test_upsampling_keeps_long_documents_and_a_share_of_the_short_ones():
    documents = pool("s", [99] * 3000 + [100] * 50)
    mask = kept(documents.lengths, documents.keep_draw, Upsampling(100, 0.1))
    assert mask[3000:].all()
    assert abs(mask[:3000].mean() - 0.1) < 0.02
    assert kept(documents.lengths, documents.keep_draw, None).all()
    assert not kept(documents.lengths, documents.keep_draw, Upsampling(100, 0.0))[:3000].any()
    assert kept(documents.lengths, documents.keep_draw, Upsampling(100, 1.0)).all()


def test_wrong_upsampling_is_refused():
    with pytest.raises(DataError, match="keep_short=1.5: must be"):
        Upsampling(100, 1.5)
    with pytest.raises(DataError, match="threshold=0"):
        Upsampling(0, 0.5)


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    fraction=st.floats(0.001, 0.999),
    max_tokens=st.none() | st.integers(1, 500),
    seed=st.integers(0, 100),
)
@settings(deadline=None)
def test_some_document_is_held_out_and_each_source_keeps_one(counts, fraction, max_tokens, seed):
    pools = [pool(f"s{i}", range(1, n + 1), seed) for i, n in enumerate(counts)]
    if max(counts) == 1:
        with pytest.raises(DataError, match="have one document each: none can be held out"):
            hold_out(pools, fraction, max_tokens)
        return
    held = hold_out(pools, fraction, max_tokens)
    total = sum(mask.sum() for mask in held)
    assert total >= 1
    assert all((~mask).any() for mask in held)
    if max_tokens is not None and total > 1:
        assert sum(p.lengths[m].sum() for p, m in zip(pools, held, strict=True)) <= max_tokens


def test_the_held_out_fraction_is_met_and_capped_in_the_order_of_draws():
    documents = pool("s", [10] * 2000)
    (mask,) = hold_out([documents], 0.05, None)
    assert abs(mask.mean() - 0.05) < 0.02
    (capped,) = hold_out([documents], 0.05, 250)
    assert capped.sum() == 25
    assert documents.held_draw[capped].max() < documents.held_draw[mask & ~capped].min()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_that_hold_out_nothing_or_everything_are_refused(fraction):
    with pytest.raises(DataError, match=r"data\.held_out=.*above 0 and below 1"):
        hold_out([pool("s", [1, 2])], fraction, None)


def test_copies_of_held_out_documents_are_found_in_every_source():
    pools = [pool("a", [5, 5, 5], digests=[1, 2, 3]), pool("b", [5, 5], digests=[2, 1])]
    held = [np.array([True, False, False]), np.array([False, False])]
    first, second = copies_of_held_out(pools, held)
    assert first.tolist() == [False, False, False]
    assert second.tolist() == [False, True]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    budget=st.integers(1, 2000),
    data=st.data(),
)
def test_the_budget_is_met_exactly_with_whole_documents_but_the_last(lengths, budget, data):
    lengths = np.array(lengths)
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths))))[: len(lengths)]
    usable[0] = True
    choice = choose("s", lengths, usable, budget, seed=1)
    assert choice.lengths.sum() == budget
    assert usable[choice.documents].all()
    assert (choice.lengths[:-1] == lengths[choice.documents[:-1]]).all()
    assert 0 < choice.lengths[-1] <= lengths[choice.documents[-1]]
    times = np.bincount(choice.documents, minlength=len(lengths))[usable]
    assert times.max() - times.min() <= 1
    assert choice.epochs == budget / lengths[usable].sum()


def test_epochs_differ_in_order_and_no_budget_means_once():
    lengths = np.full(50, 3)
    usable = np.ones(50, bool)
    twice = choose("s", lengths, usable, 300, seed=1).documents
    assert twice[:50].tolist() == list(range(50))
    assert sorted(twice[50:]) == list(range(50)) != twice[50:].tolist()
    assert choose("s", lengths, usable, None, seed=1).documents.tolist() == list(range(50))


def test_a_source_with_nothing_left_to_train_on_is_refused():
    with pytest.raises(DataError, match="source s: none of its 2 documents is left"):
        choose("s", np.array([1, 2]), np.zeros(2, bool), 10, seed=1)


def test_the_first_of_documents_with_one_text_stays():
    pools = [pool("a", [5, 5, 5], digests=[1, 2, 1]), pool("b", [5, 5, 5], digests=[2, 3, 3])]
    first, second = repeated(pools)
    assert first.tolist() == [False, False, True]
    assert second.tolist() == [True, False, True]
    pools[0].allowed[1] = False
    assert repeated(pools)[1].tolist() == [False, False, True]


def test_documents_that_are_not_allowed_are_never_held_out():
    documents = pool("s", [5, 5, 5])
    documents.allowed[:] = [True, False, True]
    for seed in range(20):
        drawn = pool("s", [5, 5, 5], seed)
        drawn.allowed[:] = [True, False, True]
        (mask,) = hold_out([drawn], 0.5, None)
        assert mask.sum() == 1 and not mask[1]


@given(
    tokens=st.integers(1, 30),
    draws=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    contaminated=st.booleans(),
    most=st.none() | st.integers(5, 20),
)
def test_the_verdict_on_one_document_is_that_of_the_masks(tokens, draws, contaminated, most):
    wanted = Wanted(0.3, Upsampling(12, 0.4), min_tokens=5, max_tokens=most)
    lengths = np.array([tokens])
    allowed = wanted.allowed(lengths) & ~np.array([contaminated])
    is_held = bool(allowed[0] and draws[0] < 0.3)
    usable = kept(lengths, np.array([draws[1]]), wanted.upsampling) & allowed & (not is_held)
    assert wanted.verdict(tokens, *draws, contaminated) == (bool(usable[0]), is_held)


def test_bounds_of_length_in_a_wrong_order_are_refused():
    with pytest.raises(DataError, match="min_tokens=9, max_tokens=5: must be 1 or more and in"):
        Wanted(0.1, None, 9, 5)
    with pytest.raises(DataError, match="min_tokens=0"):
        Wanted(0.1, None, 0)

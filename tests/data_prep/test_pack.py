"""Packing: every token in exactly one place, rows of exact length, pieces that tile documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.pack import pack
from data_prep.sources import DataError

LENGTHS = st.lists(st.integers(1, 70), max_size=40)
SEQ_LENGTH = st.integers(2, 25)
PACKING = st.sampled_from(["concat", "best_fit"])


def pieces_of(plan, row):
    return range(plan.row_start[row], plan.row_start[row + 1])


@given(lengths=LENGTHS, seq_length=SEQ_LENGTH, packing=PACKING)
def test_every_token_stands_exactly_once_in_rows_that_fit(lengths, seq_length, packing):
    plan = pack(np.array(lengths, np.int64), seq_length, packing)
    seen = [np.zeros(n, int) for n in lengths]
    for document, start, length in zip(plan.document, plan.start, plan.length, strict=True):
        assert length > 0
        assert start + length <= lengths[document]
        seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    assert plan.row_start[0] == 0
    assert plan.row_start[-1] == len(plan.length)
    sums = [plan.length[list(pieces_of(plan, row))].sum() for row in range(plan.rows)]
    assert all(0 < total <= seq_length for total in sums)
    if plan.rows:
        assert plan.fill_rate == sum(lengths) / (plan.rows * seq_length)


@given(lengths=LENGTHS, seq_length=SEQ_LENGTH)
def test_concat_keeps_the_stream_and_pads_the_last_row_only(lengths, seq_length):
    plan = pack(np.array(lengths, np.int64), seq_length, "concat")
    stream = [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    rows = [
        [
            (plan.document[p], plan.start[p] + i)
            for p in pieces_of(plan, row)
            for i in range(plan.length[p])
        ]
        for row in range(plan.rows)
    ]
    assert sum(rows, []) == stream
    assert all(len(row) == seq_length for row in rows[:-1])


@given(lengths=LENGTHS, seq_length=SEQ_LENGTH)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, seq_length):
    plan = pack(np.array(lengths, np.int64), seq_length, "best_fit")
    pieces = np.bincount(plan.document, minlength=len(lengths))
    assert pieces.tolist() == [-(-n // seq_length) for n in lengths]
    # any two rows that are both at most half full could have been one
    used = np.array([plan.length[list(pieces_of(plan, row))].sum() for row in range(plan.rows)])
    assert (used * 2 <= seq_length).sum() <= 1


def test_best_fit_takes_the_fullest_row_that_holds_a_document():
    # 7 and 6 open rows with 3 and 4 left: 3 goes to the first, exactly full, 4 to the second
    plan = pack(np.array([3, 4, 7, 6]), 10, "best_fit")
    rows = [plan.document[list(pieces_of(plan, row))].tolist() for row in range(plan.rows)]
    assert sorted(map(sorted, rows)) == [[0, 2], [1, 3]]
    assert plan.fill_rate == 1


def test_best_fit_fills_rows_of_many_documents():
    lengths = np.random.default_rng(1).lognormal(5, 1, 20_000).astype(np.int64) + 1
    assert pack(lengths, 4096, "best_fit").fill_rate > 0.999


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_document_of_many_rows_becomes_a_document_in_each(packing):
    plan = pack(np.array([5, 1_000_003]), 100, packing)
    long = np.sort(plan.start[plan.document == 1])
    assert plan.rows == 10_001
    assert len(long) == 10_001
    assert (np.diff(long) <= 100).all()


def test_unknown_packing_and_rows_of_one_token_are_refused():
    with pytest.raises(DataError, match="data.packing='sort': must be one of concat, best_fit"):
        pack(np.array([1]), 8, "sort")
    with pytest.raises(DataError, match="data.seq_length=1: must be 2 or more"):
        pack(np.array([1]), 1, "concat")

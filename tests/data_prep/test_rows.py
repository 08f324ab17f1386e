"""Rows written in parts by several processes are the plan's, in shuffled order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import rows
from data_prep.pack import pack
from data_prep.rows import PIECE, TokenFiles, index_rows, plan_rows, write_rows
from data_prep.shards import PackedRows
from data_prep.sources import DataError

PAD = 65_535


def store(folder, lengths):
    """Documents in two files, and the PIECE that is each; document d's tokens are d * 1000 + i."""
    pieces = np.zeros(len(lengths), PIECE)
    parts = ([], [])
    for number, length in enumerate(lengths):
        file = number % 2
        pieces[number] = (file, sum(map(len, parts[file])), length)
        parts[file].append(np.arange(length) + 1000 * number)
    files = []
    for number, part in enumerate(parts):
        files.append(folder / f"{number}.bin")
        np.concatenate([[], *part]).astype(np.uint16).tofile(files[-1])
    return pieces, files


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_length=st.integers(2, 20),
    packing=st.sampled_from(["concat", "best_fit"]),
    task_rows=st.integers(1, 5),
    most_open=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
def test_every_token_is_where_the_plan_says(
    tmp_path_factory, lengths, seq_length, packing, task_rows, most_open
):
    folder = tmp_path_factory.mktemp("rows")
    pieces, files = store(folder, lengths)
    plan = pack(lengths, seq_length, packing)
    before = rows._TASK_TOKENS, rows._MOST_OPEN
    rows._TASK_TOKENS, rows._MOST_OPEN = task_rows * seq_length, most_open
    try:
        tasks = list(plan_rows(folder / "x", plan, pieces, files, "uint16", PAD, folder, 1))
        for task in reversed(tasks):
            write_rows(task)
    finally:
        rows._TASK_TOKENS, rows._MOST_OPEN = before
    index_rows(folder / "x", plan, "uint16")
    found = PackedRows(folder / "x")
    order = np.random.default_rng(1).permutation(plan.rows)
    assert len(found) == plan.rows
    seen = [np.zeros(length, int) for length in lengths]
    for row, number in zip(found, order, strict=True):
        at = 0
        span = range(plan.row_start[number], plan.row_start[number + 1])
        for piece, length in zip(span, row.document_lengths, strict=True):
            document, start = plan.document[piece], plan.start[piece]
            expected = 1000 * document + start + np.arange(length)
            assert row.tokens[at : at + length].tolist() == expected.tolist()
            seen[document][start : start + length] += 1
            at += length
        assert (row.tokens[at:] == PAD).all() and row.padding == seq_length - at
    assert all((counts == 1).all() for counts in seen)


def test_a_token_file_that_is_shorter_is_refused(tmp_path):
    pieces, files = store(tmp_path, [10])
    files[0].write_bytes(files[0].read_bytes()[:-2])
    with pytest.raises(DataError, match="ends before token 10; remove the folder of units"):
        TokenFiles(files, np.dtype("uint16")).read(pieces[0], np.empty(10, np.uint16))

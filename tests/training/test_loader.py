"""Labels, document bounds and the one integer that is the loader's whole state."""

import numpy as np
import pytest
import torch

from model.loss import IGNORED
from pipeline.training.loader import Loader, collate
from tests.training.small_training import RandomRows


def test_labels_shift_over_the_row_and_stop_at_documents_and_padding():
    row = (np.arange(10, 22), np.array([5, 4]), 3)
    batch = collate([row], document_mask=True)
    i = IGNORED
    assert batch.labels_BS.tolist() == [[11, 12, 13, 14, i, 16, 17, 18, i, i, i, i]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert batch.valid_tokens == 7


def test_without_a_document_mask_a_row_is_one_document():
    rows = [(np.arange(12), np.array([5, 4]), 3), (np.arange(12), np.array([12]), 0)]
    batch = collate(rows, document_mask=False)
    assert batch.cu_seqlens.tolist() == [0, 12, 24]
    assert batch.positions_BS.tolist() == [list(range(12))] * 2
    # What has no next token of its own document has none to predict either way.
    assert batch.labels_BS[0, 4] == IGNORED
    assert batch.valid_tokens == 7 + 11


@pytest.mark.parametrize("size", [1, 2, 4])
def test_global_order_does_not_depend_on_the_data_parallel_size(size):
    rows = RandomRows(10, 32)

    def rows_of(rank):
        loader = Loader(
            rows,
            rows_per_step=8,
            micro_batch_rows=1,
            seed=3,
            document_mask=True,
            rank=rank,
            size=size,
        )
        return [batch.tokens_BS[0] for batch in loader.step(16)]

    shares = [rows_of(rank) for rank in range(size)]
    together = [share[i] for i in range(8 // size) for share in shares]
    alone = Loader(rows, rows_per_step=8, micro_batch_rows=8, seed=3, document_mask=True)
    assert torch.equal(torch.stack(together), alone.step(16)[0].tokens_BS)


def test_each_epoch_sees_every_row_once_in_another_order():
    loader = Loader(RandomRows(7, 32), rows_per_step=1, micro_batch_rows=1, seed=1, document_mask=1)
    first, second = ([loader.row_index(e * 7 + i) for i in range(7)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert [loader.row_index(i) for i in range(7)] == first

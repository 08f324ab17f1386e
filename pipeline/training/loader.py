"""Packed rows to batches, in one global order whose whole state is the number of rows consumed.

Shapes: B rows, S row length, U Ulysses size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from model.loss import IGNORED
from pipeline.schema import TrainSection
from pipeline.training.layout import Layout


class Rows(Protocol):
    """Packed rows: data_prep.shards.PackedRows or anything that reads like it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens [S], lengths of the documents in them, and the padding behind them."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: what HybridGPT takes, and what its loss and its cost count."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    cu_seqlens: torch.Tensor
    valid_tokens: int

    @property
    def lengths(self) -> list[int]:
        """Document lengths as attention sees them, over all rows."""
        return self.cu_seqlens.diff().tolist()

    def shard(self, rank: int, size: int) -> Batch:
        """The positions of Ulysses rank `rank` of `size`: [B, S / U]; cu_seqlens stays whole."""
        if size == 1:
            return self
        tokens, labels, positions = (
            x.chunk(size, dim=1)[rank].contiguous()
            for x in (self.tokens_BS, self.labels_BS, self.positions_BS)
        )
        valid = int((labels != IGNORED).sum())
        return Batch(tokens, labels, positions, self.cu_seqlens, valid)

    def to(self, device: torch.device) -> Batch:
        """On `device`, but for cu_seqlens, which the attention reads on the host."""
        return Batch(
            self.tokens_BS.to(device, non_blocking=True),
            self.labels_BS.to(device, non_blocking=True),
            self.positions_BS.to(device, non_blocking=True),
            self.cu_seqlens,
            self.valid_tokens,
        )


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray, int]], document_mask: bool) -> Batch:
    """Rows to a batch: labels shifted over the whole row, before anything is sharded.

    The last token of each document and the padding have no label, whether or not attention is
    masked by document.
    """
    tokens = torch.from_numpy(np.stack([row[0] for row in rows]).astype(np.int64))
    length = tokens.shape[1]
    labels = tokens.roll(-1, dims=1)
    positions = torch.empty_like(tokens)
    bounds = [0]
    for index, (_, lengths, padding) in enumerate(rows):
        ends = np.cumsum(lengths)
        labels[index, torch.from_numpy(ends - 1)] = IGNORED
        labels[index, length - padding :] = IGNORED
        pieces = [int(n) for n in lengths] + ([int(padding)] if padding else [])
        if not document_mask:
            pieces = [length]
        positions[index] = torch.cat([torch.arange(n) for n in pieces])
        for n in pieces:
            bounds.append(bounds[-1] + n)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return Batch(tokens, labels, positions, cu_seqlens, int((labels != IGNORED).sum()))


class Loader:
    """The micro-batches of each step, the same global rows for any data-parallel size."""

    def __init__(
        self,
        rows: Rows,
        *,
        rows_per_step: int,
        micro_batch_rows: int,
        seed: int,
        document_mask: bool,
        rank: int = 0,
        size: int = 1,
        ulysses_rank: int = 0,
        ulysses_size: int = 1,
    ) -> None:
        """Which rows, and which positions of them, this process reads.

        Args:
            rank, size: its place among those that read different rows.
            ulysses_rank, ulysses_size: its place among those that share them by position.
        """
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.micro_batch_rows = micro_batch_rows
        self.seed = seed
        self.document_mask = document_mask
        self.rank, self.size = rank, size
        self.ulysses_rank, self.ulysses_size = ulysses_rank, ulysses_size
        self._order: tuple[int, np.ndarray] | None = None

    @classmethod
    def of(cls, rows: Rows, train: TrainSection, layout: Layout) -> Loader:
        """The loader of this process of `layout`."""
        return cls(
            rows,
            rows_per_step=train.rows_per_step,
            micro_batch_rows=train.micro_batch_rows,
            seed=train.seed,
            document_mask=train.document_mask,
            rank=layout.rows_rank,
            size=layout.rows_size,
            ulysses_rank=layout.ulysses_rank,
            ulysses_size=layout.ulysses_size,
        )

    def row_index(self, consumed: int) -> int:
        """Which row comes after `consumed` rows: each epoch is a new permutation by the seed."""
        epoch, place = divmod(consumed, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._order = (epoch, order)
        return int(self._order[1][place])

    def step(self, consumed: int) -> list[Batch]:
        """This process's micro-batches of the step that begins after `consumed` rows."""
        mine = range(consumed + self.rank, consumed + self.rows_per_step, self.size)
        rows = [self.rows[self.row_index(i)] for i in mine]
        batches = [
            collate(rows[i : i + self.micro_batch_rows], self.document_mask)
            for i in range(0, len(rows), self.micro_batch_rows)
        ]
        return [batch.shard(self.ulysses_rank, self.ulysses_size) for batch in batches]

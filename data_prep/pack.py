"""Which piece of which document stands in which row: plans made from lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from data_prep.sources import DataError


@dataclass(frozen=True)
class Plan:
    """Rows of pieces. Piece p is tokens [start[p], start[p] + length[p]) of document[p].

    Row r holds the pieces row_start[r] to row_start[r + 1], in order; what they leave of
    seq_length is padding. All int64.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_start: np.ndarray
    seq_length: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_start) - 1

    @property
    def fill_rate(self) -> float:
        """Tokens of documents over all tokens of all rows, padding included."""
        return float(self.length.sum()) / (self.rows * self.seq_length) if self.rows else 0.0


def pack(lengths: np.ndarray, seq_length: int, packing: str) -> Plan:
    """Plan rows of seq_length tokens for documents of these lengths [documents], in this order.

    Every token has exactly one place. A piece that goes on from the row before is a document of
    its own there. "concat" joins the documents and cuts them into rows: only the last row can have
    padding. "best_fit" keeps documents of at most a row whole, longest first, each in the fullest
    row that still holds it, and cuts longer ones into rows and a rest that is placed likewise
    (best-fit-decreasing packing, Ding et al. 2024, arXiv 2404.10830).

    Raises:
        DataError: on an unknown packing, or seq_length below 2.
    """
    plans = {"concat": _concat, "best_fit": _best_fit}
    if packing not in plans:
        raise DataError(
            f"data.packing={packing!r}: must be one of {', '.join(plans)}; set data.packing"
        )
    if seq_length < 2:
        raise DataError(
            f"data.seq_length={seq_length}: must be 2 or more, or no token has a next one to "
            "learn; set data.seq_length"
        )
    return plans[packing](np.asarray(lengths, np.int64), seq_length)


def _concat(lengths: np.ndarray, seq_length: int) -> Plan:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    row_ends = np.arange(0, total, seq_length)
    cuts = np.union1d(row_ends, np.concatenate([[0], ends]))
    first = cuts[:-1]
    document = np.searchsorted(ends, first, side="right")
    return Plan(
        document=document,
        start=first - (ends - lengths)[document],
        length=np.diff(cuts),
        row_start=np.append(np.searchsorted(first, row_ends), len(first)),
        seq_length=seq_length,
    )


def _best_fit(lengths: np.ndarray, seq_length: int) -> Plan:
    whole = lengths // seq_length
    document = np.repeat(np.arange(len(lengths)), whole)
    # 0, 1, 2, ... within each document
    nth = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    rest = lengths % seq_length
    order = np.argsort(-rest, kind="stable")
    order = order[rest[order] > 0]
    row = np.empty(len(order), np.int64)
    # rows by the space they have left; `spaces` lists the spaces that occur, ascending
    open_rows: dict[int, list[int]] = {}
    spaces: list[int] = []
    rows = len(document)
    for place, size in enumerate(rest[order].tolist()):
        at = bisect_left(spaces, size)
        if at == len(spaces):
            row[place], left = rows, seq_length - size
            rows += 1
        else:
            space = spaces[at]
            row[place], left = open_rows[space].pop(), space - size
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(spaces, left)
            open_rows[left].append(int(row[place]))
    by_row = np.argsort(row, kind="stable")
    rest_document = order[by_row]
    counts = np.bincount(row, minlength=rows) + (np.arange(rows) < len(document))
    return Plan(
        document=np.concatenate([document, rest_document]),
        start=np.concatenate([nth * seq_length, (whole * seq_length)[rest_document]]),
        length=np.concatenate([np.full(len(document), seq_length), rest[rest_document]]),
        row_start=np.concatenate([[0], np.cumsum(counts)]),
        seq_length=seq_length,
    )

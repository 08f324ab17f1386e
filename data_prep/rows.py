"""Packed rows on disk, written by several processes at once: each row has its place in the file."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.pack import Plan
from data_prep.shards import IndexedWriter, disk_errors, lengths_prefix, write_index
from data_prep.sources import DataError

# A piece of a row: tokens [start, start + length) of a file of a list.
PIECE = np.dtype([("file", "<i4"), ("start", "<i8"), ("length", "<i4")])
# What one process writes at a time, and how many files it keeps open.
_TASK_TOKENS = 1 << 24
_MOST_OPEN = 256


@dataclass(frozen=True)
class RowsTask:
    """Rows [first, last) of PREFIX.bin, to be written from the token files in `files`.

    pieces: a .npy of PIECEs in the order of the rows; row_start: a .npy of where each row's begin.
    """

    path: Path
    pieces: Path
    row_start: Path
    files: tuple[Path, ...]
    first: int
    last: int
    seq_length: int
    dtype: str
    pad_id: int


class TokenFiles:
    """Reads pieces of many token files, of which few are open at a time."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype) -> None:
        self._files = files
        self._dtype = dtype
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, piece: np.void, into: np.ndarray) -> None:
        """Fill `into` with a PIECE's tokens.

        Raises:
            DataError: when the file ends before.
        """
        number = int(piece["file"])
        descriptor = self._open.pop(number, None)
        if descriptor is None:
            descriptor = os.open(self._files[number], os.O_RDONLY)
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open[number] = descriptor
        view = memoryview(into).cast("B")
        if os.preadv(descriptor, [view], int(piece["start"]) * self._dtype.itemsize) != len(view):
            raise DataError(
                f"{self._files[number]}: ends before token {piece['start'] + piece['length']}; "
                "remove the folder of units that it is in, and run again"
            )

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            os.close(self._open.popitem()[1])


def write_rows(task: RowsTask) -> None:
    """Write the rows of a task at their places in its file, which is there already.

    Raises:
        DataError: on a token file that is shorter than its index said.
    """
    dtype = np.dtype(task.dtype)
    pieces = np.load(task.pieces, mmap_mode="r")
    row_start = np.load(task.row_start, mmap_mode="r")
    row_bytes = task.seq_length * dtype.itemsize
    row = np.empty(task.seq_length, dtype)
    files = TokenFiles(task.files, dtype)
    descriptor = os.open(task.path, os.O_WRONLY)
    try:
        with disk_errors(task.path):
            for number in range(task.first, task.last):
                at = 0
                for piece in pieces[row_start[number] : row_start[number + 1]]:
                    files.read(piece, row[at : at + piece["length"]])
                    at += int(piece["length"])
                row[at:] = task.pad_id
                os.pwrite(descriptor, memoryview(row).cast("B"), number * row_bytes)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
        files.close()


def plan_rows(
    prefix: Path,
    plan: Plan,
    pieces_of: np.ndarray,
    files: Sequence[Path],
    dtype: str,
    pad_id: int,
    scratch: Path,
    seed: int,
) -> Iterator[RowsTask]:
    """Write the lengths of a packed file's rows, in shuffled order, and yield the tasks for rows.

    Args:
        prefix: PREFIX.bin becomes the rows (PREFIX.idx is index_rows'), PREFIX_lengths.* the
            lengths of their pieces.
        pieces_of: the PIECE that is the whole document, for each document of the plan.
        scratch: a folder for what the tasks read.

    Raises:
        DataError: on a full disk, before any row is written where the disk can tell.
    """
    order = np.random.default_rng(seed).permutation(plan.rows)
    counts = np.diff(plan.row_start)[order]
    row_start = np.concatenate([[0], np.cumsum(counts)])
    # where each piece stands in the plan: its row's first, and on from there
    place = np.repeat(plan.row_start[:-1][order] - row_start[:-1], counts)
    place = place + np.arange(len(place))
    pieces = pieces_of[plan.document[place]].copy()
    pieces["start"] += plan.start[place]
    pieces["length"] = plan.length[place]
    lengths = np.split(pieces["length"], row_start[1:-1]) if plan.rows else []
    with IndexedWriter(lengths_prefix(prefix), "int32") as writer:
        for row in lengths:
            writer.add(row)
    names = [scratch / f"{prefix.name}_{part}.npy" for part in ("pieces", "row_start")]
    for path, values in zip(names, (pieces, row_start), strict=True):
        with disk_errors(path):
            np.save(path, values)
    path = prefix.with_name(prefix.name + ".bin")
    itemsize = np.dtype(dtype).itemsize
    with disk_errors(path), path.open("wb") as stream:
        if plan.rows:
            os.posix_fallocate(stream.fileno(), 0, plan.rows * plan.seq_length * itemsize)
    step = max(1, _TASK_TOKENS // plan.seq_length)
    for first in range(0, plan.rows, step):
        yield RowsTask(
            path=path,
            pieces=names[0],
            row_start=names[1],
            files=tuple(files),
            first=first,
            last=min(first + step, plan.rows),
            seq_length=plan.seq_length,
            dtype=dtype,
            pad_id=pad_id,
        )


def index_rows(prefix: Path, plan: Plan, dtype: str) -> None:
    """Write PREFIX.idx, once every row is there."""
    write_index(prefix, dtype, np.full(plan.rows, plan.seq_length, np.int32))

"""Token files in megatron-core's IndexedDataset format (PREFIX.bin, PREFIX.idx) and their readers.

Written and read here with numpy alone: importing megatron.core takes some nine seconds in every
process, and its reader takes a truncated file for a whole one. PREFIX.bin holds the items' values
one after another; PREFIX.idx, little-endian: 9 bytes b"MMIDIDX\\0\\0", uint64 version 1, uint8 type
code, uint64 items, uint64 documents + 1, int32 [items] lengths, int64 [items] byte offsets, int64
[documents + 1] first item of each document. Here each item is a document of its own
(megatron/core/datasets/indexed_dataset.py, version 0.16.1).
"""

from __future__ import annotations

import errno
import json
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np

from data_prep.sources import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CODES = {name: code for code, name in _DTYPES.items()}


class PackedRow(NamedTuple):
    """tokens int64 [seq_length]; document_lengths int64, summing to seq_length - padding."""

    tokens: np.ndarray
    document_lengths: np.ndarray
    padding: int


def token_dtype(vocab_size: int) -> str:
    """The type that megatron-core picks for a vocabulary (DType.optimal_dtype)."""
    return "uint16" if vocab_size < 65500 else "int32"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota) while writing `path` into a DataError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{path}: {os.strerror(error.errno)}; free space there or set `outputs` to a larger "
            "disk, and run again: what was half written is not used"
        ) from error


class IndexedWriter:
    """Writes PREFIX.bin as items come and PREFIX.idx on a clean close, so never one half-written.

    A context manager: left by an exception, it writes no index.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.prefix = Path(prefix)
        self.bin_path, _ = _paths(prefix)
        self.dtype = np.dtype(dtype)
        self.lengths = array("i")
        with disk_errors(self.bin_path):
            self._stream = self.bin_path.open("wb")

    def add(self, values: np.ndarray) -> None:
        """Append one item, integers [n] that the writer's dtype can hold.

        Raises:
            DataError: on a full disk, or a value outside the dtype.
        """
        limits = np.iinfo(self.dtype)
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            raise DataError(
                f"{self.bin_path}: values {values.min()} to {values.max()}: {self.dtype} holds "
                f"{limits.min} to {limits.max}; the tokenizer gives ids outside its vocabulary: "
                "check the model folder's tokenizer files"
            )
        with disk_errors(self.bin_path):
            self._stream.write(values.astype(self.dtype).tobytes())
        self.lengths.append(values.size)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            # closing flushes: a second "disk full" must not hide the first
            with suppress(OSError):
                self._stream.close()
            return
        with disk_errors(self.bin_path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        lengths = np.frombuffer(self.lengths, np.int32) if self.lengths else np.empty(0, np.int32)
        write_index(self.prefix, self.dtype.name, lengths)


def write_index(prefix: Path, dtype: str, lengths: np.ndarray) -> None:
    """Write PREFIX.idx for items of these lengths, int32 [items].

    Raises:
        DataError: on a full disk.
    """
    itemsize = np.dtype(dtype).itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    offsets = ends - lengths.astype(np.int64) * itemsize
    count = len(lengths)
    header = _HEADER.pack(_MAGIC, 1, _CODES[dtype], count, count + 1)
    documents = np.arange(count + 1, dtype=np.int64)
    content = header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()
    write_whole(_paths(prefix)[1], content)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: a file that is there is whole.

    Several processes may write one file: the name is each one's own.

    Raises:
        DataError: on a full disk.
    """
    partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")
    with disk_errors(path):
        try:
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


class IndexedReader(Sequence):
    """The items of PREFIX.bin, mapped, not read: [i] is a read-only view in the file's dtype.

    Pickles as its path, so that it can be handed to worker processes.

    Raises:
        DataError: when a file is missing, truncated or of another format.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        bin_path, idx_path = _paths(self.prefix)
        remedy = "write it again with stage=data_prep force=true"
        try:
            index = idx_path.read_bytes()
            bin_bytes = bin_path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}; {remedy}") from error
        if len(index) < _HEADER.size or not index.startswith(_MAGIC):
            raise DataError(
                f"{idx_path}: {len(index)} bytes that do not start as an IndexedDataset's index; "
                f"{remedy}"
            )
        _, version, code, count, documents = _HEADER.unpack_from(index)
        expected = _HEADER.size + 12 * count + 8 * documents
        if version != 1 or code not in _DTYPES or len(index) != expected:
            raise DataError(
                f"{idx_path}: version {version}, type {code}, {len(index)} bytes: must be version "
                f"1, type {sorted(_DTYPES)}, {expected} bytes; {remedy}"
            )
        self.dtype = np.dtype(_DTYPES[code])
        self.lengths = np.frombuffer(index, np.int32, count, _HEADER.size)
        self._starts = (
            np.frombuffer(index, np.int64, count, _HEADER.size + 4 * count) // self.dtype.itemsize
        )
        total = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if bin_bytes != total:
            raise DataError(
                f"{bin_path}: {bin_bytes} bytes: its index says {total}; the file is truncated or "
                f"of another run; {remedy}"
            )
        # numpy cannot map a file of no bytes
        self._values = np.memmap(bin_path, self.dtype, "r") if total else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._starts[index]
        return self._values[start : start + self.lengths[index]]

    def __reduce__(self) -> tuple:
        return type(self), (self.prefix,)


class PackedRows(Sequence):
    """Rows for training: [i] is a PackedRow.

    cu_seqlens of a row are the running sums of document_lengths from 0, with padding as one more
    segment; the last token of each document and padding have no label.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        self._rows = IndexedReader(self.prefix)
        self._lengths = IndexedReader(lengths_prefix(self.prefix))
        if len(self._rows) != len(self._lengths):
            raise DataError(
                f"{self.prefix}: {len(self._rows)} rows, but lengths of {len(self._lengths)}: "
                "files of two runs; write them again with stage=data_prep force=true"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PackedRow:
        tokens = self._rows[index].astype(np.int64)
        lengths = self._lengths[index].astype(np.int64)
        return PackedRow(tokens, lengths, len(tokens) - int(lengths.sum()))

    def __reduce__(self) -> tuple:
        return type(self), (self.prefix,)


class HeldOutDocuments(Sequence):
    """Whole held-out documents: [i] is int64 [tokens], <bos> first; `names[i]` says which.

    names: {"id", "source", "tokens"} of each document, from PREFIX.json.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        self._documents = IndexedReader(self.prefix)
        self.names = json.loads(self.prefix.with_name(self.prefix.name + ".json").read_text())

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._documents[index].astype(np.int64)

    def __reduce__(self) -> tuple:
        return type(self), (self.prefix,)


def _paths(prefix: Path) -> tuple[Path, Path]:
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def lengths_prefix(prefix: Path) -> Path:
    """Of the file that holds the document lengths of a packed file."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + "_lengths")

"""Streaming readers: text files, JSON lines, parquet and arrow files and folders become documents.

A reader holds a piece of a text file, a JSON line or a batch of rows in memory, never a whole
source.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.long_json import Unusable, text_of, text_pieces, value_at
from data_prep.sources import DataError, Part, Skips, Source, kind_of, plan_units

_CHUNK_BYTES = 1 << 20
# A longer line is never held as a parsed record beside its bytes.
LONG_LINE_BYTES = 16 << 20
_TABLE_ROWS = 64
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


@dataclass(frozen=True)
class Document:
    """One text, in pieces that are read as they are taken, once.

    `id` is stable: the file's path inside the source, with :LINE or :ROW from 1, or @BYTE where a
    large file of JSON lines is read in ranges. Taking pieces raises Unusable where the text turns
    out to be none: what came of it before is void.
    """

    id: str
    texts: Iterable[str]


def read_part(source: Source, part: Part, skips: Skips) -> Iterator[Document]:
    """Yield the documents of a part, blank ones too.

    Args:
        skips: takes the counts of what is left out: broken lines, undecodable bytes, missing
            fields, empty files.

    Raises:
        DataError: on a file that cannot be read or that changes meanwhile, and, when `skips` is
            strict, on everything that it would count.
    """
    kind = kind_of(source, part.key)
    path = source.folder / part.key
    if kind in ("directory", "text"):
        folder = kind == "directory"
        texts = _join_folder(source, part.files, skips) if folder else _text_of(path)
        yield Document(part.key, _reading(source, part.key, texts))
        return
    with _read_errors(source, part.key):
        if not path.stat().st_size:
            skips.count("empty files", str(path))
        elif kind == "jsonl":
            yield from _read_jsonl(source, part, skips)
        else:
            yield from _read_table(source, part, skips, kind)


def read_whole(source: Source, skips: Skips) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every document of a source that is not blank.

    Raises:
        DataError: see read_part; and for a source without any document.
    """
    found = False
    for unit in plan_units(source, seed=None):
        for part in unit.parts:
            for document in read_part(source, part, skips):
                try:
                    text = "".join(document.texts)
                except Unusable as error:
                    skips.add(error.reason, error.detail)
                    continue
                if text.strip():
                    found = True
                    yield document.id, text
                else:
                    count_blank(source, document.id, skips)
    if not found:
        raise no_documents(source, skips)


def count_blank(source: Source, document_id: str, skips: Skips) -> None:
    """Count a document without text, which is no fault of the source."""
    skips.count("empty documents", str(source.folder / document_id))


def no_documents(source: Source, skips: Skips) -> DataError:
    """What is wrong with a source that gave none."""
    return DataError(
        f"source {source.name}: no document in {source.root} (format {source.format}; left out: "
        f"{skips.describe() or 'nothing'}); check the source's path, format, glob, field and where"
    )


def row_groups(source: Source, name: str) -> list[tuple[int, int]]:
    """(rows, bytes) of each row group of a parquet file.

    Raises:
        DataError: when it cannot be read.
    """
    import pyarrow.parquet

    path = source.folder / name
    with _read_errors(source, name), _table_errors(source, path), _opened(path) as stream:
        described = pyarrow.parquet.read_metadata(stream)
    groups = [described.row_group(i) for i in range(described.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]


def _reading(source: Source, key: str, texts: Iterator[str]) -> Iterator[str]:
    """Pass on what is read, when it is taken; DataError where that fails."""
    with _read_errors(source, key):
        yield from texts


@contextmanager
def _read_errors(source: Source, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"source {source.name}: cannot read {source.folder / key}: {error}; check the file and "
            "its permissions, or take it out of the source"
        ) from error


def _not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> Unusable:
    """`offset`: of the bytes that were decoded, in their file."""
    byte, at = error.object[error.start], offset + error.start
    hint = ""
    if at == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        hint = ", but begins as UTF-16 does"
    return Unusable(
        "undecodable texts", f"{where}: byte {byte:#04x} at offset {at} is not UTF-8" + hint
    )


def _text_of(path: Path) -> Iterator[str]:
    """The text of a file in pieces; Unusable at bytes that are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True
    for chunk in _chunks(path):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(str(path), error, offset - pending) from error
        offset += len(chunk)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        yield text
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error, offset - pending) from error


def _join_folder(source: Source, names: Iterable[str], skips: Skips) -> Iterator[str]:
    between = ""
    for name in names:
        # whole, so that a file that is no text leaves nothing behind
        try:
            text = "".join(_text_of(source.folder / name))
        except Unusable as error:
            skips.add(error.reason, error.detail)
            continue
        if text.strip():
            # the name's bytes need not be UTF-8
            shown = os.fsencode(name).decode("utf-8", "replace")
            yield f"{between}==> {shown} <==\n{text.rstrip()}\n"
            between = "\n"
        else:
            skips.count("empty files", str(source.folder / name))


def _read_jsonl(source: Source, part: Part, skips: Skips) -> Iterator[Document]:
    path = source.folder / part.key
    in_range = part.stop is not None
    for number, (offset, raw) in enumerate(_lines(path, part.start, part.stop), start=1):
        name = f"{part.key}@{offset}" if in_range else f"{part.key}:{number}"
        where = str(source.folder / name)
        try:
            texts = _texts_of_line(source, raw, where, offset)
        except Unusable as error:
            skips.add(error.reason, error.detail)
            continue
        if texts is not None:
            yield Document(name, texts)


def _texts_of_line(
    source: Source, raw: bytes | bytearray, where: str, offset: int
) -> Iterable[str] | None:
    """None: a line without a record, or of a record that is not wanted."""
    if len(raw) > LONG_LINE_BYTES:
        record, texts = text_pieces(raw, source.field, where)
        return texts if _wanted(source, record) else None
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error, offset) from error
    line = line.removeprefix("\ufeff")
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unusable("broken lines", f"{where}: not JSON: {error}") from error
    if not _wanted(source, record):
        return None
    return (text_of(record, source.field, where),)


def _wanted(source: Source, record: Any) -> bool:
    return all(value_at(record, name) == value for name, value in source.where.items())


def _lines(path: Path, start: int, stop: int | None) -> Iterator[tuple[int, bytes | bytearray]]:
    """(offset, line without its end) of each line that begins in [start, stop)."""
    # A line that begins at `start` is known by the line end before it.
    offset = max(start - 1, 0)
    pending = bytearray()
    in_line_before = start > 0
    for chunk in _chunks(path, offset):
        if in_line_before:
            end = chunk.find(b"\n") + 1
            offset += end or len(chunk)
            if stop is not None and offset >= stop:
                return
            if not end:
                continue
            chunk, in_line_before = chunk[end:], False
        *ends, rest = chunk.split(b"\n")
        for part in ends:
            line: bytes | bytearray = part
            if pending:
                pending += part
                line, pending = pending, bytearray()
            yield offset, line
            offset += len(line) + 1
            if stop is not None and offset >= stop:
                return
            # let go of it before the next is read
            del line
        pending += rest
    if pending:
        yield offset, pending


def _chunks(path: Path, start: int = 0) -> Iterator[bytes]:
    """The bytes of a plain, .gz or .zst file, decompressed.

    Raises:
        DataError: when the file changes while it is read.
    """
    with path.open("rb") as stream, _steady(path, stream.fileno()):
        stream.seek(start)
        if path.suffix == ".gz":
            with gzip.open(stream, "rb") as unpacked:
                yield from iter(partial(unpacked.read, _CHUNK_BYTES), b"")
        else:
            raw = iter(partial(stream.read, _CHUNK_BYTES), b"")
            yield from _unzstd(raw) if path.suffix == ".zst" else raw


@contextmanager
def _steady(path: Path, file: int | Path) -> Iterator[None]:
    """Refuse a file that changes meanwhile; `file`: its descriptor, or its path."""
    before = os.stat(file)
    yield
    after = os.stat(file)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DataError(
            f"{path}: changed while it was read, from {before.st_size} to {after.st_size} bytes; "
            "wait until nothing writes to it, and run again"
        )


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    # imported here: machines that only train need not have it
    import zstandard

    # zstandard's own stream reader takes a truncated file for a whole one; decompressobj tells
    decompressor = None
    for chunk in chunks:
        while chunk:
            if decompressor is None:
                # any window: a frame takes the memory of its own
                decompressor = zstandard.ZstdDecompressor(
                    max_window_size=1 << zstandard.WINDOWLOG_MAX
                ).decompressobj()
            try:
                piece = decompressor.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            yield piece
            chunk = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor = None
    if decompressor is not None:
        raise EOFError("the zstd stream ends before its end marker")


@contextmanager
def _table_errors(source: Source, path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(
            f"source {source.name}: cannot read {path}: {error}; check that it is a whole parquet "
            "or arrow file, or take it out of the source"
        ) from error


def _read_table(source: Source, part: Part, skips: Skips, kind: str) -> Iterator[Document]:
    path = source.folder / part.key
    wanted = [source.field, *{name.partition(".")[0] for name in source.where}]
    number = part.first_row
    with _table_errors(source, path), _steady(path, path):
        for batch in _batches(path, kind, part, wanted):
            texts = _as_bytes(batch.column(source.field)).to_pylist()
            others = [name for name in wanted[1:] if name in batch.schema.names]
            records = batch.select(others).to_pylist() if others else [{}] * len(texts)
            for raw, record in zip(texts, records, strict=True):
                number += 1
                name = f"{part.key}:{number}"
                where = str(source.folder / name)
                if not _wanted(source, record):
                    continue
                if raw is None:
                    skips.add("missing fields", f"{where}: field {source.field!r} is null")
                    continue
                try:
                    text = raw.decode("utf-8").removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    skips.add("undecodable texts", _not_utf8(where, error, 0).detail)
                    continue
                yield Document(name, (text,))


def _batches(path: Path, kind: str, part: Part, wanted: list[str]) -> Iterator[Any]:
    """Record batches of the wanted columns; a column that is only compared may be absent."""
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        with _opened(path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            _check_columns(path, table.schema_arrow, wanted)
            present = [name for name in wanted if name in table.schema_arrow.names]
            groups = None if part.stop is None else range(part.start, part.stop)
            yield from table.iter_batches(
                batch_size=_TABLE_ROWS, columns=present, row_groups=groups, use_threads=False
            )
        return
    with _opened(path) as stream, pyarrow.ipc.open_stream(stream) as table:
        _check_columns(path, table.schema, wanted)
        for batch in table:
            for start in range(0, batch.num_rows, _TABLE_ROWS):
                yield batch.slice(start, _TABLE_ROWS)


def _opened(path: Path) -> Any:
    """A table's file for pyarrow: by its name's bytes, which need not be UTF-8.

    Not mapped: a mapped file that shrinks would kill the process.
    """
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path))


def _check_columns(path: Path, schema: Any, wanted: list[str]) -> None:
    """Refuse a table whose text column, or another that is wanted, is not there once as such."""
    import pyarrow

    twice = sorted({name for name in wanted if schema.names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: columns {schema.names}: {', '.join(map(repr, twice))} must be there once; "
            "write the file with unique names, or take it out of the source"
        )
    kind = schema.field(wanted[0]).type if wanted[0] in schema.names else None
    of_dictionary = kind is not None and pyarrow.types.is_dictionary(kind)
    plain = str(kind.value_type if of_dictionary else kind)
    if plain not in _TEXT_TYPES or (of_dictionary and plain.endswith("_view")):
        columns = {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
        raise DataError(
            f"{path}: no text column {wanted[0]!r}; it has {columns}; set the source's field to a "
            f"column of type {', '.join(_TEXT_TYPES)} or a dictionary of one"
        )


def _as_bytes(column: Any) -> Any:
    """A text column as bytes: one undecodable row would make the whole batch fail."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # views are cast to their own kind of bytes only
    views = {"string_view": pyarrow.binary_view(), "binary_view": pyarrow.binary_view()}
    return column.cast(views.get(str(column.type), pyarrow.large_binary()))

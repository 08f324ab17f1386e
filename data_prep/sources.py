"""Streaming readers: text files, JSON lines, parquet files and folders become documents.

A reader holds one document (one row group's batch for parquet) and the list of file names in
memory, never a whole source.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zstandard

FORMATS = ("text", "jsonl", "parquet", "directory")
STDLIB = "stdlib"
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_ANY_FILE = "**/*"
_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 64


class DataError(ValueError):
    """Data that cannot be used; the message names the file or value and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text. `id` is stable: the file's path inside the source, with :LINE or :ROW from 1."""

    id: str
    source: str
    text: str


@dataclass(frozen=True)
class Source:
    """Where documents come from: a resolved file or folder, or "stdlib" as `path`.

    format "text": a file is a document; "jsonl" and "parquet": a line or row is one, its text in
    `field`; "directory": the text files of one folder, joined, are one. All but parquet are also
    read from .gz and .zst files. `glob` chooses files inside a folder; names that begin with a dot
    are never read.
    """

    name: str
    path: Path
    format: str = "text"
    glob: str = _ANY_FILE
    field: str = "text"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise DataError(
                f"source {self.name}: format={self.format!r}: must be one of "
                f"{', '.join(FORMATS)}; set the source's format"
            )
        if not self.weight > 0:
            raise DataError(
                f"source {self.name}: weight={self.weight}: must be above 0; set the source's "
                "weight or take the source out"
            )


class Skips:
    """Counts of what a reader left out, by reason, with the first place of each.

    With `strict` the first one raises instead.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, detail: str) -> None:
        """Count one item left out.

        Raises:
            DataError: when strict.
        """
        if self.strict:
            raise DataError(f"{detail}; mend it, or set data.strict=false to skip and count")
        self.counts[reason] += 1
        self.first.setdefault(reason, detail)

    def describe(self) -> str:
        """One line such as "2 broken lines (first: a.jsonl:3: ...)"; empty where none was."""
        return ", ".join(
            f"{count} {reason} (first: {self.first[reason]})"
            for reason, count in sorted(self.counts.items())
        )


def list_files(source: Source) -> list[str]:
    """The files of a source, relative to its folder, sorted.

    Raises:
        DataError: when the path does not exist or no file matches.
    """
    root = _root(source)
    if root.is_file():
        return [root.name]
    if not root.is_dir():
        raise DataError(f"source {source.name}: {root} does not exist; set the source's path")
    is_stdlib = str(source.path) == STDLIB
    glob = "**/*.py" if is_stdlib and source.glob == _ANY_FILE else source.glob
    left_out = _STDLIB_LEFT_OUT if is_stdlib else set()
    try:
        paths = list(root.glob(glob))
    except (ValueError, NotImplementedError) as error:
        raise DataError(
            f"source {source.name}: glob={glob!r}: {error}; set the source's glob to a relative "
            'pattern such as "**/*.txt"'
        ) from error
    names = []
    for path in paths:
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and left_out.isdisjoint(name.parts) and path.is_file():
            names.append(name.as_posix())
    if not names:
        raise DataError(
            f"source {source.name}: no file in {root} matches {glob!r}; set the source's path or "
            "glob"
        )
    return sorted(names)


def fingerprint(source: Source) -> str:
    """16 hex digits over names, sizes and times of a source's files: changes when they do."""
    root = _root(source)
    folder = root.parent if root.is_file() else root
    total = hashlib.sha256()
    for name in list_files(source):
        status = (folder / name).stat()
        total.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]


def read_documents(
    source: Source, skips: Skips | None = None, seed: int | None = None
) -> Iterator[Document]:
    """Yield a source's documents.

    Args:
        skips: takes the counts of what is left out: broken lines, undecodable bytes, missing
            fields, empty documents.
        seed: orders the files (folders, for "directory") by a hash, so that the first documents
            are a fair sample of the whole; None keeps them sorted.

    Raises:
        DataError: on a path or file that cannot be read, a source without any document, and, when
            `skips` is strict, on everything it would count except empty documents.
    """
    skips = Skips() if skips is None else skips
    root = _root(source)
    folder = root.parent if root.is_file() else root
    groups: dict[str, list[str]] = {}
    for name in list_files(source):
        key = os.path.dirname(name) or "." if source.format == "directory" else name
        groups.setdefault(key, []).append(name)
    order = sorted(groups)
    if seed is not None:
        order.sort(key=lambda key: hashlib.blake2b(f"{seed}\0{key}".encode()).digest())
    read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}.get(source.format)
    found = False
    for key in order:
        try:
            if read is None:
                texts = iter([(key, _join_folder(folder, groups[key], skips))])
            else:
                texts = read(folder, key, source, skips)
            for name, text in texts:
                if text.strip():
                    found = True
                    yield Document(name, source.name, text)
                else:
                    skips.counts["empty documents"] += 1
                    skips.first.setdefault("empty documents", str(folder / name))
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(
                f"source {source.name}: cannot read {folder / key}: {error}; check the file and "
                "its permissions, or take it out of the source"
            ) from error
    if not found:
        raise DataError(
            f"source {source.name}: no document in {root} (format {source.format}; left out: "
            f"{skips.describe() or 'nothing'}); check the source's path, format, glob and field"
        )


def _root(source: Source) -> Path:
    if str(source.path) == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    return Path(source.path)


def _decode(raw: bytes, where: str, skips: Skips, offset: int = 0) -> str | None:
    """UTF-8 text; None, counted, where it is not. `offset`: of raw in its file, in bytes."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        skips.add(
            "undecodable texts",
            f"{where}: byte {raw[error.start]:#04x} at offset {offset + error.start} is not UTF-8",
        )
        return None


def _read_text(folder: Path, name: str, source: Source, skips: Skips) -> Iterator[tuple[str, str]]:
    text = _decode(b"".join(_chunks(folder / name)), str(folder / name), skips)
    if text is not None:
        yield name, text


def _join_folder(folder: Path, names: list[str], skips: Skips) -> str:
    parts = []
    for name in names:
        text = _decode(b"".join(_chunks(folder / name)), str(folder / name), skips)
        if text and text.strip():
            parts.append(f"==> {name} <==\n{text.rstrip()}\n")
    return "\n".join(parts)


def _read_jsonl(folder: Path, name: str, source: Source, skips: Skips) -> Iterator[tuple[str, str]]:
    offset = 0
    for number, raw in enumerate(_lines(folder / name), start=1):
        where = f"{folder / name}:{number}"
        line = _decode(raw, where, skips, offset)
        offset += len(raw) + 1
        if line is None or not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            skips.add("broken lines", f"{where}: not JSON: {error}")
            continue
        text = record.get(source.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            skips.add(
                "missing fields", f"{where}: no text in field {source.field!r}; it has {keys}"
            )
        elif _has_surrogates(text):
            # json accepts "\ud800" alone, which no encoder and no tokenizer does
            skips.add("undecodable texts", f"{where}: half of a surrogate pair is not UTF-8")
        else:
            yield f"{name}:{number}", text


def _has_surrogates(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file, without their ends."""
    pending = b""
    for chunk in _chunks(path):
        first, *rest = chunk.split(b"\n")
        pending += first
        for part in rest:
            yield pending
            pending = part
    if pending:
        yield pending


def _chunks(path: Path) -> Iterator[bytes]:
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as stream:
            yield from iter(partial(stream.read, _CHUNK_BYTES), b"")
        return
    with path.open("rb") as stream:
        raw = iter(partial(stream.read, _CHUNK_BYTES), b"")
        yield from _unzstd(raw) if path.suffix == ".zst" else raw


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    # zstandard's own stream reader takes a truncated file for a whole one; decompressobj tells
    decompressor = None
    for chunk in chunks:
        while chunk:
            if decompressor is None:
                decompressor = zstandard.ZstdDecompressor().decompressobj()
            yield decompressor.decompress(chunk)
            chunk = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor = None
    if decompressor is not None:
        raise EOFError("the zstd stream ends before its end marker")


def _read_parquet(
    folder: Path, name: str, source: Source, skips: Skips
) -> Iterator[tuple[str, str]]:
    # imported here: half a second that other formats need not pay
    import pyarrow
    import pyarrow.parquet

    path = folder / name
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            columns = {column: str(schema.field(column).type) for column in schema.names}
            if columns.get(source.field) not in ("string", "large_string"):
                raise DataError(
                    f"{path}: no text column {source.field!r}; it has {columns}; set the "
                    "source's field"
                )
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[source.field]):
                # binary, because one undecodable row would make the whole batch fail
                for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    where = f"{path}:{number}"
                    if raw is None:
                        skips.add("missing fields", f"{where}: field {source.field!r} is null")
                        continue
                    text = _decode(raw, where, skips)
                    if text is not None:
                        yield f"{name}:{number}", text
    except pyarrow.ArrowException as error:
        raise DataError(
            f"source {source.name}: cannot read {path}: {error}; check that it is a whole parquet "
            "file, or take it out of the source"
        ) from error

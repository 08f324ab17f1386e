"""One unit of a source as token ids on disk: whole and checked, or not there.

PREFIX.bin holds the documents' ids one after another, PREFIX.npy a DOCUMENT of each, and
PREFIX.json, which is written last, their names, what was left out, and the hashes of the two.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.contamination import EvaluationRuns
from data_prep.long_json import Unusable
from data_prep.mix import Wanted, draw
from data_prep.readers import Document, count_blank, read_part
from data_prep.shards import disk_errors, write_whole
from data_prep.sources import DataError, Skips, Source, Unit
from data_prep.tokenizer import Encoder

# tokens: with <bos>; digest: of the text; the draws: uniform in [0, 1), from mix.draw
DOCUMENT = np.dtype(
    [
        ("tokens", "<i8"),
        ("digest", "<u8"),
        ("held_draw", "<f8"),
        ("keep_draw", "<f8"),
        ("contaminated", "?"),
    ]
)
# A held_draw that no share of documents held out reaches.
NEVER = 1.0
# How much of a unit's first document is encoded by tokenizers too, as a check on the way.
_CHECKED_CHARACTERS = 4096


@dataclass(frozen=True)
class Summary:
    """What a unit came to.

    usable: tokens that training may take; held_out: documents that may be held out; skipped:
    {reason: [count, the first place]}.
    """

    documents: int
    tokens: int
    usable: int
    held_out: int
    skipped: dict[str, list]


@dataclass(frozen=True)
class UnitTask:
    """What a worker needs to make one unit; `enough`: usable tokens at which it may end early."""

    source: Source
    unit: Unit
    prefix: Path
    wanted: Wanted
    enough: int | None
    seed: int
    strict: bool


@dataclass(frozen=True)
class Making:
    """What is the same for all units: the tokenizer, its <bos>, the files' dtype, what to avoid."""

    encoder: Encoder
    bos_id: int
    dtype: np.dtype
    runs: EvaluationRuns | None = None


def write_unit(task: UnitTask, making: Making) -> Summary:
    """Tokenize a unit's documents into PREFIX.bin, .npy and .json.

    Raises:
        DataError: what readers raise, ids that the dtype cannot hold, and on a full disk.
    """
    skips = Skips(task.strict)
    rows: list[tuple] = []
    names: list[str] = []
    usable = held_out = 0
    only_trains = task.source.needles is not None
    path = _path(task.prefix, ".bin")
    with disk_errors(path), path.open("wb") as stream:
        for document in _documents(task, skips):
            start = stream.tell()
            try:
                row = _write_document(stream, document, task, making, skips, first=not rows)
            except Unusable as error:
                skips.add(error.reason, error.detail)
                row = None
            if row is None:
                stream.seek(start)
                stream.truncate()
                continue
            rows.append(row)
            names.append(document.id)
            is_usable, is_held = task.wanted.verdict(row[0], *row[2:])
            usable += is_usable * row[0]
            held_out += is_held
            if task.enough is not None and usable >= task.enough and (held_out or only_trains):
                break
        stream.flush()
        os.fsync(stream.fileno())
    documents = np.array(rows, DOCUMENT)
    skipped = {reason: [count, skips.first[reason]] for reason, count in skips.counts.items()}
    summary = Summary(len(rows), int(documents["tokens"].sum()), usable, held_out, skipped)
    packed = BytesIO()
    np.save(packed, documents)
    write_whole(_path(task.prefix, ".npy"), packed.getvalue())
    record = {
        "summary": asdict(summary),
        "sha256": {suffix: _sha256(_path(task.prefix, suffix)) for suffix in (".bin", ".npy")},
        "names": names,
    }
    write_whole(_path(task.prefix, ".json"), json.dumps(record).encode())
    return summary


def is_whole(prefix: Path) -> bool:
    """Whether a unit is there."""
    return _path(prefix, ".json").exists()


def read_summary(prefix: Path, check: bool = False) -> Summary:
    """What a unit came to.

    Args:
        check: whether to hold the files against their hashes.

    Raises:
        DataError: when the files are not those that were written.
    """
    record = _record(prefix)
    for suffix, wanted in record["sha256"].items() if check else ():
        path = _path(prefix, suffix)
        if not path.exists() or _sha256(path) != wanted:
            raise DataError(
                f"{path}: is not the file that was written; remove {prefix.parent.parent} and run "
                "again"
            )
    return Summary(**record["summary"])


def read_documents(prefix: Path) -> np.ndarray:
    """The DOCUMENTs of a unit."""
    return np.load(_path(prefix, ".npy"))


def read_names(prefix: Path) -> list[str]:
    """The names of a unit's documents."""
    return _record(prefix)["names"]


def token_file(prefix: Path) -> Path:
    """The file of a unit's token ids."""
    return _path(prefix, ".bin")


def _documents(task: UnitTask, skips: Skips) -> Iterator[Document]:
    needles = task.source.needles
    for part in task.unit.parts:
        for document in read_part(task.source, part, skips):
            if needles is None:
                yield document
                continue
            try:
                text = "".join(document.texts)
            except Unusable as error:
                skips.add(error.reason, error.detail)
                continue
            for name, hidden in needles.documents(document.id, text):
                yield Document(name, (hidden,))


def _write_document(
    stream: BinaryIO, document: Document, task: UnitTask, making: Making, skips: Skips, first: bool
) -> tuple | None:
    """Write a document's ids, <bos> first; its DOCUMENT, or None for a blank one."""
    digest = hashlib.blake2b(digest_size=8)
    blank = True
    opening = ""

    def watched() -> Iterator[str]:
        nonlocal blank, opening
        for text in document.texts:
            blank = blank and (not text or text.isspace())
            if first and len(opening) < _CHECKED_CHARACTERS:
                opening += text[:_CHECKED_CHARACTERS]
            digest.update(text.encode())
            yield text

    seeker = making.runs.seeker() if making.runs else None
    limit = np.iinfo(making.dtype).max
    stream.write(np.array([making.bos_id], making.dtype).tobytes())
    tokens = 1
    for ids in making.encoder.encode_stream(watched()):
        if ids.size and ids.max() > limit:
            raise DataError(
                f"{document.id}: token id {ids.max()}: {making.dtype} holds up to {limit}; the "
                "tokenizer gives ids outside its vocabulary: check the model folder's tokenizer "
                "files"
            )
        stream.write(ids.astype(making.dtype, copy=False).tobytes())
        tokens += len(ids)
        if seeker:
            seeker.add(ids)
    if blank:
        count_blank(task.source, document.id, skips)
        return None
    if first:
        making.encoder.check(opening)
    drawn = task.source.name, document.id
    return (
        tokens,
        int.from_bytes(digest.digest(), "little"),
        NEVER if task.source.needles else draw(task.seed, "held out", *drawn),
        draw(task.seed, "keep", *drawn),
        bool(seeker and seeker.found),
    )


def _record(prefix: Path) -> dict[str, Any]:
    return json.loads(_path(prefix, ".json").read_text())


def _path(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

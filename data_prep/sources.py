"""Where text comes from: sources, their files, and the units of them that workers read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from data_prep.listing import is_left_over, matches, pattern_parts, split_of, walk
from data_prep.needles import Needles

FORMATS = ("text", "jsonl", "parquet", "directory", "dataset")
STDLIB = "stdlib"
# What a data set's folder holds besides its rows.
_DATASET_NOTES = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json"}
_DATASET_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")
_COMPRESSED = (".gz", ".zst")
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_ANY_FILE = "**/*"
# A unit is read by one worker at a time, and redone where it was interrupted.
UNIT_BYTES = 32 << 20
_UNIT_FILES = 4096
# A file past this is read by several workers where its format lets one begin in the middle.
SPLIT_BYTES = 256 << 20


class DataError(ValueError):
    """Data that cannot be used; the message names the file or value and the remedy."""


@dataclass(frozen=True)
class Source:
    """Where documents come from: a resolved file or folder, or "stdlib" as `path`.

    format "text": a file is a document; "jsonl" and "parquet": a line or row is one, its text in
    `field`; "directory": the text files of one folder, joined, are one; "dataset": a Hugging Face
    data set's folder, as the hub has it or save_to_disk wrote it: its .parquet, .arrow, .jsonl and
    .json (lines) files of one `split`, or of all with None. Text and JSON lines are also read from
    .gz and .zst files. `glob` chooses files inside a folder, through links to folders too; names
    that begin with a dot are never read. `where`: only rows whose
    fields have these values; "a.b" is field b of field a. `needles`: what documents of synthetic
    retrieval are made of the text; none of those is ever held out.
    """

    name: str
    path: Path
    format: str = "text"
    glob: str = _ANY_FILE
    field: str = "text"
    weight: float = 1.0
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    needles: Needles | None = None
    split: str | None = "train"

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
        if self.where and self.format in ("text", "directory"):
            raise DataError(
                f"source {self.name}: where={self.where}: a {self.format} source has no fields; "
                "take `where` out, or set format to jsonl, parquet or dataset"
            )

    @property
    def root(self) -> Path:
        """The file or folder itself."""
        is_stdlib = str(self.path) == STDLIB
        return Path(sysconfig.get_path("stdlib")) if is_stdlib else Path(self.path)

    @property
    def folder(self) -> Path:
        """What the names of the source's files are relative to."""
        return self.root.parent if self.root.is_file() else self.root


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
        self.count(reason, detail)

    def count(self, reason: str, detail: str, times: int = 1) -> None:
        """Count items left out that are no fault."""
        self.counts[reason] += times
        self.first.setdefault(reason, detail)

    def describe(self) -> str:
        """One line such as "2 broken lines (first: a.jsonl:3: ...)"; empty where none was."""
        return ", ".join(
            f"{count} {reason} (first: {self.first[reason]})"
            for reason, count in sorted(self.counts.items())
        )


@dataclass(frozen=True)
class Part:
    """Documents that are read one after another: a file, a folder's files, or a range of a file.

    start, stop: bytes of a plain file of JSON lines, row groups of a parquet file; stop None: to
    the end. first_row: rows before the first row group.
    """

    key: str
    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    first_row: int = 0


@dataclass(frozen=True)
class Unit:
    """Parts that one worker reads in one go; size: bytes of their files."""

    parts: tuple[Part, ...]
    size: int


def list_files(source: Source) -> list[str]:
    """The files of a source, relative to its folder, sorted.

    Raises:
        DataError: when the path does not exist, cannot be read, or no file matches.
    """
    return _list_files(source)[0]


def other_splits(source: Source) -> dict[str, int]:
    """How many files of a data set are not read, by their split."""
    return dict(_list_files(source)[1])


def _list_files(source: Source) -> tuple[list[str], Counter[str]]:
    root = source.root
    if root.is_file():
        return [root.name], Counter()
    if not root.is_dir():
        raise DataError(f"source {source.name}: {root} does not exist; set the source's path")
    is_stdlib = str(source.path) == STDLIB
    glob = "**/*.py" if is_stdlib and source.glob == _ANY_FILE else source.glob
    left_out = _STDLIB_LEFT_OUT if is_stdlib else set()
    try:
        pattern = pattern_parts(glob)
    except ValueError as error:
        raise DataError(
            f"source {source.name}: glob={glob!r}: {error}; set the source's glob to a relative "
            'pattern such as "**/*.txt"'
        ) from error
    try:
        found = [name for name in walk(root, left_out) if matches(name, pattern)]
        # a link that leads nowhere, such as to a disk that is not there, raises here
        names = sorted(name for name in found if S_ISREG((root / name).stat().st_mode))
    except OSError as error:
        raise DataError(
            f"source {source.name}: cannot read {error.filename}: {error.strerror}; check the file "
            "or folder, or take it out of the source"
        ) from error
    others: Counter[str] = Counter()
    if source.format == "dataset":
        names, others = _of_split(source, names)
    if not names:
        found, remedy = "", "path or glob"
        if others:
            there = ", ".join(f"{count} of split {name}" for name, count in sorted(others.items()))
            found, remedy = f" and split {source.split!r}, but {there}", "path, glob or split"
        raise DataError(
            f"source {source.name}: no file in {root} matches {glob!r}{found}; set the source's "
            f"{remedy}"
        )
    return names, others


def _of_split(source: Source, names: list[str]) -> tuple[list[str], Counter[str]]:
    """The files with rows of a data set's split, and how many there are of others.

    Files whose split is not known belong to "train" where no other file does.
    """
    root = source.root
    names = [name for name in names if kind_of(source, name) and not is_left_over(root, name)]
    if source.split is None:
        return names, Counter()
    splits = split_of(root, names)
    unknown = None if source.split in splits.values() or source.split != "train" else "train"
    kept = [name for name in names if (splits[name] or unknown) == source.split]
    return kept, Counter(splits[name] or "unknown" for name in set(names) - set(kept))


def kind_of(source: Source, name: str) -> str | None:
    """How a file is read: "text", "jsonl", "parquet" or "arrow"; None: no rows of a data set."""
    if source.format != "dataset":
        return source.format
    path = Path(name)
    if path.name in _DATASET_NOTES:
        return None
    plain = path.with_suffix("") if path.suffix in _COMPRESSED else path
    if plain.suffix not in _DATASET_SUFFIXES:
        return None
    return {".parquet": "parquet", ".arrow": "arrow"}.get(plain.suffix, "jsonl")


def plan_units(source: Source, seed: int | None, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of a source, in the order in which its documents count.

    Args:
        seed: orders files (folders, for "directory") by a hash, so that the first documents are a
            fair sample of the whole; None keeps them sorted.
        unit_bytes: what a unit of several files grows to, and the length of ranges of a large one.

    Raises:
        DataError: on a path that does not exist, no file, or a large file that cannot be read.
    """
    groups: dict[str, list[str]] = {}
    for name in list_files(source):
        key = os.path.dirname(name) or "." if source.format == "directory" else name
        groups.setdefault(key, []).append(name)
    order = sorted(groups)
    if seed is not None:
        order.sort(key=lambda key: hashlib.blake2b(os.fsencode(f"{seed}\0{key}")).digest())
    units: list[Unit] = []
    waiting: list[Part] = []
    files = size = 0
    for key in order:
        group = groups[key]
        bytes_here = sum((source.folder / name).stat().st_size for name in group)
        ranges = list(_ranges(source, key, bytes_here, unit_bytes))
        if waiting and (ranges or size + bytes_here > unit_bytes or files > _UNIT_FILES):
            units.append(Unit(tuple(waiting), size))
            waiting, files, size = [], 0, 0
        if ranges:
            units += ranges
        else:
            waiting.append(Part(key, tuple(group)))
            files, size = files + len(group), size + bytes_here
    if waiting:
        units.append(Unit(tuple(waiting), size))
    return units


def _ranges(source: Source, name: str, size: int, unit_bytes: int) -> Iterator[Unit]:
    """Ranges of a large file, each a unit; nothing where the file is read as a whole."""
    kind = kind_of(source, name)
    if size <= SPLIT_BYTES:
        return
    if kind == "jsonl" and Path(name).suffix not in _COMPRESSED:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Unit((Part(name, (name,), start, stop),), stop - start)
    elif kind == "parquet":
        from data_prep.readers import row_groups

        groups = row_groups(source, name)
        rows = 0
        for number, (group_rows, group_bytes) in enumerate(groups):
            yield Unit((Part(name, (name,), number, number + 1, rows),), group_bytes)
            rows += group_rows

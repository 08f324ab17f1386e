"""What files outside the outputs hold: a stage's identity is their content, not path or time.

Weights and raw text can be hundreds of gigabytes, so content is a hash of samples of large files.
A hash is used again while names, sizes and times are as they were; these alone decide nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.manifest import digest

MIB = 1 << 20
# Of a larger file: so many bytes at its start, at every SPACING and at its end.
BLOCK = 16 << 10
SPACING = 16 * MIB
# A network file system answers many readers faster than one.
READERS = 16

# {"place": how the configuration names the files, "seen": digest of their names, sizes and times,
#  "content": digest of names, sizes and content}
Entry = dict[str, Any]


@dataclass(frozen=True)
class SourceFiles:
    """Files outside the outputs that a stage reads.

    place: what the configuration says of them. root: what names are relative to. names(): the
    files; raises StageError or DataError where there are none. whole: bytes up to which all of a
    file is hashed.
    """

    place: dict[str, Any]
    root: Path
    names: Callable[[], list[str]]
    whole: int = MIB

    def paths(self) -> list[Path]:
        """The files themselves."""
        return [self.root / name for name in self.names()]


def look(files: SourceFiles, known: Iterable[Entry] = ()) -> Entry:
    """The entry of the files as they are now; reads none where a known one has seen them so.

    Raises:
        StageError, DataError: where there are no files.
    """
    names = files.names()
    stats = [(files.root / name).stat() for name in names]
    times = [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]
    seen = digest([str(files.root.resolve()), times])
    content = next((entry["content"] for entry in known if entry["seen"] == seen), None)
    if content is None:
        with ThreadPoolExecutor(READERS) as pool:
            hashes = list(pool.map(lambda name: sampled(files.root / name, files.whole), names))
        content = digest(list(zip(names, hashes, strict=True)))
    return {"place": files.place, "seen": seen, "content": content}


def sampled(path: Path, whole: int = MIB) -> str:
    """A hash of a file's size and, above `whole` bytes, of BLOCK bytes at every SPACING."""
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        if size <= whole:
            return f"{size} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
        total = hashlib.sha256()
        for start in (*range(0, size - BLOCK, SPACING), size - BLOCK):
            stream.seek(start)
            total.update(stream.read(BLOCK))
        return f"{size} {total.hexdigest()}"

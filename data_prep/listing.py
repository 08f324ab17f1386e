"""The files under a source's folder: which match a pattern, and which belong to a split."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# As the datasets library finds splits in names: a keyword between marks or digits.
_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_SPLIT = re.compile(
    "(?<![^-._ 0-9])(?:"
    + "|".join(f"(?P<{split}>{words})" for split, words in _KEYWORDS.items())
    + ")(?![^-._ 0-9])"
)


def walk(root: Path, left_out: Collection[str] = ()) -> Iterator[str]:
    """Names of all files under a folder, relative to it, without those that begin with a dot.

    Links to folders are followed, except to a folder that the link is in; `left_out`: names of
    folders that are not entered.

    Raises:
        OSError: on a folder that cannot be read.
    """
    above = {str(root): {_identity(root)}}
    for folder, folders, files in os.walk(root, onerror=_fail, followlinks=True):
        inside = above.pop(folder)
        entered = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name.startswith(".") or name in left_out:
                continue
            if (identity := _identity(path)) not in inside:
                above[path] = inside | {identity}
                entered.append(name)
        folders[:] = entered
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        yield from (prefix + name for name in sorted(files) if not name.startswith("."))


def pattern_parts(pattern: str) -> list[str]:
    """A relative pattern such as "**/*.txt", part by part.

    Raises:
        ValueError: on any other.
    """
    parts = pattern.split("/")
    if not all(parts) or ".." in parts:
        raise ValueError("must be relative, without empty parts and '..'")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError("'**' must be a whole part")
    return parts


def matches(name: str, pattern: Sequence[str]) -> bool:
    """Whether a relative name matches pattern_parts; "**" stands for any number of folders."""
    return _match(name.split("/"), pattern)


def split_of(root: Path, names: Sequence[str]) -> dict[str, str | None]:
    """The split of each file of a Hugging Face data set; None: of none that is known.

    As its README.md declares them, as save_to_disk writes them (a folder each), or by names.
    """
    declared = _declared(root / "README.md")
    if declared:
        return {
            name: next((split for parts, split in declared if matches(name, parts)), None)
            for name in names
        }
    if (root / "dataset_dict.json").is_file():
        return {name: name.partition("/")[0] if "/" in name else None for name in names}
    return {name: _named(name) for name in names}


def is_left_over(root: Path, name: str) -> bool:
    """Whether save_to_disk's state.json next to a file does not list it: a cache of `map`."""
    state = (root / name).parent / "state.json"
    if not name.endswith(".arrow") or not state.is_file():
        return False
    files = json.loads(state.read_text("utf-8")).get("_data_files") or []
    return bool(files) and Path(name).name not in {file["filename"] for file in files}


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _fail(error: OSError) -> None:
    raise error


def _match(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_match(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    found = bool(parts) and fnmatchcase(parts[0], pattern[0])
    return found and _match(parts[1:], pattern[1:])


def _named(name: str) -> str | None:
    for part in reversed(name.split("/")):
        if found := _SPLIT.search(part):
            return found.lastgroup
    return None


def _declared(readme: Path) -> list[tuple[list[str], str]]:
    """(pattern, split) of a data set card's configs."""
    import yaml

    if not readme.is_file():
        return []
    front = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
    try:
        card = yaml.safe_load(front[1]) if front else None
        configs = card.get("configs") or [] if isinstance(card, dict) else []
        return [
            (pattern_parts(path), split)
            for config in configs
            for split, paths in _splits(config.get("data_files") or [])
            for path in ([paths] if isinstance(paths, str) else paths)
        ]
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError):
        # a card of another form says nothing about files
        return []


def _splits(files: Any) -> Iterator[tuple[str, Any]]:
    """(split, path or paths) of `data_files`, in each of the forms that a card may have."""
    if isinstance(files, dict):
        yield from files.items()
        return
    for entry in [files] if isinstance(files, str) else files:
        yield ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])

"""Names what makes a stage's folder that of another configuration: keys, and files that it read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.contents import SourceFiles
from pipeline.schema import Config

# Keys of the configuration, where a stage's manifest has other names for them.
SECTIONS = {"data_prep": "data."}
NAMES = {"seq_length": "data.seq_length", "code": "code of the exported model"}
# Characters of a value, and changed files, that a message shows.
SHOWN_CHARACTERS = 80
SHOWN_FILES = 3


def changed_keys(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """(old, new) of every leaf in which two nested values differ, by its dotted key."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {
            f"{key}.{name}".lstrip("."): (old.get(name), new.get(name))
            for name in sorted(old.keys() | new.keys())
        }
    elif _are_sections(old) and _are_sections(new) and len(old) == len(new):
        pairs = {f"{key}[{i}]": pair for i, pair in enumerate(zip(old, new, strict=True))}
    else:
        return {} if old == new else {key: (old, new)}
    found = {}
    for name, pair in pairs.items():
        found |= changed_keys(*pair, name)
    return found


def _are_sections(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def changed_files(paths: list[Path], since: float) -> str:
    """Which of a changed input's files changed after `since` (seconds of the epoch), in words."""
    newer = [str(path) for path in paths if path.stat().st_mtime >= since]
    if not newer:
        return f"files in {os.path.commonpath(paths)} were removed, renamed or replaced"
    more = f" and {len(newer) - SHOWN_FILES} more files" if len(newer) > SHOWN_FILES else ""
    return f"{', '.join(newer[:SHOWN_FILES])}{more} changed"


def describe_changes(
    old: dict[str, Any],
    stage: str,
    now: dict[str, Any],
    inputs: dict[str, str],
    config: Config,
    source_files: Callable[[str, Config], dict[str, SourceFiles]],
) -> str:
    """In which keys and files a configuration differs from the one of a folder's manifest.

    Args:
        old: the manifest of the folder.
        now: what the stage and each of those before it depends on, by their names.
        inputs: ids of the stages that it reads.
        source_files: of a stage, the files outside the outputs that it reads.
    """
    before = old.get("upstream", {}) | {stage: old["config"]}
    lines: dict[str, None] = {}
    for name in (name for name in now if name in before):
        was, wanted = dict(before[name]), dict(now[name])
        files, entries = wanted.pop("source_files", {}), was.pop("source_files", {})
        if bool(files) != bool(entries):
            lines[f"{name} is of an earlier version of this code"] = None
            continue
        for key, pair in changed_keys(was, wanted).items():
            shown = NAMES.get(key, f"{SECTIONS.get(name, '')}{key}")
            lines[f"{shown}: {_short(pair[0])} -> {_short(pair[1])}"] = None
        for key in files.keys() & entries.keys():
            if files[key]["content"] != entries[key]["content"]:
                since = old.get("started", 0)
                lines[changed_files(source_files(name, config)[key].paths(), since)] = None
    if not lines:
        # Manifests of earlier versions do not hold what was upstream.
        changed = changed_keys(old["inputs"], inputs)
        lines = {f"stage={name} was run with other values": None for name in changed}
    return "; ".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."

"""Stage folders: written under a temporary name, renamed when whole, described by manifest.json."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_prep.shards import write_whole
from pipeline.schema import Config

MANIFEST = "manifest.json"
# What an unfinished folder is of: {"id", "forced", "config", "inputs", "upstream", "started"}.
PARTIAL = "partial.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What asks a run to stop without a signal; no signal has this number.
STOPPED_BY_FILE = os.EX_TEMPFAIL
PACKAGES = ("torch", "transformers", "megatron-core", "deepspeed", "numpy", "triton")


class StageError(RuntimeError):
    """A stage cannot go on; the message names what is wrong and the remedy."""


class DamagedRecord(StageError):
    """A file that says what a folder holds is there, and is no JSON object."""


class StageStopped(Exception):
    """A stage was asked to stop, saved, and goes on with the same command.

    `number` is a signal's, or STOPPED_BY_FILE.
    """

    def __init__(self, number: int) -> None:
        by_file = number == STOPPED_BY_FILE
        by = "the trigger file" if by_file else signal.Signals(number).name
        super().__init__(f"stopped by {by} after a save")
        # For a signal, the shell's convention.
        self.exit_code = number if by_file else 128 + number


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk (or quota) while a stage writes into `folder` into a StageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # Of an error in safetensors' own writer, its text is all that tells.
        told = [number for number in NO_SPACE if f"os error {number})" in str(error)]
        number = getattr(error, "errno", None) or (told[0] if told else None)
        if number not in NO_SPACE:
            raise
        # A failed copy names its source first; a failed write names no file.
        path = getattr(error, "filename2", None) or getattr(error, "filename", None) or folder
        raise StageError(
            f"{path}: {os.strerror(number)}; free space there, or set outputs=OTHER_DISK, and run "
            "again"
        ) from error


@dataclass(frozen=True)
class StageContext:
    """What a stage gets: its configuration, the folder it writes, the folders it reads.

    `out` is renamed into place when the stage's run() returns; `folder(name)` is the finished
    folder of an earlier stage. rank, size, meet: this process among those of the stage, and where
    all of them wait for each other.
    """

    config: Config
    out: Path
    folder: Callable[[str], Path]
    log: logging.Logger
    rank: int = 0
    size: int = 1
    meet: Callable[[str], None] = lambda place: None


def digest(value: Any) -> str:
    """16 hex digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stage_id(stage: str, depends_on: dict[str, Any], inputs: dict[str, str]) -> str:
    """16 hex digits that name what a stage makes: of its values, the content of its source files
    (see pipeline.contents) and the ids of its inputs."""
    if "source_files" in depends_on:
        contents = {name: e["content"] for name, e in depends_on["source_files"].items()}
        depends_on = {**depends_on, "source_files": contents}
    return digest([stage, depends_on, inputs])


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None only where there is no file.

    Raises:
        DamagedRecord: where it is no JSON object.
        StageError: where the file system does not give it.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StageError(
            f"{path}: cannot be read ({error.strerror}); nothing was changed; run again when the "
            "file system gives it"
        ) from error
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DamagedRecord(
            f"{path}: is no JSON object; restore it, or run the stage of its folder with force=true"
        )
    return found


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object so that the file holds the old one or the new one at any time."""
    write_whole(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None where there is none. Raises as read_record does."""
    return read_record(folder / MANIFEST)


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def finish(
    out: Path,
    final: Path,
    stage: str,
    depends_on: dict[str, Any],
    inputs: dict[str, str],
    upstream: dict[str, Any],
    counts: dict[str, Any],
    started: float,
) -> None:
    """Write the manifest into `out` and rename it to `final`, replacing what was there.

    `upstream`: what each of the stages before this one depends on, by its name.
    """
    manifest = {
        "stage": stage,
        "config": depends_on,
        "inputs": inputs,
        "upstream": upstream,
        "id": stage_id(stage, depends_on, inputs),
        "versions": versions(),
        "counts": counts,
        "started": started,
        "seconds": round(time.time() - started, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_record(out / MANIFEST, manifest)
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        out.rename(final)
        shutil.rmtree(old)
    else:
        out.rename(final)

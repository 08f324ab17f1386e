"""A lock on a file that the kernel gives back when its process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from pipeline.manifest import StageError, digest

log = logging.getLogger("longgen")

# What flock says on a mount without it: Lustre by default, NFS without lockd, some of FUSE.
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
LOCAL = Path(tempfile.gettempdir()) / f"longgen_locks_{os.getuid()}"


class Locked(Exception):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `path`.

    On a file system without locks: of a file in this machine's temporary folder, if that has any.

    Raises:
        Locked: another process holds it, and `wait` is off.
        StageError: where the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise StageError(
            f"{path}: cannot be written ({error.strerror}); set outputs to a folder with free "
            "space that you may write to"
        ) from error
    with file:
        missing = _acquire(file, wait)
        if missing is None or path.parent == LOCAL:
            yield
            return
        _warn(path.parent, missing)
        with lock(LOCAL / digest(str(path)), wait):
            yield


def _acquire(file: IO, wait: bool) -> str | None:
    """None once the lock is held; the reason where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise Locked from error
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return error.strerror
    return None


@cache
def _warn(folder: Path, reason: str) -> None:
    log.warning(
        "%s: no file locks on this file system (%s): a second run is noticed on the same machine "
        "only; start none of the same outputs on another",
        *(folder, reason),
    )

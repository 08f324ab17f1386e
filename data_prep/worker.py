"""What a process beside the stage's own does: tasks, one at a time, until it hears no more.

It imports little, so that many of them start at once: no torch, no transformers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.contamination import EvaluationRuns
from data_prep.rows import RowsTask, write_rows
from data_prep.sources import DataError
from data_prep.tokenizer import Encoder
from data_prep.units import Making, Summary, UnitTask, read_summary, write_unit

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What every task needs; small, as it is sent to each process.

    tokenizer: a file of tokenizers' JSON; runs: a .npy of EvaluationRuns' hashes, and run_length.
    """

    tokenizer: Path
    engine: str
    bos_id: int
    dtype: str
    runs: Path | None = None
    run_length: int = 0


@dataclass(frozen=True)
class CheckTask:
    """A finished unit, to be held against its hashes."""

    prefix: Path


@dataclass(frozen=True)
class HashTask:
    """A file whose hash is wanted."""

    path: Path


class Performer:
    """Performs tasks in this process."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._making: Making | None = None

    @property
    def making(self) -> Making:
        """The tokenizer, built when the first unit is made."""
        setup = self._setup
        if self._making is None:
            runs = None
            if setup.runs is not None:
                runs = EvaluationRuns(np.load(setup.runs, mmap_mode="r"), setup.run_length)
            encoder = Encoder(setup.tokenizer.read_text(encoding="utf-8"), setup.engine)
            self._making = Making(encoder, setup.bos_id, np.dtype(setup.dtype), runs)
        return self._making

    def perform(self, task: Any) -> Summary | str | None:
        """A unit's Summary, a file's SHA-256, or None."""
        if isinstance(task, UnitTask):
            return write_unit(task, self.making)
        if isinstance(task, RowsTask):
            return write_rows(task)
        if isinstance(task, CheckTask):
            return read_summary(task.prefix, check=True)
        with task.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def main(descriptor: int, parent: int) -> None:
    """Perform what comes over a connection; answers are ("done" or a kind of error, value).

    `parent`: the process that gives the tasks, with which this one ends.
    """
    # Ctrl-C is for the process that gives the tasks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    connection = Connection(descriptor)
    performer = Performer(connection.recv())
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = ("done", performer.perform(task))
        except DataError as error:
            answer = ("refused", str(error))
        except Exception:
            answer = ("failed", traceback.format_exc())
        connection.send(answer)

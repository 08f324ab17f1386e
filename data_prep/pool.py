"""Tasks in several processes, answered in the order in which they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from data_prep.sources import DataError
from data_prep.worker import Performer, Setup

_ROOT = Path(__file__).resolve().parent.parent
# Each process has one core: libraries that would start threads of their own are told so.
_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class Pool:
    """Up to `count` processes, started as tasks come; with 1, the tasks are done in this one.

    They are started as programs of their own and not by multiprocessing, which would import
    this program's main module, and with it torch, in each. A context manager: left, none runs on.
    """

    def __init__(self, count: int, setup: Setup) -> None:
        """Raises:
        DataError: on a count below 1.
        """
        if count < 1:
            raise DataError(f"data.workers={count}: must be 1 or more; set data.workers")
        self.count = count
        self._setup = setup
        self._here = Performer(setup)
        self._processes: list[subprocess.Popen] = []
        self._idle: list[Connection] = []
        self._busy: dict[Connection, Any] = {}

    def run(self, next_task: Callable[[], Any | None]) -> Iterator[tuple[Any, Any]]:
        """Yield (task, answer) as tasks end, until none runs and next_task gives none.

        next_task is asked whenever a process is free; None: nothing now.

        Raises:
            DataError: what a task raises, and when a process dies.
        """
        if self.count == 1:
            while (task := next_task()) is not None:
                yield task, self._here.perform(task)
            return
        while True:
            while len(self._busy) < self.count and (task := next_task()) is not None:
                connection = self._idle.pop() if self._idle else self._start()
                self._busy[connection] = task
                with self._alive():
                    connection.send(task)
            if not self._busy:
                return
            for connection in wait(list(self._busy)):
                with self._alive():
                    kind, value = connection.recv()
                task = self._busy.pop(connection)
                self._idle.append(connection)
                if kind == "refused":
                    raise DataError(value)
                if kind == "failed":
                    raise RuntimeError(f"in a process of data_prep:\n{value}")
                yield task, value

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        code = f"from data_prep.worker import main; main({theirs.fileno()}, {os.getpid()})"
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | dict.fromkeys(_ONE_THREAD, "1")
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
            )
        with self._alive():
            ours.send(self._setup)
        return ours

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Turn what a connection says of a process that died into a DataError."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            raise DataError(
                f"a process of data_prep's {self.count} died, as when memory runs out; set "
                "data.workers lower"
            ) from error

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in (*self._idle, *self._busy):
            connection.close()

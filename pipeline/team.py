"""What the processes of one stage tell each other: who decides, who failed first, who says it."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from pipeline.manifest import StageError, digest

log = logging.getLogger("longgen")

# Seconds to reach the launcher's store, which stands before it starts a worker.
CONNECT = 60
POLL = 0.1
# Seconds that a rank gives rank 0 to say the same error, and a launcher to see who was killed.
PATIENCE = 3.0
NOTICE = 0.5
# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
FAILED = "failed"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Failure:
    """The first rank that could not go on, and the exit code that all of them leave with."""

    rank: int
    exit_code: int


class RankFailed(Exception):
    """Another rank failed, and has said why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} failed")
        self.exit_code = failure.exit_code


def launched() -> bool:
    """Whether a launcher (torchrun, or run.py itself) started this process."""
    return "RANK" in os.environ


def loopback_store() -> TCPStore:
    """A store on a free port of the loopback interface; by itself TCPStore listens on all of them.

    What connects to it must be of this machine, by the address LOOPBACK.
    """
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    # The store closes it.
    descriptor = listener.detach()
    return TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )


def own_keys(store: Store, run_id: str, attempt: str) -> Store:
    """The part of a launcher's store in which a team talks; `attempt` counts the restarts.

    `run_id`: torchrun's, or a random one, so that whoever else reaches the store does not hit upon
    the keys that end a run.
    """
    return PrefixStore(f"longgen_team/{run_id}/{attempt}", store)


def note_failure(store: Store, own: Failure) -> Failure:
    """Leave a failure in `own_keys`, unless there is one; the one that is there."""
    return Failure(**json.loads(store.compare_set(FAILED, "", json.dumps(asdict(own)))))


def first_failure(store: Store) -> Failure | None:
    """What the first rank that failed has left in `own_keys`."""
    return Failure(**json.loads(store.get(FAILED))) if store.check([FAILED]) else None


class Team:
    """This process among those of its run; alone where no launcher started it.

    Waiting has no time limit: rank 0 may stand behind another run's lock for hours. It ends when a
    rank has failed; where one was killed, the launcher ends the others.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        """`store`: where the ranks talk; None where there is one."""
        self.rank, self.size, self._store = rank, size, store
        self._said: Counter[str] = Counter()

    @classmethod
    def join(cls) -> Team:
        """The team that torchrun's environment names (RANK, WORLD_SIZE, MASTER_ADDR, ...).

        A worker ends with its launcher, or it could write into the folder of the next run.

        Raises:
            StageError: where that environment is not whole, or its store cannot be reached.
        """
        if not launched() or os.environ.get("WORLD_SIZE") == "1":
            return cls()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            found = next(rendezvous("env://", timeout=timedelta(seconds=CONNECT)))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise StageError(
                f"RANK={os.environ['RANK']}: the other processes cannot be reached ({reason}); "
                "start every process by torchrun, or unset RANK to run one alone"
            ) from error
        store, rank, size = found
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, size, own_keys(store, run_id, attempt))

    def tell(self, key: str, value: Any) -> None:
        """Give a JSON value to all ranks that hear `key`."""
        if self.size > 1:
            self._store.set(key, json.dumps(value, default=str))

    def hear(self, key: str) -> Any:
        """The value that a rank tells.

        Raises:
            RankFailed: another rank cannot go on.
        """
        self._wait(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def meet(self, place: str) -> None:
        """Wait until every rank is here.

        Raises:
            RankFailed: another rank cannot go on.
        """
        if self.size > 1:
            self._store.add(place, 1)
            self._wait(lambda: self._store.add(place, 0) == self.size)

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            failure = first_failure(self._store)
            if failure:
                raise RankFailed(failure)
            time.sleep(POLL)

    def fail(self, exit_code: int, wait: float = 0.0) -> Failure:
        """Note that this rank cannot go on; the failure that was noted first.

        `wait`: seconds for the launcher to note a rank that was killed, if that is the reason.
        """
        own = Failure(self.rank, exit_code)
        if self.size > 1:
            time.sleep(wait)
            # A launcher that is gone has taken its store along.
            with suppress(RuntimeError):
                return note_failure(self._store, own)
        return own

    def say(self, error: str) -> None:
        """Log an error once: by rank 0 as it is, by another rank where rank 0 has no such error."""
        key = f"error/{digest(error)}"
        if self.rank == 0:
            log.error("error: %s", error)
            with suppress(RuntimeError):
                self.tell(key, "said")
            return
        with suppress(RuntimeError):
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                if self._store.check([key]):
                    return
                time.sleep(POLL)
            if self._store.add(f"{key}/others", 1) > 1:
                return
        log.error("error: rank %d: %s", self.rank, error)

    def says(self, record: logging.LogRecord) -> bool:
        """A logging filter: of the warnings that all ranks give, the first one's is shown."""
        if self.size == 1 or record.levelno != logging.WARNING:
            return True
        if hasattr(record, "shown"):
            # The first of this process's handlers has decided.
            return record.shown
        name = digest(record.getMessage())
        # The second time that a rank says the same is another event.
        self._said[name] += 1
        try:
            record.shown = self._store.add(f"warned/{name}/{self._said[name]}", 1) == 1
        except RuntimeError:
            record.shown = True
        return record.shown

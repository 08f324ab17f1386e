"""Starts the processes of a stage that runs on several, watches them, and starts them again."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from types import FrameType
from typing import Any

from torch.distributed import Store
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    SubprocessContext,
    start_processes,
)

from pipeline.manifest import STOPPED_BY_FILE
from pipeline.refusals import USER_ERROR
from pipeline.team import (
    LOOPBACK,
    Failure,
    first_failure,
    loopback_store,
    note_failure,
    own_keys,
)
from pipeline.training.watchdog import EXIT_CODE as HUNG

log = logging.getLogger("longgen")

# Seconds that the others have to end by themselves when one has failed, and then to be closed.
GRACE = 5.0
CLOSE = 10
POLL = 0.1
INTERRUPTED = 128 + signal.SIGINT
# A rank that ends with one of these was asked to, and has saved; so do the others.
STOPPED = (STOPPED_BY_FILE, 128 + signal.SIGTERM, INTERRUPTED)
ASKS = (signal.SIGTERM, signal.SIGINT)
# torchrun's process manager takes these over when it starts something.
TAKEN = (*ASKS, signal.SIGHUP, signal.SIGQUIT)


class WorkersEnded(Exception):
    """The workers' stage did not finish; the message is empty where they have said why.

    What the same command does then, the runner adds.
    """

    def __init__(self, exit_code: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Asked:
    """The first of SIGTERM and SIGINT (Ctrl-C) that came, and whether Ctrl-C followed.

    A second SIGTERM is the same request: Slurm sends several.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.again = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.again = self.again or (self.number is not None and number == signal.SIGINT)
        self.number = self.number or number

    def take(self) -> None:
        """Undo what starting processes has done to the handlers, and listen."""
        for number, handler in self._before.items():
            signal.signal(number, self._note if number in ASKS else handler)

    def __enter__(self) -> _Asked:
        self._before = {number: signal.getsignal(number) for number in TAKEN}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _start(
    arguments: Sequence[str], size: int, port: int, run_id: str, attempt: int
) -> SubprocessContext:
    # What it says of closing processes, this module says in its own words.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
    world = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # env:// then joins this process's store, instead of opening one in rank 0.
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        # All are on this machine: gloo need not listen on its network.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return start_processes(
        name="workers",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(size), tuple(arguments)),
        envs={rank: {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)},
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )


def _ended_silently(codes: dict[int, int | None]) -> list[int]:
    """Ranks that were killed, or ended by their watchdog: they could tell the others nothing.

    Not those that aborted: NCCL does so because of others.
    """
    return [
        rank
        for rank, code in codes.items()
        if code == HUNG or (code and code < 0 and code != -signal.SIGABRT)
    ]


def _watch(workers: SubprocessContext, asked: _Asked, store: Store) -> dict[int, int | None]:
    """Exit codes of the ranks as they ended by themselves; None for those that had to be closed."""
    forwarded, until = False, None
    while True:
        codes = {rank: worker.proc.poll() for rank, worker in workers.subprocess_handlers.items()}
        running = [rank for rank, code in codes.items() if code is None]
        if not running:
            return codes
        if asked.again:
            raise WorkersEnded(INTERRUPTED, "interrupted")
        if asked.number and not forwarded:
            forwarded = True
            # Rank 0 acknowledges it: what it saves, and what a second signal would cost.
            for rank in running:
                os.kill(workers.pids()[rank], signal.SIGTERM)
        silent = _ended_silently(codes)
        if silent:
            note_failure(store, Failure(silent[0], 1))
        ended = set(codes.values()) - {None, 0}
        if until is None and ended and (ended - set(STOPPED) or first_failure(store)):
            until = time.monotonic() + GRACE
        if until is not None and time.monotonic() > until:
            return codes
        time.sleep(POLL)


def _cause(codes: dict[int, int | None], store: Store) -> tuple[int, int] | None:
    """(rank, exit code) of what brought the others down; None where all ended well."""
    silent, told = _ended_silently(codes), first_failure(store)
    if silent:
        return silent[0], codes[silent[0]]
    if told:
        return told.rank, told.exit_code
    failed = ((rank, code) for rank, code in codes.items() if code and code not in STOPPED)
    return next(failed, None)


def _describe(rank: int, code: int) -> str:
    if code < 0:
        hint = " (is the host out of memory?)" if code == -signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-code).name}{hint}"
    if code == HUNG:
        return f"rank {rank} was ended by its hang watchdog (exit code {code})"
    return f"rank {rank} failed with exit code {code}"


def run_once(arguments: Sequence[str], size: int, attempt: int = 0) -> str | None:
    """Start `size` workers, `python *arguments`, and wait for them.

    SIGTERM and Ctrl-C are passed on as SIGTERM, and the workers have all the time they need to
    save; Ctrl-C after it ends them at once. When this returns or raises, none is left.

    Returns:
        None where all ended with 0; else which rank failed, and how, in words.

    Raises:
        WorkersEnded: where the workers met a user's error or were asked to stop.
    """
    server, run_id = loopback_store(), secrets.token_hex(16)
    store = own_keys(server, run_id, str(attempt))
    workers, whole = None, False
    with _Asked() as asked:
        try:
            workers = _start(arguments, size, server.port, run_id, attempt)
            asked.take()
            codes = _watch(workers, asked, store)
            whole = all(code in (0, *STOPPED) for code in codes.values())
        except SignalException as error:
            raise WorkersEnded(128 + error.sigval, f"stopped by {error.sigval.name}") from error
        finally:
            if workers:
                # Also where all have ended: the process manager has threads of its own.
                # What still runs waits for a rank that is gone, and hears no other signal there.
                workers.close(signal.SIGKILL, CLOSE)
            if workers and not whole:
                # A worker's own children may outlive it, and must not write beside the next ones.
                for pid in workers.pids().values():
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
    return _outcome(codes, store, asked.number)


def _outcome(codes: dict[int, int | None], store: Store, asked: int | None) -> str | None:
    cause = _cause(codes, store)
    if cause and cause[1] in (USER_ERROR, INTERRUPTED):
        raise WorkersEnded(cause[1])
    stopped = [code for code in codes.values() if code in STOPPED]
    if asked:
        # Workers that were not yet at work had nothing to save, and died of the signal.
        died = cause and cause[1] != -signal.SIGTERM
        said = "" if stopped and not cause else f"stopped by {signal.Signals(asked).name}"
        told = [_describe(*cause)] if died else []
        raise WorkersEnded(128 + asked, "; ".join([*told, said]) if said else "")
    if stopped:
        # All have saved; what one died of afterwards is no reason to go on.
        raise WorkersEnded(stopped[0], _describe(*cause) if cause else "")
    return _describe(*cause) if cause else None


def run_workers(
    arguments: Sequence[str],
    size: int,
    restarts: int,
    reached: Callable[[], str | None],
    finished: Callable[[], bool],
) -> None:
    """Run workers until their stage has finished, starting all again where one failed.

    At most `restarts` times, and only where `reached()`, the name of the newest checkpoint, has
    changed since the last start: what fails twice at one place would fail there for ever.

    Raises:
        WorkersEnded: where they met a user's error, were asked to stop, or are given up.
    """
    for attempt in count():
        before = reached()
        failure = run_once(arguments, size, attempt)
        if failure is None:
            return
        if finished():
            log.warning("%s, after the stage was done", failure)
            return
        now = reached()
        if now == before:
            raise WorkersEnded(
                1,
                f"{failure}; not restarted, for no checkpoint was written since the workers "
                "started; fix the error above",
            )
        if attempt == restarts:
            raise WorkersEnded(
                1,
                f"{failure}; not restarted after {restarts} restarts (parallel.restarts allows "
                "more)",
            )
        log.error(
            "%s; all workers start again from %s, restart %d of %d",
            failure,
            now,
            attempt + 1,
            restarts,
        )

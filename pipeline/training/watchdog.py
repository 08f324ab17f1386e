"""Ends a run that hangs: names the ranks that are behind, keeps every thread's stack, exits."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger("longgen.training")

# EX_SOFTWARE of sysexits.h.
EXIT_CODE = 70
PREFIX = "longgen_watchdog"
HANG_KEY = f"{PREFIX}/hang"
# A rank whose record has not changed in so many looks no longer answers.
UNCHANGED_LOOKS = 3
# Ranks that a message names before it counts the others.
NAMED = 8


@dataclass(frozen=True)
class Beat:
    """What the main thread last said: its how-manieth beat, when, and the seconds it may take."""

    count: int
    what: str
    at: float
    limit: float

    @property
    def age(self) -> float:
        """Seconds since."""
        return time.monotonic() - self.at

    @property
    def late(self) -> bool:
        """Whether the next beat is overdue."""
        return self.age > self.limit


@dataclass(frozen=True)
class Record:
    """A rank's last beat as it told the others, and how many times it had told them before.

    An age and not a time of day, for the hosts' clocks may differ. `where` is the innermost Python
    frame of its main thread.
    """

    count: int
    what: str
    age: float
    limit: float
    where: str
    told: int

    def __str__(self) -> str:
        return f'"{self.what}" for {self.age:.1f} s, in {self.where}'


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:NAMED]))
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"


class Watchdog:
    """Ends the run, on all ranks, when a main thread has not beaten for `timeout` seconds.

    All ranks beat in the same order. One thread tells this rank's beats to the others through
    `store`; another judges, and never waits for the store. The run hangs when this rank's beat is
    overdue and so are, or no longer answer, all ranks that are not ahead of it. Every rank is then
    told, writes its stacks to `folder`/hang_rank_N.txt and to stderr, logs who is behind, leaves
    the others time for the same, and exits with code 70.

    Where the interpreter itself stands still (a native call that keeps the GIL) no Python can run:
    faulthandler's own thread writes the stacks and ends the process, with code 1. For its sake the
    file is there from the start; it goes with the `with` block if it is still empty.
    """

    def __init__(
        self, timeout: float, rank: int, size: int, store: Store | None, folder: Path
    ) -> None:
        """`timeout` in seconds, 0: nothing is watched. `store`: None where a rank is alone."""
        self.timeout, self.rank, self.size = timeout, rank, size
        self.path = folder / f"hang_rank_{rank}.txt"
        # How often beats are told and judged; what the others get before this process ends.
        self.interval = min(5.0, timeout / 20)
        self.grace = 5 * self.interval
        self._store = store
        self._main = threading.get_ident()
        self._beat = Beat(0, "start", time.monotonic(), timeout)
        self._threads: list[threading.Thread] = []
        # Set once, when the block is left (no verdict) or the run hangs (its verdict).
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._verdict: str | None = None
        # Of the other ranks: the last record, and in how many looks it has not changed.
        self._seen: dict[int, tuple[Record, int]] = {}
        self._looks, self._looked_at = 0, 0.0
        self._trouble = "the store does not answer"

    def __enter__(self) -> Watchdog:
        self._main = threading.get_ident()
        self.beat("start")
        if not self.timeout:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # An earlier hang's stacks stay. Unbuffered, for faulthandler writes to the descriptor.
        self._file = self.path.open("ab", buffering=0)
        self._arm()
        self._over.clear()
        loops = [self._judge] if self._store is None else [self._judge, self._talk]
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if not self._threads:
            return
        if self._settle(None):
            # What ended the block (a peer that has gone) comes of the hang: exit with its code.
            time.sleep(2 * self.grace)
        self._threads[0].join()
        for thread in self._threads[1:]:
            # A call to a dead store may never return.
            thread.join(self.grace)
        faulthandler.cancel_dump_traceback_later()
        if not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def beat(self, what: str, allowance: float | None = None) -> None:
        """Note that the main thread begins `what`; it may take `timeout` or `allowance` seconds.

        The larger of the two counts. Cheap: it does not talk to the others.
        """
        limit = max(self.timeout, allowance or 0.0)
        longer = limit > self._beat.limit
        self._beat = Beat(self._beat.count + 1, what, time.monotonic(), limit)
        if longer and self._threads:
            self._arm()

    def _arm(self) -> None:
        """Have faulthandler's thread end the process should the judge not come back in time."""
        left = max(0.0, self._beat.limit - self._beat.age)
        faulthandler.dump_traceback_later(left + 4 * self.grace, exit=True, file=self._file)

    def _settle(self, verdict: str | None) -> bool:
        """End the watch with this verdict unless it has ended; whether it ended with a hang."""
        with self._lock:
            if not self._over.is_set():
                self._verdict = verdict
                self._over.set()
            return self._verdict is not None

    # The thread that judges.

    def _judge(self) -> None:
        late_since = None
        while not self._over.wait(self.interval):
            self._arm()
            if not self._beat.late:
                late_since = None
                continue
            late_since = late_since or time.monotonic()
            known = self._looks > UNCHANGED_LOOKS or self._store is None
            patient = time.monotonic() - late_since < self.grace
            if not (patient and not known) and not self._others_have_time():
                self._settle(f"rank {self.rank}: the run hangs: {self._who_is_behind()}")
        if self._verdict is not None:
            self._end()

    def _knows(self) -> bool:
        """Whether what it has of the other ranks is of now."""
        return self._looks > 0 and time.monotonic() - self._looked_at < self.grace

    def _others_have_time(self) -> bool:
        """Whether some rank that is not ahead of this one answers and is within its limit."""
        return self._knows() and any(
            record.count <= self._beat.count
            and unchanged < UNCHANGED_LOOKS
            and record.age <= record.limit
            for record, unchanged in self._seen.values()
        )

    def _who_is_behind(self) -> str:
        own = self._record()
        if self.size == 1:
            return f"it stands at {own}"
        if not self._knows():
            return f"it stands at {own}; the other ranks are not known ({self._trouble})"
        seen = {self.rank: (own, 0), **self._seen}
        least = min(record.count for record, _ in seen.values())
        behind: dict[str, list[int]] = defaultdict(list)
        for rank in range(self.size):
            if rank not in seen:
                behind["not heard of since the start"].append(rank)
            elif seen[rank][0].count == least and len(seen) == self.size:
                gone = "no longer answering, last " if seen[rank][1] >= UNCHANGED_LOOKS else ""
                behind[f"{gone}at {seen[rank][0]}"].append(rank)
        told = "; ".join(f"{_ranks(ranks)} {place}" for place, ranks in behind.items())
        ranks = sum(behind.values(), [])
        if len(ranks) == self.size:
            return f"no rank is behind the others: {told}"
        mine = "" if self.rank in ranks else f"; rank {self.rank} at {own}"
        return f"behind: {told}{mine}"

    def _end(self) -> None:
        """Write the stacks, say who is behind, and end the process."""
        # Whatever blocks here (a pipe that nobody reads, a lock that the main thread holds).
        threading.Thread(target=self._exit, daemon=True).start()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        head = f"{stamp} {self._verdict}\nStacks of rank {self.rank}, at {self._record()}:\n"
        self._file.write(head.encode())
        faulthandler.dump_traceback(self._file, all_threads=True)
        log.error(
            "%s. Stacks are in %s; rank %d ends with code %d, the last checkpoint is untouched. "
            "If this was only slow, raise train.hang_seconds",
            self._verdict,
            self.path.with_name("hang_rank_*.txt"),
            self.rank,
            EXIT_CODE,
        )
        os.write(2, head.encode())
        faulthandler.dump_traceback(2, all_threads=True)

    def _exit(self) -> None:
        time.sleep(self.grace)
        os._exit(EXIT_CODE)

    # The thread that talks to the other ranks.

    def _record(self, told: int = 0) -> Record:
        beat = self._beat
        frame = sys._current_frames().get(self._main)
        where = "?"
        if frame is not None:
            code = frame.f_code
            where = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        return Record(beat.count, beat.what, beat.age, beat.limit, where, told)

    def _talk(self) -> None:
        told = 0
        try:
            # A connection of its own: the main thread may block in the store's.
            store = self._store.clone()
            stale = store.get(HANG_KEY) if store.check([HANG_KEY]) else None
            while not self._over.wait(self.interval):
                record = json.dumps(asdict(self._record(told)))
                store.set(f"{PREFIX}/{self.rank}", record)
                told += 1
                if self._beat.late:
                    self._look(store)
                else:
                    self._seen, self._looks = {}, 0
                if store.check([HANG_KEY]) and (verdict := store.get(HANG_KEY)) != stale:
                    self._settle(verdict.decode())
            if self._verdict is not None:
                store.set(HANG_KEY, self._verdict)
        # torch.distributed's errors are RuntimeErrors; a store in Python may raise others.
        except Exception as error:
            self._trouble = f"the store is gone: {str(error).splitlines()[0]}"
            log.warning(
                "rank %d: %s; a hang is still noticed, but not which rank is behind",
                self.rank,
                self._trouble,
            )

    def _look(self, store: Store) -> None:
        """Read what the other ranks told."""
        keys = {rank: f"{PREFIX}/{rank}" for rank in range(self.size) if rank != self.rank}
        # To get a key that is not there would wait for it.
        there = [rank for rank in keys if store.check([keys[rank]])]
        values = store.multi_get([keys[rank] for rank in there]) if there else []
        seen = {}
        for rank, value in zip(there, values, strict=True):
            record = Record(**json.loads(value))
            before, unchanged = self._seen.get(rank, (None, 0))
            same = before is not None and before.told == record.told
            seen[rank] = (record, unchanged + 1 if same else 0)
        self._seen, self._looks, self._looked_at = seen, self._looks + 1, time.monotonic()

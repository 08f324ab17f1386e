"""Which units of which sources are made when, and which of them count.

Documents count in the order of the units, up to the first unit at which a source has what it needs:
so which documents count depends on the data and the configuration alone, never on the number of
processes, on shards, or on what an interrupted run has left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.mix import Pool, Wanted
from data_prep.readers import no_documents
from data_prep.sources import UNIT_BYTES, DataError, Skips, Source, plan_units
from data_prep.units import (
    DOCUMENT,
    Summary,
    UnitTask,
    is_whole,
    read_documents,
    read_names,
    read_summary,
    token_file,
)

_TOKENS_PER_BYTE = 0.3
# A source of few tokens is read in units small enough that little more than these is read.
_LEAST_UNIT_BYTES = 1 << 18
_UNITS_PER_SHARE = 16
# Units are started until what they are likely to give is this much more than what is needed.
_MARGIN = 1.02


@dataclass(frozen=True)
class Shard:
    """The units number, number + count, number + 2 * count, ... of every source, from 0."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n", i from 1 to n.

        Raises:
            DataError: on anything else.
        """
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return cls(int(number) - 1, int(count))
        raise DataError(
            f"data.shard={text!r}: must be i/n with i from 1 to n, such as 3/8; set data.shard"
        )

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.count}"


@dataclass
class SourceUnits:
    """The units of one source: planned, running and done.

    share: the tokens that training needs of it; None: everything. folders: where a unit may be
    found, the first of which is written to.
    """

    number: int
    source: Source
    wanted: Wanted
    share: int | None
    folders: list[Path]
    seed: int
    strict: bool
    shard: Shard | None = None
    done: dict[int, Summary] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        unit_bytes = UNIT_BYTES
        if self.share is not None:
            few = int(self.share / _TOKENS_PER_BYTE / _UNITS_PER_SHARE)
            unit_bytes = max(_LEAST_UNIT_BYTES, min(UNIT_BYTES, few))
        if self.source.needles is not None:
            unit_bytes = max(1, unit_bytes // self.source.needles.copies)
        self.units = plan_units(self.source, self.seed, unit_bytes)
        self.need = self.share
        # place in `order` of the next unit that may have to be started
        self._next = 0
        step = self.shard or Shard(0, 1)
        self.order = list(range(step.number, len(self.units), step.count))
        if self.share is not None and self.shard:
            # the merge makes what is missing where the shards are unlike
            self.need = int(self.share / self.shard.count * 1.05) + 1

    def prefix(self, number: int, folder: Path | None = None) -> Path:
        """Of a unit's files, in the folder that is written to or another."""
        return (folder or self.folders[0]) / f"{self.number}" / f"{number:06d}"

    def place(self, number: int) -> Path:
        """The prefix of a unit that is done."""
        found = (self.prefix(number, folder) for folder in self.folders)
        return next(prefix for prefix in found if is_whole(prefix))

    def counted(self) -> list[int] | None:
        """The units that count, in order; None while that is open."""
        if self.need is None:
            return self.order if len(self.done) == len(self.order) else None
        usable = held_out = 0
        for place, number in enumerate(self.order):
            if number not in self.done:
                return None
            usable += self.done[number].usable
            held_out += self.done[number].held_out
            # a shard need not hold a held-out document, and needles are never held out
            if usable >= self.need and (held_out or self.shard or self.source.needles):
                return self.order[: place + 1]
        return self.order

    def next_task(self) -> UnitTask | None:
        """The next unit to make; None when enough are made or running."""
        if self.counted() is not None:
            return None
        made_bytes = sum(self.units[n].size for n in self.done)
        made = sum(summary.usable for summary in self.done.values())
        rate = made / made_bytes if made_bytes else _TOKENS_PER_BYTE
        likely = made + rate * sum(self.units[n].size for n in self.running)
        while self._next < len(self.order):
            number = self.order[self._next]
            if number in self.done:
                self._next += 1
                continue
            if self.running and self.need is not None and likely >= _MARGIN * self.need:
                return None
            self._next += 1
            self.running.add(number)
            return UnitTask(
                source=self.source,
                unit=self.units[number],
                prefix=self.prefix(number),
                wanted=self.wanted,
                enough=None if self.share is None else self.share + self.share // 4,
                seed=self.seed,
                strict=self.strict,
            )
        return None

    def finish(self, task: UnitTask, summary: Summary) -> None:
        """Take in what a task came to."""
        number = int(task.prefix.name)
        self.running.discard(number)
        self.done[number] = summary

    def find(self) -> list[Path]:
        """Take in what is on disk already; the prefixes of those units."""
        self.prefix(0).parent.mkdir(parents=True, exist_ok=True)
        for number in self.order:
            if any(is_whole(self.prefix(number, folder)) for folder in self.folders):
                self.done[number] = read_summary(self.place(number))
        return [self.place(number) for number in self.done]

    def more(self, tokens: int) -> bool:
        """Need so many more usable tokens; whether there are units that may give them."""
        counted = self.counted()
        if self.need is None or counted is None or len(counted) == len(self.order):
            return False
        self.need = sum(self.done[n].usable for n in counted) + tokens
        return True

    def skips(self, numbers: Iterable[int]) -> Skips:
        """What was left out of these units."""
        total = Skips()
        for number in numbers:
            for reason, (count, first) in self.done[number].skipped.items():
                total.count(reason, first, count)
        return total


class Corpus:
    """The units of all sources, as one list of work."""

    def __init__(self, sources: list[SourceUnits]) -> None:
        self.sources = sources

    def next_task(self) -> UnitTask | None:
        """The next unit to make, of the first source that needs one."""
        for units in self.sources:
            task = units.next_task()
            if task is not None:
                return task
        return None

    def finish(self, task: UnitTask, summary: Summary) -> None:
        """Take in what a task came to."""
        owner = next(u for u in self.sources if u.source.name == task.source.name)
        owner.finish(task, summary)

    def tokens(self) -> int:
        """Usable tokens of what is done."""
        return sum(s.usable for units in self.sources for s in units.done.values())

    def bytes_done(self) -> int:
        """Bytes of the sources' files that have been read."""
        return sum(units.units[n].size for units in self.sources for n in units.done)

    def bytes_all(self) -> int:
        """Bytes of all units."""
        return sum(units.units[n].size for units in self.sources for n in units.order)


@dataclass(frozen=True)
class Read:
    """The documents of one source that count, and where each one's tokens are.

    documents: DOCUMENT [documents]; file: int32 [documents], which of `files`; start: int64, the
    first token there.
    """

    documents: np.ndarray
    file: np.ndarray
    start: np.ndarray
    files: list[Path]
    prefixes: list[Path]
    skips: Skips

    def pool(self, name: str, wanted: Wanted) -> Pool:
        """For the mix."""
        lengths = self.documents["tokens"].astype(np.int64)
        allowed = wanted.allowed(lengths) & ~self.documents["contaminated"]
        columns = (np.array(self.documents[key]) for key in ("held_draw", "keep_draw", "digest"))
        return Pool(name, lengths, *columns, allowed)

    def names(self, wanted: set[int]) -> dict[int, str]:
        """The names of these documents."""
        found = {}
        for number, prefix in enumerate(self.prefixes):
            here = np.flatnonzero(self.file == number)
            if wanted.isdisjoint(range(here[0], here[-1] + 1) if len(here) else ()):
                continue
            names = read_names(prefix)
            found |= {int(i): names[i - here[0]] for i in here if int(i) in wanted}
        return found


def read_counted(units: SourceUnits) -> Read:
    """The documents of a source's units that count.

    Raises:
        DataError: when there is none.
    """
    numbers = units.counted()
    prefixes = [units.place(number) for number in numbers]
    skips = units.skips(numbers)
    parts = [read_documents(prefix) for prefix in prefixes]
    documents = np.concatenate([np.empty(0, DOCUMENT), *parts])
    if not len(documents):
        raise no_documents(units.source, skips)
    starts = [np.cumsum(part["tokens"]) - part["tokens"] for part in parts]
    return Read(
        documents=documents,
        file=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        start=np.concatenate(starts),
        files=[token_file(prefix) for prefix in prefixes],
        prefixes=prefixes,
        skips=skips,
    )

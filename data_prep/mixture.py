"""The mix of all sources: which documents train, which are held out, and where their tokens are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import audit, mix
from data_prep.corpus import Read, SourceUnits
from data_prep.rows import PIECE

# Of a shortage, so that further documents that turn out to be left out are made up for.
_SHORTAGE_MARGIN = 1.05


class Mixture:
    """Which documents are held out, which train, and where their tokens are."""

    def __init__(
        self,
        reads: list[Read],
        sources: list[SourceUnits],
        held_out: float,
        held_out_tokens: int | None,
        deduplicate: bool,
        seed: int,
    ) -> None:
        """`reads`: what counts of each of `sources`; the others: see DataSection of the pipeline.

        Raises:
            DataError: what mix.hold_out raises.
        """
        self.reads, self.sources, self.seed = reads, sources, seed
        self.pools = [
            read.pool(units.source.name, units.wanted)
            for read, units in zip(reads, sources, strict=True)
        ]
        nothing = [np.zeros(len(pool.lengths), bool) for pool in self.pools]
        self.repeated = mix.repeated(self.pools) if deduplicate else nothing
        for pool, again in zip(self.pools, self.repeated, strict=True):
            pool.allowed[again] = False
        self.held = mix.hold_out(self.pools, held_out, held_out_tokens)
        self.copies = mix.copies_of_held_out(self.pools, self.held)
        self.kept = [
            mix.kept(pool.lengths, pool.keep_draw, units.wanted.upsampling)
            & pool.allowed
            & ~held
            & ~copies
            for pool, units, held, copies in zip(
                self.pools, sources, self.held, self.copies, strict=True
            )
        ]

    def ask_for_more(self) -> bool:
        """Whether a source that falls short of its share has more units to be made."""
        asked = False
        for pool, kept, units in zip(self.pools, self.kept, self.sources, strict=True):
            short = (units.share or 0) - int(pool.lengths[kept].sum())
            if short > 0:
                asked |= units.more(int(short * _SHORTAGE_MARGIN) + 1)
        return asked

    def choose(self, log: logging.Logger) -> list[dict[str, Any]]:
        """Choose the documents, for training and held out; each source's row of the table.

        Raises:
            DataError: when a source has nothing left to train on.
        """
        choices, rows = [], []
        for i, (pool, units) in enumerate(zip(self.pools, self.sources, strict=True)):
            choice = mix.choose(pool.name, pool.lengths, self.kept[i], units.share, self.seed)
            choices.append(choice)
            left_out = audit.LeftOut(
                held_out=self.held[i],
                copies_of_held_out=self.copies[i],
                repeated=self.repeated[i],
                contaminated=np.array(self.reads[i].documents["contaminated"]),
                of_other_length=~units.wanted.allowed(pool.lengths),
            )
            skips = self.reads[i].skips
            rows.append(audit.source_row(pool, left_out, self.kept[i], choice, units.share, skips))
            if skips.counts:
                log.warning(f"{pool.name}: left out {skips.describe()}")
            log.info(audit.describe(rows[i]))
            if not self.held[i].any() and units.source.needles is None:
                log.warning(
                    f"{pool.name}: none of its {len(pool.lengths):,} documents is held out, so "
                    "that validation and evaluation show nothing of it; raise data.held_out or "
                    "data.held_out_tokens, or give it more documents (of format=text, more files)"
                )
            if choice.epochs > 1:
                log.warning(
                    f"{pool.name}: smaller than its share of {units.share:,} tokens, so its "
                    f"documents repeat: {choice.epochs:.2f} epochs"
                )
        self.train_items, self.train_lengths = _in_random_order(
            [choice.documents for choice in choices],
            [choice.lengths for choice in choices],
            self.seed,
        )
        self.held_items, self.held_lengths = _in_random_order(
            [np.flatnonzero(mask) for mask in self.held],
            [pool.lengths[mask] for pool, mask in zip(self.pools, self.held, strict=True)],
            self.seed,
        )
        return rows

    def pieces(self, items: np.ndarray) -> np.ndarray:
        """The PIECE that is the whole document, for each (source, document) of `items`."""
        pieces = np.empty(len(items), PIECE)
        first_file = 0
        for number, read in enumerate(self.reads):
            here = items[:, 0] == number
            documents = items[here, 1]
            pieces["file"][here] = read.file[documents] + first_file
            pieces["start"][here] = read.start[documents]
            pieces["length"][here] = read.documents["tokens"][documents]
            first_file += len(read.files)
        return pieces

    @property
    def files(self) -> list[Path]:
        """The token files of all sources, as `pieces` counts them."""
        return [path for read in self.reads for path in read.files]


def _in_random_order(
    documents: list[np.ndarray], lengths: list[np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(source, document) pairs int64 [items, 2] over all sources, shuffled, and lengths [items]."""
    source = np.repeat(np.arange(len(documents)), [len(part) for part in documents])
    items = np.stack([source, np.concatenate(documents)], axis=1)
    order = np.random.default_rng(seed).permutation(len(items))
    return items[order], np.concatenate(lengths)[order]

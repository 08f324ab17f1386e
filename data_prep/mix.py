"""Which documents are held out, and which go into training how often."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.sources import DataError


@dataclass(frozen=True)
class Upsampling:
    """Fu et al. 2024 (arXiv 2402.10171): documents under `threshold` tokens (<bos> counted) are
    kept with probability `keep_short`, longer ones always."""

    threshold: int
    keep_short: float

    def __post_init__(self) -> None:
        if self.threshold < 1 or not 0 <= self.keep_short <= 1:
            raise DataError(
                f"data.upsample: threshold={self.threshold}, keep_short={self.keep_short}: must "
                "be at least 1, and from 0 to 1; set data.upsample"
            )


@dataclass(frozen=True)
class Wanted:
    """Which documents of a source may be used: min_tokens <= tokens <= max_tokens (<bos> counted),
    and of those what upsampling keeps, for training."""

    held_out: float
    upsampling: Upsampling | None = None
    min_tokens: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_held_out(self.held_out)
        if not 1 <= self.min_tokens <= (self.max_tokens or self.min_tokens):
            raise DataError(
                f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens}: must be 1 or more "
                "and in this order; set the source's min_tokens and max_tokens"
            )

    def allowed(self, lengths: np.ndarray) -> np.ndarray:
        """Boolean [documents]: those of a length in the bounds."""
        most = np.iinfo(np.int64).max if self.max_tokens is None else self.max_tokens
        return (lengths >= self.min_tokens) & (lengths <= most)

    def verdict(
        self, tokens: int, held_draw: float, keep_draw: float, contaminated: bool
    ) -> tuple[bool, bool]:
        """(whether training may take the document, whether it may be held out)."""
        most = self.max_tokens or tokens
        if contaminated or not self.min_tokens <= tokens <= most:
            return False, False
        if held_draw < self.held_out:
            return False, True
        up = self.upsampling
        return up is None or tokens >= up.threshold or keep_draw < up.keep_short, False


@dataclass(frozen=True)
class Pool:
    """The documents of one source in reading order: lengths in tokens, hashes, [documents] each.

    held_draw and keep_draw: uniform in [0, 1), from `draw`; digest: of the text, uint64; allowed:
    boolean, false for those that are not used at all.
    """

    name: str
    lengths: np.ndarray
    held_draw: np.ndarray
    keep_draw: np.ndarray
    digest: np.ndarray
    allowed: np.ndarray


@dataclass(frozen=True)
class Choice:
    """Documents of one source for training, in order, and how much of each (all but the last
    whole). `epochs`: passes over the source's kept documents, counted in tokens."""

    documents: np.ndarray
    lengths: np.ndarray
    epochs: float


def draw(seed: int, purpose: str, source: str, document_id: str) -> float:
    """Uniform in [0, 1), a function of its arguments alone: no order, no number of workers."""
    key = "\0".join((str(seed), purpose, source, document_id)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2.0**64


def share_budget(tokens: int, weights: Sequence[float]) -> list[int]:
    """Split a token budget by weights; the parts sum to it exactly.

    Raises:
        DataError: when the budget gives a source less than one token.
    """
    edges = np.round(np.cumsum(weights) / np.sum(weights) * tokens).astype(np.int64)
    shares = np.diff(edges, prepend=0).tolist()
    if min(shares) < 1:
        raise DataError(
            f"data.tokens={tokens}: gives shares of {shares} tokens for weights {list(weights)}; "
            "each must be 1 or more; set data.tokens higher"
        )
    return shares


def kept(lengths: np.ndarray, keep_draw: np.ndarray, upsampling: Upsampling | None) -> np.ndarray:
    """Boolean [documents]: what length upsampling keeps; everything without it."""
    if upsampling is None:
        return np.ones(len(lengths), bool)
    return (lengths >= upsampling.threshold) | (keep_draw < upsampling.keep_short)


def check_held_out(fraction: float) -> None:
    """Refuse a held-out fraction that would hold out nothing or everything.

    Raises:
        DataError: when it is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DataError(
            f"data.held_out={fraction}: must be above 0 and below 1, the share of documents that "
            "is kept for validation; set data.held_out"
        )


def hold_out(pools: list[Pool], fraction: float, max_tokens: int | None) -> list[np.ndarray]:
    """Boolean [documents] of each source: the documents that training never sees.

    Those whose draw is below `fraction`; with `max_tokens`, in the order of their draws until the
    next would pass it, and the others go back to training. At least one document of all is held
    out, and at least one of each source stays.

    Raises:
        DataError: when no source has two documents.
    """
    check_held_out(fraction)
    held = [(pool.held_draw < fraction) & pool.allowed for pool in pools]
    for pool, mask in zip(pools, held, strict=True):
        if pool.allowed.any() and (mask == pool.allowed).all():
            mask[np.argmax(np.where(pool.allowed, pool.held_draw, -1.0))] = False
    if not any(mask.any() for mask in held):
        able = [i for i, pool in enumerate(pools) if pool.allowed.sum() > 1]
        if not able:
            raise DataError(
                f"sources {', '.join(pool.name for pool in pools)} have one document each: none "
                "can be held out for validation and still leave one to train on; give a source "
                "with two or more documents"
            )
        draws = {i: np.where(pools[i].allowed, pools[i].held_draw, 2.0) for i in able}
        lowest = min(able, key=lambda i: draws[i].min())
        held[lowest][np.argmin(draws[lowest])] = True
    if max_tokens is not None:
        source = np.concatenate([np.full(mask.sum(), i) for i, mask in enumerate(held)])
        document = np.concatenate([np.flatnonzero(mask) for mask in held])
        drawn = np.concatenate([p.held_draw[m] for p, m in zip(pools, held, strict=True)])
        lengths = np.concatenate([p.lengths[m] for p, m in zip(pools, held, strict=True)])
        order = np.argsort(drawn, kind="stable")
        fits = np.cumsum(lengths[order]) <= max_tokens
        for place in order[1:][~fits[1:]]:
            held[source[place]][document[place]] = False
    return held


def repeated(pools: list[Pool]) -> list[np.ndarray]:
    """Boolean [documents] of each source: allowed, but with the text of an earlier allowed one.

    Earlier: in a source before, or before it in its own.
    """
    digests = np.concatenate([pool.digest for pool in pools])
    allowed = np.flatnonzero(np.concatenate([pool.allowed for pool in pools]))
    _, first = np.unique(digests[allowed], return_index=True)
    later = np.zeros(len(digests), bool)
    later[np.delete(allowed, first)] = True
    return np.split(later, np.cumsum([len(pool.digest) for pool in pools])[:-1])


def copies_of_held_out(pools: list[Pool], held: list[np.ndarray]) -> list[np.ndarray]:
    """Boolean [documents] of each source: not held out, but with the text of one that is."""
    digests = np.concatenate([p.digest[m] for p, m in zip(pools, held, strict=True)])
    return [np.isin(p.digest, digests) & p.allowed & ~m for p, m in zip(pools, held, strict=True)]


def choose(
    name: str, lengths: np.ndarray, usable: np.ndarray, budget: int | None, seed: int
) -> Choice:
    """Documents of one source for training.

    Args:
        lengths: tokens of each document, int64 [documents].
        usable: boolean [documents].
        budget: tokens to fill; the first pass goes in reading order, further ones each in an order
            of their own, and the last document is cut where the budget ends. None: every usable
            document once.

    Raises:
        DataError: when no document is usable.
    """
    documents = np.flatnonzero(usable)
    if not len(documents):
        raise DataError(
            f"source {name}: none of its {len(lengths)} documents is left to train on after "
            "length upsampling and the held-out split; set data.upsample.keep_short higher or "
            "threshold lower, or give more documents"
        )
    available = int(lengths[documents].sum())
    if budget is None:
        return Choice(documents, lengths[documents], 1.0)
    passes = [documents]
    for number in range(1, -(-budget // available)):
        passes.append(np.random.default_rng([seed, number]).permutation(documents))
    documents = np.concatenate(passes)
    ends = np.cumsum(lengths[documents])
    documents = documents[: np.searchsorted(ends, budget) + 1]
    taken = lengths[documents].copy()
    taken[-1] -= int(taken.sum()) - budget
    return Choice(documents, taken, budget / available)

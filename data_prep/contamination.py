"""Documents that share a run of tokens with texts that a model is evaluated on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_prep.sources import DataError

# Knuth's multiplier for a 64-bit linear congruential generator (MMIX): odd, so a bijection.
_FACTOR = np.uint64(6364136223846793005)


def run_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of `length` tokens, uint64 [tokens - length + 1], or empty."""
    count = len(tokens) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    values = tokens.astype(np.uint64) + np.uint64(1)
    total = np.zeros(count, np.uint64)
    for place in range(length):
        total = total * _FACTOR + values[place : place + count]
    # The low bits of such sums are poor.
    return total ^ (total >> np.uint64(29))


class EvaluationRuns:
    """The runs of tokens that no training document may hold.

    A document counts as contaminated by one common run of `length` tokens (Brown et al. 2020,
    arXiv 2005.14165, appendix C: 13 words; Touvron et al. 2023, arXiv 2307.09288, A.6: tokens).
    """

    def __init__(self, hashes: np.ndarray, length: int) -> None:
        self.hashes = hashes
        self.length = length

    @classmethod
    def of(cls, documents: Iterable[np.ndarray], length: int) -> EvaluationRuns:
        """The runs of these documents' tokens.

        Raises:
            DataError: on a length below 2, or when every document is shorter.
        """
        if length < 2:
            raise DataError(
                f"data.decontaminate.tokens={length}: must be 2 or more, the tokens of a common "
                "run; set data.decontaminate.tokens"
            )
        parts = [run_hashes(tokens, length) for tokens in documents]
        hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))
        if not len(hashes):
            raise DataError(
                f"data.decontaminate.tokens={length}: none of {len(parts)} evaluation texts has "
                "as many tokens; set data.decontaminate.tokens lower"
            )
        return cls(hashes, length)

    def seeker(self) -> Seeker:
        """For one document."""
        return Seeker(self)


class Seeker:
    """Looks for evaluation runs in a document whose tokens come in pieces."""

    def __init__(self, runs: EvaluationRuns) -> None:
        self._runs = runs
        self._tail = np.empty(0, np.int32)
        self.found = False

    def add(self, tokens: np.ndarray) -> None:
        """The next tokens of the document."""
        if self.found:
            return
        tokens = np.concatenate([self._tail, tokens])
        hashes = run_hashes(tokens, self._runs.length)
        places = np.searchsorted(self._runs.hashes, hashes)
        places[places == len(self._runs.hashes)] = 0
        self.found = bool((self._runs.hashes[places] == hashes).any())
        self._tail = tokens[-(self._runs.length - 1) :]

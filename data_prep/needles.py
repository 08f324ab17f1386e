"""Synthetic retrieval: text in which secret numbers are hidden, and asked for at the end.

A model that trains on it learns to look back for what it is asked. The wording is that of the
needle task (pipeline/tasks/niah.py), which asks about other words, in other text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

# What the needle task asks about, and training therefore never does.
TASK_WORDS = (
    *("anchor", "basket", "candle", "desert", "engine", "feather", "garden", "hammer"),
    *("island", "jacket", "kettle", "ladder", "mirror", "nickel", "orange", "pepper"),
)
NEEDLE = "\nThe secret number of the {word} is {number}.\n"
# A completion, so that a model that was never taught to follow instructions can answer it.
QUESTION = (
    "\nQuestion: What is the secret number of the {word}?"
    "\nAnswer: The secret number of the {word} is"
)
# Digits of a number, which some tokenizers split.
DIGITS = 5
_WORD = re.compile(r"(?<![A-Za-z])[a-z]{4,9}(?![A-Za-z])")


@dataclass(frozen=True)
class Needles:
    """How a source's text becomes documents with needles.

    characters: (least, most) of the text between the needles of one document; pairs: (fewest, most)
    needles of one, each asked for once, in an order of its own; copies: how often the text is used,
    cut and filled anew each time; seed: of all draws.
    """

    characters: tuple[int, int]
    pairs: tuple[int, int]
    copies: int = 1
    seed: int = 1

    def documents(self, name: str, text: str) -> Iterator[tuple[str, str]]:
        """(name with :COPY.PIECE, text) of each document made of one text.

        Nothing of a text with fewer distinct words than a document may have needles: the keys are
        words of the text itself.
        """
        words = sorted(set(_WORD.findall(text)) - set(TASK_WORDS))
        if len(words) < self.pairs[1]:
            return
        for copy in range(self.copies):
            rng = random.Random(f"{self.seed}\0{name}\0{copy}")
            # Each copy is cut at other places.
            start, piece = -rng.randrange(self.characters[1]), 0
            while start < len(text):
                stop = start + rng.randint(*self.characters)
                filler = text[max(start, 0) : max(stop, 0)]
                if filler.strip():
                    yield f"{name}:{copy}.{piece}", self._hide(rng, filler, words)
                    piece += 1
                start = stop

    def _hide(self, rng: random.Random, filler: str, words: list[str]) -> str:
        """The text with needles after lines drawn at random, and questions with answers behind."""
        keys = rng.sample(words, rng.randint(*self.pairs))
        numbers = {key: rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for key in keys}
        lines = filler.splitlines(keepends=True)
        places = sorted(rng.randrange(len(lines) + 1) for _ in keys)
        parts, last = [], 0
        for place, key in zip(places, keys, strict=True):
            parts += [*lines[last:place], NEEDLE.format(word=key, number=numbers[key])]
            last = place
        parts += lines[last:]
        for key in rng.sample(keys, len(keys)):
            parts.append(f"{QUESTION.format(word=key)} {numbers[key]}.")
        return "".join(parts)

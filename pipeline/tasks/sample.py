"""What a task asks a model: samples that are made when they are needed, and prompts of a length."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.manifest import StageError
from pipeline.prompts import encode_prompt

# A prompt is drawn anew as often as this while it stays further than SHORTFALL below its length.
ATTEMPTS = 24
SHORTFALL = 0.01
# A text this near to its length, as a share of it, is not made longer.
NEAR = 0.0025


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, int64 with <bos> first, and what its answer should hold.

    answer_tokens: greedy tokens that are asked for. fields: what else the record says.
    """

    tokens: np.ndarray
    expected: tuple[str, ...]
    answer_tokens: int
    template: str
    depth: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """Of the ids as little-endian int64."""
        return hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One prompt to come: `subtask` within its task, `length` in tokens with the answer's."""

    key: str
    subtask: str
    length: int
    seed: int
    answer_tokens: int
    make: Callable[[], Prompt]


@dataclass(frozen=True)
class Text:
    """A prompt's text without <bos>, and what its answer should hold."""

    prompt: str
    expected: Sequence[str]
    depth: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def fit(
    write: Callable[[random.Random, int], Text],
    tokenizer: Any,
    room: int,
    name: str,
    least: int = 4,
    greatest: int | None = None,
) -> tuple[Text, np.ndarray]:
    """The text of as many units as `room` tokens hold, <bos> among them, and its ids.

    Args:
        write: a text of so many units (lines, words, ...); the more units, the longer.
        name: seeds the texts, and is said in errors.
        least, greatest: bounds of the number of units.

    Raises:
        StageError: where the least text is longer than `room`.
    """
    best = None
    for attempt in range(ATTEMPTS):
        seed = f"{name}/{attempt}"

        def measure(units: int, seed: str = seed) -> tuple[Text, np.ndarray]:
            text = write(random.Random(seed), units)
            return text, encode_prompt(tokenizer, text.prompt)

        found = _fit_once(measure, room, least, greatest)
        if found is None:
            continue
        if best is None or len(found[1]) > len(best[1]):
            best = found
        if len(best[1]) >= room - SHORTFALL * room:
            break
    if best is None:
        shortest = len(measure(least)[1])
        raise StageError(
            f"{name}: its shortest prompt has {shortest} tokens where {room} are left beside the "
            "answer's; raise its lengths, or leave the task out of eval"
        )
    return best


def _fit_once(
    measure: Callable[[int], tuple[Text, np.ndarray]], room: int, least: int, greatest: int | None
) -> tuple[Text, np.ndarray] | None:
    """By secants within the units that are known to fit and those that are known not to."""
    fits = measure(least)
    if len(fits[1]) > room:
        return None
    low, high = least, math.inf if greatest is None else greatest + 1
    # A short text says how long a unit is, so that a long one is rarely written more than twice.
    probe = min(4 * least, high - 1)
    slope = max(0.1, (len(measure(probe)[1]) - len(fits[1])) / max(1, probe - least))
    while high - low > 1:
        wanted = room - len(fits[1])
        if wanted < slope or wanted < NEAR * room:
            break
        units = low + max(1, int((wanted - NEAR * room / 2) / slope))
        if units >= high:
            units = low + int(high - low) // 2
        tried = measure(units)
        slope = max(0.1, (len(tried[1]) - len(fits[1])) / (units - low))
        if len(tried[1]) > room:
            high = units
        else:
            low, fits = units, tried
    return fits

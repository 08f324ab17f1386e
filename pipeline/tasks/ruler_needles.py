"""RULER's eight needle tasks: keys with magic values in essays, in noise or among other needles."""

from __future__ import annotations

import random
import re
import uuid
from dataclasses import dataclass

from pipeline.tasks.material import Material
from pipeline.tasks.sample import Text

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
    "for {query} mentioned in the provided text? The special magic {kind} for {query} mentioned "
    "in the provided text are"
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for "
    "{query} mentioned in the provided text? The special magic {kind} for {query} mentioned in "
    "the provided text is"
)
# In essays a needle lies at one of so many depths, evenly spread over 0 to 100%.
DEPTHS = [round(step * 100 / 39) for step in range(40)]
SENTENCE_END = re.compile(r"(?<=[.!?]) ")


@dataclass(frozen=True)
class Needles:
    """haystack: essay, repeat or needle; keys and values: words, numbers or uuids.

    per_prompt: keys hidden; per_key: values of each; asked: keys that the question names.
    """

    haystack: str = "essay"
    keys: str = "words"
    values: str = "numbers"
    per_prompt: int = 1
    per_key: int = 1
    asked: int = 1


def needles(
    wanted: Needles, material: Material, length: int, rng: random.Random, units: int
) -> Text:
    """A prompt over `units` words of an essay, lines of noise, or other needles."""
    keys: list[str] = []
    while len(keys) < wanted.per_prompt:
        key = _draw(wanted.keys, material, rng)
        if key not in keys:
            keys.append(key)
    values = {
        key: [_draw(wanted.values, material, rng) for _ in range(wanted.per_key)] for key in keys
    }
    lines = [
        NEEDLE.format(kind=wanted.values, key=key, value=value)
        for key in keys
        for value in values[key]
    ]
    rng.shuffle(lines)
    if wanted.haystack == "essay":
        context, depth = _in_essay(material.prose, lines, rng, units)
    else:
        context, depth = _in_lines(wanted, material, lines, rng, units)
    asked = rng.sample(keys, wanted.asked)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    expected = [value for key in asked for value in values[key]]
    one = len(expected) == 1
    kind = wanted.values[:-1] if one else wanted.values
    prompt = (ONE if one else SEVERAL).format(kind=kind, context=context, query=query)
    return Text(prompt, expected, depth if len(lines) == 1 else None, {"needles": len(lines)})


def _draw(kind: str, material: Material, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    words = material.words
    return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"


def _in_essay(
    prose: tuple[str, ...], lines: list[str], rng: random.Random, units: int
) -> tuple[str, float]:
    """The first `units` words with the needles between sentences; the first one's depth."""
    times = -(-units // len(prose))
    words = prose[:units] if times == 1 else (prose * times)[:units]
    sentences = SENTENCE_END.split(" ".join(words))
    depths = sorted(rng.sample(DEPTHS, len(lines)))
    parts, last = [], 0
    for depth, line in zip(depths, lines, strict=True):
        at = len(sentences) * depth // 100
        parts += [*sentences[last:at], line]
        last = at
    return " ".join([*parts, *sentences[last:]]), float(depths[0])


def _in_lines(
    wanted: Needles, material: Material, lines: list[str], rng: random.Random, units: int
) -> tuple[str, float]:
    """`units` lines of noise or of needles that nobody asks for, with the needles among them."""
    if wanted.haystack == "repeat":
        around = [NOISE] * units
    else:
        around = [
            NEEDLE.format(
                kind=wanted.values,
                key=_draw(wanted.keys, material, rng),
                value=_draw(wanted.values, material, rng),
            )
            for _ in range(units)
        ]
    places = sorted(rng.sample(range(units), len(lines)), reverse=True)
    for place, line in zip(places, lines, strict=True):
        around.insert(place, line)
    return "\n".join(around), round(100 * places[-1] / units, 1)

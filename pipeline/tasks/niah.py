"""Needle in a haystack: secret numbers at some depth of held-out text, asked for at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from data_prep.needles import DIGITS, NEEDLE, QUESTION
from data_prep.needles import TASK_WORDS as WORDS
from pipeline.manifest import StageError
from pipeline.prompts import encode, with_bos
from pipeline.schema_of_eval import EvalSection
from pipeline.tasks.material import Material
from pipeline.tasks.sample import Prompt, Sample

QUESTION_OF_SEVERAL = (
    "\nQuestion: What are the secret numbers of the {words}?"
    "\nAnswer: The secret numbers of the {words} are"
)
# A number's digits; a space and a comma or a word beside it; and what a model may say before the
# first one.
TOKENS_PER_NUMBER = DIGITS + 3
SPARE_TOKENS = 4


def build(section: EvalSection, material: Material) -> list[Sample]:
    """Every needles x length x depth x sample; the seed decides words, numbers and filler.

    The first needle lies at the depth, further ones evenly spread from there, round the end.

    Raises:
        StageError: where there is no filler.
    """
    wanted = section.niah
    if not any(len(document) > 1 for document in material.documents):
        raise StageError(
            f"{len(material.documents)} held-out documents without text: niah hides its needle in "
            "them; raise data.held_out or data.held_out_tokens"
        )
    return [
        Sample(
            key=f"{needles}/{length}/{depth}/{number}",
            subtask=f"{needles} needle{'s' if needles > 1 else ''}",
            length=length,
            seed=wanted.seed,
            answer_tokens=TOKENS_PER_NUMBER * needles + SPARE_TOKENS,
            make=partial(_make, material, needles, length, depth, number, wanted.seed),
        )
        for needles in wanted.needles
        for length in wanted.lengths
        for depth in wanted.depths
        for number in range(wanted.samples)
    ]


def _make(
    material: Material, needles: int, length: int, depth: int, number: int, seed: int
) -> Prompt:
    tokenizer, documents = material.tokenizer, material.documents
    rng = np.random.default_rng([seed, length, depth, number, *([needles] if needles > 1 else [])])
    words = [WORDS[place] for place in rng.permutation(len(WORDS))[:needles]]
    numbers = [str(value) for value in _distinct(rng, needles)]
    lines = [
        encode(tokenizer, NEEDLE.format(word=word, number=value))
        for word, value in zip(words, numbers, strict=True)
    ]
    if needles == 1:
        question = QUESTION.format(word=words[0])
    else:
        named = ", the ".join(words[:-1]) + " and the " + words[-1]
        question = QUESTION_OF_SEVERAL.format(words=named)
    asked = encode(tokenizer, question)
    first = int(rng.integers(len(documents)))
    used = sum(map(len, lines)) + len(asked) + len(with_bos(tokenizer, asked[:0]))
    room = length - used
    if room < 1:
        raise StageError(
            f"eval.niah.lengths: {length} tokens leave no text around the needle; must be above "
            f"{used} with this tokenizer; set eval.niah.lengths"
        )
    filler = _filler(documents, first, room)
    depths = [(depth + 100 * place / needles) % 100 if place else depth for place in range(needles)]
    places = [_line_end(tokenizer, filler, each) for each in depths]
    order = sorted(range(needles), key=places.__getitem__)
    parts, last = [], 0
    for each in order:
        parts += [filler[last : places[each]], lines[each]]
        last = places[each]
    ids = with_bos(tokenizer, np.concatenate([*parts, filler[last:], asked]))
    # From the end of the needle at the depth to the end of the prompt.
    between = sum(len(lines[each]) for each in order[order.index(0) + 1 :])
    distance = len(filler) - places[0] + between + len(asked)
    fields = {"sample": number, "needles": needles, "distance": distance}
    expected, answer_tokens = tuple(numbers), TOKENS_PER_NUMBER * needles + SPARE_TOKENS
    template = "niah/completion" if needles == 1 else "niah/several"
    return Prompt(ids, expected, answer_tokens, template, depth, fields)


def _distinct(rng: np.random.Generator, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        value = int(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))
        if value not in found:
            found.append(value)
    return found


def _filler(documents: Sequence[np.ndarray], first: int, tokens: int) -> np.ndarray:
    """`tokens` ids of the documents from `first` on, without their <bos>."""
    parts, found = [], 0
    while found < tokens:
        part = np.asarray(documents[first % len(documents)][1 : 1 + tokens - found], np.int64)
        parts.append(part)
        found += len(part)
        first += 1
    return np.concatenate(parts)


def _line_end(tokenizer: Any, filler: np.ndarray, depth: float) -> int:
    """Where a needle goes: at `depth` percent, or up to 5% of the text before, after a line."""
    at = round(len(filler) * depth / 100)
    if 0 < at < len(filler):
        for earlier in range(at, max(0, at - len(filler) // 20), -1):
            if tokenizer.decode([int(filler[earlier - 1])]).endswith("\n"):
                return earlier
    return at


def score(task: str, prompt: Prompt, answer: str) -> float:
    """Percent of the numbers that stand in the answer by themselves, not within longer ones."""
    found = [bool(re.search(rf"(?<!\d){number}(?!\d)", answer)) for number in prompt.expected]
    return 100.0 * sum(found) / len(found)

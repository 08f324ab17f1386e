"""Needle in a haystack: a secret number at some depth of held-out text, asked for at the end."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.manifest import StageError
from pipeline.schema import EvalSection

WORDS = (
    *("anchor", "basket", "candle", "desert", "engine", "feather", "garden", "hammer"),
    *("island", "jacket", "kettle", "ladder", "mirror", "nickel", "orange", "pepper"),
)
NEEDLE = "\nThe secret number of the {word} is {number}.\n"
# A completion, so that a model that was never taught to follow instructions can answer it.
QUESTION = (
    "\nQuestion: What is the secret number of the {word}?"
    "\nAnswer: The secret number of the {word} is"
)
# Greedy tokens beyond those of the number itself: a leading space or quote, a word before it.
SPARE_TOKENS = 4


@dataclass(frozen=True)
class NeedleSample:
    """A prompt of exactly `length` tokens, int64, <bos> first, and the digits it asks for."""

    key: str
    length: int
    depth: int
    sample: int
    tokens: np.ndarray
    expected: str
    answer_tokens: int


def build(
    section: EvalSection, tokenizer: Any, documents: Sequence[np.ndarray]
) -> list[NeedleSample]:
    """Every length x depth x sample of the section; the seed decides words, numbers and filler.

    Args:
        documents: held-out token ids, <bos> first; the filler starts at one of them and goes on
            with the next ones, from the first again after the last.

    Raises:
        StageError: where a length has no room for needle and question, or there is no filler.
    """
    wanted = section.niah
    if not any(len(document) > 1 for document in documents):
        raise StageError(
            f"{len(documents)} held-out documents without text: niah hides its needle in them; "
            "raise data.held_out or data.held_out_tokens"
        )
    return [
        _build_one(tokenizer, documents, length, depth, sample, wanted.seed)
        for length in wanted.lengths
        for depth in wanted.depths
        for sample in range(wanted.samples)
    ]


def _build_one(
    tokenizer: Any,
    documents: Sequence[np.ndarray],
    length: int,
    depth: int,
    sample: int,
    seed: int,
) -> NeedleSample:
    rng = np.random.default_rng([seed, length, depth, sample])
    word, number = WORDS[rng.integers(len(WORDS))], str(rng.integers(10_000, 100_000))
    needle = _encode(tokenizer, NEEDLE.format(word=word, number=number))
    question = _encode(tokenizer, QUESTION.format(word=word))
    room = length - 1 - len(needle) - len(question)
    if room < 1:
        raise StageError(
            f"eval.niah.lengths: {length} tokens leave no text around the needle; must be above "
            f"{length - room} with this tokenizer; set eval.niah.lengths"
        )
    first = int(rng.integers(len(documents)))
    filler = _filler(documents, first, room)
    at = _line_end(tokenizer, filler, depth)
    bos = next(document[:1] for document in documents if len(document))
    tokens = np.concatenate([bos, filler[:at], needle, filler[at:], question])
    answer_tokens = len(_encode(tokenizer, f" {number}.")) + SPARE_TOKENS
    key = f"{length}/{depth}/{sample}"
    return NeedleSample(key, length, depth, sample, tokens, number, answer_tokens)


def _encode(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def _filler(documents: Sequence[np.ndarray], first: int, tokens: int) -> np.ndarray:
    """`tokens` ids of the documents from `first` on, without their <bos>."""
    parts, found = [], 0
    while found < tokens:
        part = np.asarray(documents[first % len(documents)][1 : 1 + tokens - found], np.int64)
        parts.append(part)
        found += len(part)
        first += 1
    return np.concatenate(parts)


def _line_end(tokenizer: Any, filler: np.ndarray, depth: int) -> int:
    """Where the needle goes: at `depth` percent, or up to 5% of the text before, after a line."""
    at = round(len(filler) * depth / 100)
    if 0 < at < len(filler):
        for earlier in range(at, max(0, at - len(filler) // 20), -1):
            if tokenizer.decode([int(filler[earlier - 1])]).endswith("\n"):
                return earlier
    return at


def grade(expected: str, answer: str) -> float:
    """100 where the number stands in the answer by itself, not within a longer one; else 0."""
    return 100.0 if re.search(rf"(?<!\d){expected}(?!\d)", answer) else 0.0


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, sample: NeedleSample, prefill_chunk: int) -> str:
    """Greedy continuation of the prompt, to <eos> or the sample's answer_tokens."""
    ids = torch.from_numpy(sample.tokens)[None].to(model.device)
    cache, logits = model.prefill(ids, prefill_chunk)
    found = [int(logits.argmax())]
    while len(found) < sample.answer_tokens and found[-1] != tokenizer.eos_token_id:
        ids = torch.tensor([[found[-1]]], device=model.device)
        logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        found.append(int(logits.argmax()))
    return tokenizer.decode(found, skip_special_tokens=True)


def score(
    sample: NeedleSample, model: Any, tokenizer: Any, section: EvalSection
) -> list[dict[str, Any]]:
    """One record; "prompt_sha256" is of the prompt's ids as little-endian int64."""
    answer = _answer(model, tokenizer, sample, section.prefill_chunk)
    return [
        {
            "length": sample.length,
            "depth": sample.depth,
            "sample": sample.sample,
            "prompt_sha256": hashlib.sha256(sample.tokens.astype("<i8").tobytes()).hexdigest(),
            "expected": sample.expected,
            "answer": answer,
            "score": grade(sample.expected, answer),
        }
    ]

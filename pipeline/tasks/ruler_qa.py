"""RULER's two question-answering tasks: a question's own documents among many others.

The questions are SQuAD 2.0's (Rajpurkar et al. 2018) and HotpotQA's (Yang et al. 2018), read from
the files that eval.ruler.data names: squad.json and hotpotqa.json, in their published formats.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.manifest import StageError
from pipeline.prompts import encode, encode_prompt
from pipeline.tasks.material import Material
from pipeline.tasks.sample import NEAR, Text

PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {query} Answer:"
)
DOCUMENT = "Document {number}:\n{text}"
# So many other documents are looked at for the one that fills what is left, and so many questions
# for one whose own documents fit.
CANDIDATES = 400
TRIES = 16


@dataclass(frozen=True)
class Question:
    """Indices of documents: those that answer it, and others of the same article."""

    query: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """A data set's questions and all documents; `sizes` keeps tokens of documents once counted."""

    tokenizer: Any
    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, material: Material) -> Questions:
        """Of "squad" or "hotpotqa".

        Raises:
            StageError: where the file is missing or of another format.
        """
        key = "eval.ruler.data"
        task = {"squad": "ruler's qa_1", "hotpotqa": "ruler's qa_2"}[name]
        path = material.find(material.questions_folder, f"{name}.json", key, task)
        questions, documents = _read(name, path)
        return cls(material.tokenizer, questions, documents)

    def _size(self, index: int) -> int:
        if index not in self.sizes:
            text = DOCUMENT.format(number=10, text=self.documents[index]) + "\n\n"
            self.sizes[index] = len(encode(self.tokenizer, text))
        return self.sizes[index]

    def _question(self, rng: random.Random, room: int) -> Question:
        """One whose own documents fit, if any of several does."""
        for _ in range(CANDIDATES):
            question = rng.choice(self.questions)
            asked = len(encode(self.tokenizer, PROMPT.format(context="", query=question.query)))
            if asked + sum(map(self._size, question.own)) < room:
                break
        return question

    def write(self, name: str, room: int) -> tuple[Text, np.ndarray]:
        """A prompt of at most `room` tokens, <bos> among them, as full as documents allow.

        Raises:
            StageError: where the question's own documents do not fit.
        """
        rng = random.Random(name)
        question = self._question(rng, room)
        near = list(question.near)
        rng.shuffle(near)
        taken = {*question.own, *near}
        most = min(len(self.documents), 2 * len(taken) + room // 16 + CANDIDATES)
        others = rng.sample(range(len(self.documents)), most)
        order = [*near, *(index for index in others if index not in taken)]
        shuffler = rng.random()
        best, limit = self._fill(question, [], 0, shuffler), float(room)
        if len(best[1]) > room:
            raise StageError(
                f"{name}: the question with its own documents has {len(best[1])} tokens where "
                f"{room} are left beside the answer's; raise eval.ruler.lengths, or leave the task "
                "out of eval.ruler.tasks"
            )
        for attempt in range(TRIES):
            text, ids = self._fill(question, order, limit, shuffler)
            if len(best[1]) < len(ids) <= room:
                best = text, ids
            if room - len(best[1]) <= NEAR * room:
                break
            # Sizes add up only nearly: a token may join what stands on both sides of a seam.
            # Other documents then join others, so that each try leaves some more room.
            missed = room - len(ids)
            limit += missed / 2 if missed > 0 else missed - 2 * attempt
        return best

    def _fill(
        self, question: Question, order: list[int], limit: float, shuffler: float
    ) -> tuple[Text, np.ndarray]:
        """The question's documents and as many of `order` as `limit` tokens hold."""
        empty = PROMPT.format(context="", query=question.query)
        left = limit - 1 - len(encode(self.tokenizer, empty))
        chosen = list(question.own)
        left -= sum(map(self._size, chosen))
        for place, index in enumerate(order):
            if self._size(index) <= left:
                chosen.append(index)
                left -= self._size(index)
                continue
            rest = [other for other in order[place:][:CANDIDATES] if self._size(other) <= left]
            if rest:
                chosen.append(max(rest, key=self._size))
            break
        random.Random(shuffler).shuffle(chosen)
        documents = [
            DOCUMENT.format(number=number, text=self.documents[index])
            for number, index in enumerate(chosen, 1)
        ]
        prompt = PROMPT.format(context="\n\n".join(documents), query=question.query)
        fields = {"documents": len(chosen)}
        ids = encode_prompt(self.tokenizer, prompt)
        return Text(prompt, question.answers, fields=fields), ids


@cache
def _read(name: str, path: Path) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _squad(data["data"]) if name == "squad" else _hotpot(data)
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{path}: is not {name} as published ({type(error).__name__}: {error}); fetch it "
            "again, or set eval.ruler.data to a folder with that file"
        ) from error


def _squad(articles: list[dict]) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    texts = sorted({part["context"] for article in articles for part in article["paragraphs"]})
    place = {text: index for index, text in enumerate(texts)}
    found = []
    for article in articles:
        here = [place[part["context"]] for part in article["paragraphs"]]
        for own, part in zip(here, article["paragraphs"], strict=True):
            near = tuple(dict.fromkeys(index for index in here if index != own))
            found += [
                Question(
                    asked["question"],
                    tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])),
                    (own,),
                    near,
                )
                for asked in part["qas"]
                if not asked["is_impossible"]
            ]
    return tuple(found), tuple(texts)


def _hotpot(data: list[dict]) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    def texts(asked: dict) -> list[str]:
        return [f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]]

    every = sorted({text for asked in data for text in texts(asked)})
    place = {text: index for index, text in enumerate(every)}
    found = [
        Question(
            asked["question"],
            (asked["answer"],),
            tuple(dict.fromkeys(place[text] for text in texts(asked))),
        )
        for asked in data
    ]
    return tuple(found), tuple(every)

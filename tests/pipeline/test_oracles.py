"""Scoring can fail: one that knows scores 100, one that is silent 0, one that guesses at chance."""

import math
import random
import re

import numpy as np
import pytest

from pipeline.evaluated_model import EvaluatedModel
from pipeline.prompts import encode
from pipeline.schema_of_eval import BabilongSection, EvalSection, NiahSection, RulerSection
from pipeline.stages.evaluate import ASKED, record_of
from pipeline.tasks import babilong, ruler
from tests.pipeline.task_material import material

MODEL = EvaluatedModel(None, frozenset(), True, 1, {"context": 5000})
SECTION = EvalSection(
    niah=NiahSection([600, 5200], [0, 50, 100], [1, 3], 1),
    ruler=RulerSection(list(ruler.TASKS), [5000], 3),
    babilong=BabilongSection(lengths=[2500], samples=3),
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The tokenizer, and (task, sample, prompt) of every task."""
    given = material(tmp_path_factory.mktemp("m"))
    documents = [np.concatenate([[0], encode(given.tokenizer, " ".join(given.prose))])]
    given = type(given)(given.tokenizer, documents, *[given.prose_folder] * 3)
    found = [
        (name, sample, sample.make())
        for name, module in ASKED.items()
        for sample in module.build(SECTION, given)
    ]
    return given.tokenizer, found


def score(task, sample, prompt, answer):
    return record_of(sample, prompt, answer, ASKED[task].score, MODEL)["score"]


def test_an_oracle_scores_all_within_the_tokens_of_an_answer(asked):
    tokenizer, found = asked
    tasks = set()
    for task, sample, prompt in found:
        # What a model of few letters a token can say in the answer's length is not held against it.
        joint = ". " if prompt.answer_tokens == 32 else " "
        answer = " " + joint.join(prompt.expected[:1] if joint == ". " else prompt.expected)
        assert score(task, sample, prompt, answer) == 100, sample
        if task == "niah":
            assert len(encode(tokenizer, answer)) <= prompt.answer_tokens
        tasks.add((task, sample.subtask))
    assert len(tasks) == 2 + 13 + 5


def test_one_that_says_nothing_scores_nothing(asked):
    assert {score(*each, "") for each in asked[1]} == {0}
    assert {score(*each, " I do not know. \n") for each in asked[1]} == {0}


def test_one_that_guesses_scores_at_chance(asked):
    """Guesses of the right kind: labels, listed words, values that others' keys have."""
    rng, tokenizer, tries = random.Random(0), asked[0], 400
    for task, sample, prompt in asked[1]:
        text = tokenizer.decode(prompt.tokens)
        if task == "babilong":
            guesses, chance, of = babilong.LABELS[sample.subtask], 0.0, 1
            chance = 1 / len(guesses)
        elif sample.subtask == "cwe":
            listed = text[text.rindex("appear most often.\n") :]
            guesses = sorted(set(re.findall(r"\d+\. (\S+)", listed)))
            of, chance = 10, 10 / len(guesses)
        elif sample.subtask in ("niah_multikey_2", "niah_multikey_1", "niah_multivalue"):
            guesses = re.findall(r" is: (\d+)\.", text)
            of, chance = 1, 1 / len(guesses)
        elif "qa" in sample.subtask:
            continue
        else:
            guesses, of, chance = [str(rng.randrange(10**4, 10**7)) for _ in range(99)], 1, 0
        scores = [
            score(task, sample, prompt, " " + " ".join(rng.sample(list(guesses), of)))
            for _ in range(tries)
        ]
        # Five standard errors of a share; a guess scores 0 or 100, or the mean of ten such.
        error = 500 * math.sqrt(chance * (1 - chance) / tries) + 1e-9
        assert abs(np.mean(scores) - 100 * chance) <= error, (sample, np.mean(scores), chance)


def test_records_say_what_was_asked_of_whom(asked):
    for task, sample, prompt in asked[1]:
        record = record_of(sample, prompt, " x", ASKED[task].score, MODEL)
        wanted = {"subtask", "seed", "length", "depth", "template", "prompt_sha256", "expected"}
        assert wanted | {"answer", "score", "manifest", "prompt_tokens"} <= record.keys()
        assert record["beyond_context"] == (sample.length > 5000)
        assert record["manifest"] == MODEL.id and len(record["prompt_sha256"]) == 64

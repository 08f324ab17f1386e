"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654) for base models, made here.

The prompts' wording and the metrics are RULER's own (github.com/NVIDIA/RULER, Apache-2.0), since
they define the benchmark. A length counts the prompt with <bos> and the tokens of the answer, by
the model's own tokenizer, and is never exceeded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.schema_of_eval import EvalSection
from pipeline.tasks.material import Material
from pipeline.tasks.ruler_lists import common_words, frequent_words, variable_tracking
from pipeline.tasks.ruler_needles import Needles, needles
from pipeline.tasks.ruler_qa import Questions
from pipeline.tasks.sample import Prompt, Sample, fit

QA = {"qa_1": "squad", "qa_2": "hotpotqa"}


@dataclass(frozen=True)
class Kind:
    """Tokens of the answer, the writer of its prompts, and the fewest units of one."""

    answer_tokens: int
    write: Callable[..., Any] | None = None
    least: int = 4


def _niah(**changes: Any) -> Kind:
    wanted = Needles(**changes)
    return Kind(128, partial(needles, wanted), least=30 if wanted.haystack == "essay" else 5)


KINDS = {
    "niah_single_1": _niah(haystack="repeat"),
    "niah_single_2": _niah(),
    "niah_single_3": _niah(values="uuids"),
    "niah_multikey_1": _niah(per_prompt=4),
    "niah_multikey_2": _niah(haystack="needle"),
    "niah_multikey_3": _niah(haystack="needle", keys="uuids", values="uuids"),
    "niah_multivalue": _niah(per_key=4),
    "niah_multiquery": _niah(per_prompt=4, asked=4),
    "vt": Kind(30, variable_tracking, least=6),
    "cwe": Kind(120, common_words, least=11),
    "fwe": Kind(50, frequent_words, least=40),
    "qa_1": Kind(32),
    "qa_2": Kind(32),
}
TASKS = tuple(KINDS)
ESSAYS = tuple(
    task for task in TASKS if "niah" in task and KINDS[task].write.args[0].haystack == "essay"
)


def build(section: EvalSection, material: Material) -> list[Sample]:
    """Every task x length x sample of eval.ruler.

    Raises:
        StageError: where a task's file is missing, or there is no prose.
    """
    wanted = section.ruler
    # Once, and before the threads that make prompts.
    for task in wanted.tasks:
        if "niah" in task or task == "cwe":
            _ = material.words
        if task in ESSAYS:
            _ = material.prose
    questions = {task: Questions.read(QA[task], material) for task in wanted.tasks if task in QA}
    return [
        Sample(
            key=f"{task}/{length}/{number}",
            subtask=task,
            length=length,
            seed=wanted.seed,
            answer_tokens=KINDS[task].answer_tokens,
            make=partial(_make, material, questions.get(task), task, length, number, wanted.seed),
        )
        for task in wanted.tasks
        for length in wanted.lengths
        for number in range(wanted.samples)
    ]


def _make(
    material: Material, questions: Questions | None, task: str, length: int, number: int, seed: int
) -> Prompt:
    kind = KINDS[task]
    name = f"ruler {task} at {length} tokens, sample {number}, seed {seed}"
    room = length - kind.answer_tokens
    if questions is not None:
        text, ids = questions.write(name, room)
    else:
        write = partial(kind.write, material, length)
        greatest = len(material.words.every) if task == "cwe" else None
        text, ids = fit(write, material.tokenizer, room, name, kind.least, greatest)
    expected = tuple(text.expected)
    return Prompt(ids, expected, kind.answer_tokens, f"ruler/{task}", text.depth, text.fields)


def score(task: str, prompt: Prompt, answer: str) -> float:
    """Percent: of the expected strings those in the answer; in qa tasks 100 for any of them.

    Compared without regard to case, as RULER's string_match_all and string_match_part.
    """
    said = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    found = [text.lower() in said for text in prompt.expected]
    return 100.0 * (any(found) if task in QA else sum(found) / len(found))

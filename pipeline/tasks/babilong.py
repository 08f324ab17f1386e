"""BABILong qa1 to qa5 (Kuratov et al. 2024, arXiv 2406.10149): facts hidden in a book's text.

Where eval.babilong.folder is given its published files are read (qa1/4k.json and so on: input,
question, target), else the bAbI worlds (Weston et al. 2015) are simulated by babi_worlds.py and
their facts hidden in prose. Wording of the prompts, labels and the rule of scoring are those of
github.com/booydar/babilong (Apache-2.0), since they define the benchmark; "Answer:" follows the
question, as in its examples, so that a model that only completes text can answer.
"""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path

from pipeline.manifest import StageError
from pipeline.prompts import encode_prompt
from pipeline.schema_of_eval import EvalSection
from pipeline.tasks.babi_worlds import OBJECTS, PLACES, TRADERS, WORLDS, Story
from pipeline.tasks.material import Material
from pipeline.tasks.sample import Prompt, Sample, Text, fit

TASKS = tuple(WORLDS)
ANSWER_TOKENS = 20
# The fewest words of the book around the facts.
LEAST_WORDS = 40
SENTENCE_END = re.compile(r"(?<=[.!?]) ")
ITEMS_MOVE = (
    "If a person got an item in the first location and travelled to the second location the item "
    "is also in the second location. If a person dropped an item in the first location and moved "
    "to the second location the item remains in the first location"
)
ACTIONS = (
    "I give you context with the facts about locations and actions of different persons hidden in "
    "some random text and a question."
)
ONLY_FACTS = "You need to answer the question based only on the information from the facts."
# Of each task: the instruction, (facts and question, answer) of its examples, the answer's form.
WORDING = {
    "qa1": (
        "I will give you context with the facts about positions of different persons hidden in "
        f"some random text and a question. {ONLY_FACTS} If a person was in different locations, "
        "use the latest location to answer the question.",
        (
            (
                "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled "
                "to balcony. Where is Charlie?",
                "The most recent location of Charlie is balcony.",
            ),
            (
                "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse "
                "travelled to balcony. Where is Alan?",
                "The most recent location of Alan is shop.",
            ),
        ),
        "Always return your answer in the following format: The most recent location of ’person’ "
        "is ’location’. Do not write anything else after that. ",
    ),
    "qa2": (
        f"{ACTIONS}{ONLY_FACTS}\n{ITEMS_MOVE}.",
        (
            (
                "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. "
                "Where is the bottle?",
                "The bottle is in the balcony.",
            ),
            (
                "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. "
                "Where is the screw driver?",
                "The screw driver is in the kitchen.",
            ),
        ),
        "Always return your answer in the following format: The ’item’ is in ’location’. Do not "
        "write anything else after that.",
    ),
    "qa3": (
        f"{ACTIONS} {ONLY_FACTS}\n{ITEMS_MOVE}",
        (
            (
                "John journeyed to the bedroom.Mary grabbed the apple. Mary went back to the "
                "bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary "
                "travelled to the kitchen. Where was the apple before the kitchen?",
                "Before the kitchen the apple was in the bathroom.",
            ),
            (
                "John went back to the bedroom. John went back to the garden. John went back to "
                "the kitchen. Sandra took the football. Sandra travelled to the garden. Sandra "
                "journeyed to the bedroom. Where was the football before the bedroom?",
                "Before the kitchen the football was in the garden.",
            ),
        ),
        "Always return your answer in the following format: Before the $location_1& the $item$ was "
        "in the $location_2$. Do not write anything else after that.",
    ),
    "qa4": (
        "I will give you context with the facts about different people, their location and "
        f"actions, hidden in some random text and a question. {ONLY_FACTS}",
        (
            (
                "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is "
                "the kitchen south of?",
                "bedroom",
            ),
            (
                "The garden is west of the bedroom. The bedroom is west of the kitchen. What is "
                "west of the bedroom?",
                "garden",
            ),
        ),
        "Your answer should contain only one word - location. Do not write anything else after "
        "that.",
    ),
    "qa5": (
        "I will give you context with the facts about locations and their relations hidden in some "
        f"random text and a question. {ONLY_FACTS}",
        (
            (
                "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the "
                "bedroom. Bill took the milk there. Who did Mary give the apple to?",
                "Fred",
            ),
            (
                "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk "
                "there. Bill travelled to the bedroom. Who gave the football?",
                "Jeff",
            ),
            (
                "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to "
                "the bedroom. Jeff went back to the garden. What did Fred give to Bill?",
                "apple",
            ),
        ),
        "Your answer should contain only one word. Do not write anything else after that. Do not "
        "explain your answer.",
    ),
}
LABELS = {
    **{task: PLACES for task in ("qa1", "qa2", "qa3", "qa4")},
    "qa5": (*TRADERS, *OBJECTS),
}


def build(section: EvalSection, material: Material) -> list[Sample]:
    """Every task x length x sample of eval.babilong.

    Raises:
        StageError: where there is no prose, or the folder lacks a file or samples.
    """
    wanted = section.babilong
    folder = Path(wanted.folder) if wanted.folder else None
    if folder is None:
        # Once, and before the threads that make prompts.
        _ = material.prose
    samples = []
    for task in wanted.tasks:
        for length in wanted.lengths:
            published = _published(folder, task, length, wanted.samples) if folder else None
            for number in range(wanted.samples):
                row = published[number] if published else None
                make = partial(_make, material, row, task, length, number, wanted.seed)
                key = f"{task}/{length}/{number}"
                samples.append(Sample(key, task, length, wanted.seed, ANSWER_TOKENS, make))
    return samples


def _published(folder: Path, task: str, length: int, samples: int) -> list[dict]:
    """Rows of qa1/4k.json, as JSON or JSON lines."""
    paths = [
        folder / task / f"{name}{suffix}"
        for name in (f"{length // 1024}k", f"{length // 1000}k", str(length))
        for suffix in (".json", ".jsonl")
    ]
    found = [path for path in paths if path.exists()]
    if not found:
        raise StageError(
            f"eval.babilong.folder: {folder} holds no {task} of {length} tokens "
            f"({paths[0].relative_to(folder)}); must hold BABILong's published files; set "
            "eval.babilong.lengths to those it has, or eval.babilong.folder=null to simulate them"
        )
    text = found[0].read_text(encoding="utf-8")
    try:
        if found[0].suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
        rows = [{name: str(row[name]) for name in ("input", "question", "target")} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{found[0]}: is no list of input, question and target ({type(error).__name__}: "
            f"{error}); fetch BABILong's files again, or set eval.babilong.folder=null"
        ) from error
    if len(rows) < samples:
        raise StageError(
            f"eval.babilong.samples={samples}: {found[0]} holds {len(rows)}; set it to so many at "
            "most"
        )
    return rows[:samples]


def prompt_text(task: str, context: str, question: str) -> str:
    """The whole prompt: instruction, examples, form of the answer, context and question."""
    instruction, examples, form = WORDING[task]
    shown = "\n".join(
        f"<example>\n{facts}\nAnswer: {answer}\n</example>" for facts, answer in examples
    )
    context = f"<context>\n{context}\n</context>"
    return f"{instruction}\n{shown}\n{form}\n{context}\nQuestion: {question}\nAnswer:"


def _make(
    material: Material, row: dict | None, task: str, length: int, number: int, seed: int
) -> Prompt:
    name = f"babilong {task} at {length} tokens, sample {number}, seed {seed}"
    if row is not None:
        text = Text(prompt_text(task, row["input"], row["question"]), [row["target"]])
        ids = encode_prompt(material.tokenizer, text.prompt)
        fields = {"question": row["question"], "published": True}
    else:
        story = WORLDS[task](random.Random(name))
        prose = material.prose
        start = random.Random(f"{name}/book").randrange(len(prose))

        def write(rng: random.Random, units: int) -> Text:
            words = [prose[(start + place) % len(prose)] for place in range(units)]
            context, depth = hide(story, " ".join(words), rng)
            return Text(prompt_text(task, context, story.question), [story.answer], depth)

        text, ids = fit(write, material.tokenizer, length - ANSWER_TOKENS, name, LEAST_WORDS)
        fields = {"question": story.question, "facts": len(story.facts)}
    template = f"babilong/{task}"
    return Prompt(ids, tuple(text.expected), ANSWER_TOKENS, template, text.depth, fields)


def hide(story: Story, book: str, rng: random.Random) -> tuple[str, float]:
    """The story's facts in order between sentences of a book, and the last needed one's depth."""
    sentences = SENTENCE_END.split(book)
    places = sorted(rng.randrange(len(sentences) + 1) for _ in story.facts)
    parts, last = [], 0
    for place, fact in zip(places, story.facts, strict=True):
        parts += [*sentences[last:place], fact]
        last = place
    depth = 100 * places[max(story.needed)] / max(1, len(sentences))
    return " ".join([*parts, *sentences[last:]]), round(depth, 1)


def score(task: str, prompt: Prompt, answer: str) -> float:
    """100 where the answer's first sentence names the target and no other label; else 0.

    Labels that the question names do not count, as in BABILong.
    """
    said = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    question, target = prompt.fields["question"].lower(), prompt.expected[0].lower()
    labels = [label.lower() for label in LABELS[task]]
    named = {label for label in labels if label in said and label not in question}
    return 100.0 if named == {target} else 0.0

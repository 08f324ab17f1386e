import json
import random
import re

import numpy as np
import pytest

from pipeline.manifest import StageError
from pipeline.schema_of_eval import BabilongSection, EvalSection
from pipeline.tasks import babilong
from pipeline.tasks.babi_worlds import OBJECTS, PLACES, TRADERS, WORLDS
from pipeline.tasks.material import Material
from pipeline.tasks.sample import Prompt
from tests.pipeline.task_material import material

STORIES = 300
GO = "moved|went|travelled|journeyed|went back"
GAVE = r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\."
OPPOSITE = dict(north="south", south="north", east="west", west="east")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("babilong"))


def stories(task):
    return [WORLDS[task](random.Random(seed)) for seed in range(STORIES)]


def walk(facts):
    """Who is where after each fact, and where each thing has been, read from the sentences."""
    place, holder, been = {}, {}, {}
    for fact in facts:
        who, rest = fact[:-1].split(" ", 1)
        if moved := re.fullmatch(
            r"(?:moved|went|travelled|journeyed|went back) to the (\w+)", rest
        ):
            place[who] = moved[1]
            for thing in [t for t, h in holder.items() if h == who]:
                been[thing].append(moved[1])
        elif gift := re.fullmatch(r"(?:gave|handed|passed) the (\w+) to (\w+)", rest):
            assert holder[gift[1]] == who
            holder[gift[1]] = gift[2]
        else:
            verb, thing = re.fullmatch(r"(.+) the (\w+) there", rest).groups()
            if verb in ("got", "picked up", "grabbed", "took"):
                assert holder.get(thing) is None, fact
                # nobody takes what lies elsewhere
                assert not been.get(thing) or been[thing][-1] == place[who], fact
                holder[thing] = who
                been.setdefault(thing, [place[who]])
            else:
                assert verb in ("dropped", "put down", "left", "discarded") and holder[thing] == who
                holder[thing] = None
    return place, been


def test_where_a_person_is():
    for story in stories("qa1"):
        place, _ = walk(story.facts)
        assert story.answer == place[re.fullmatch(r"Where is (\w+)\?", story.question)[1]]
        assert story.answer in story.facts[story.needed[0]]


def test_where_a_thing_is():
    for story in stories("qa2"):
        _, been = walk(story.facts)
        thing = re.fullmatch(r"Where is the (\w+)\?", story.question)[1]
        assert story.answer == been[thing][-1] and len(been[thing]) > 1


def test_where_a_thing_was_before():
    for story in stories("qa3"):
        _, been = walk(story.facts)
        thing, after = re.fullmatch(
            r"Where was the (\w+) before the (\w+)\?", story.question
        ).groups()
        assert been[thing].count(after) == 1
        assert story.answer == been[thing][been[thing].index(after) - 1] != after


def test_which_place_lies_where():
    for story in stories("qa4"):
        lies = set()
        for fact in story.facts:
            one, way, other = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups()
            lies |= {(one, way, other), (other, OPPOSITE[way], one)}
        if asked := re.fullmatch(r"What is (\w+) of the (\w+)\?", story.question):
            found = [one for one, way, other in lies if (way, other) == asked.groups()]
        else:
            asked = re.fullmatch(r"What is the (\w+) (\w+) of\?", story.question)
            found = [other for one, way, other in lies if (one, way) == asked.groups()]
        assert found == [story.answer]


def test_who_gave_what_to_whom():
    kinds = set()
    for story in stories("qa5"):
        walk(story.facts)
        last = [
            re.match(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.", f) for f in story.facts
        ]
        giver, thing, to = [match for match in last if match][-1].groups()
        assert story.answer in (giver, thing, to)
        asked = re.sub(r"\b(?:Who|What)\b", "?", story.question)
        kinds.add(re.sub(rf"{giver}|{thing}|{to}", "_", asked))
        assert story.answer not in story.question
    assert len(kinds) == 5


@pytest.mark.parametrize("task", babilong.TASKS)
def test_facts_are_hidden_in_order(given, task):
    section = EvalSection(babilong=BabilongSection([task], [3000], 3))
    for sample in babilong.build(section, given):
        prompt = sample.make()
        total = len(prompt.tokens) + prompt.answer_tokens
        assert 0.99 * 3000 <= total <= 3000 and prompt.tokens[0] == 0
        text = given.tokenizer.decode(prompt.tokens[1:])
        context = re.search(r"<context>\n(.*)\n</context>\nQuestion: (.*)\nAnswer:$", text, re.S)
        name = f"babilong {task} at 3000 tokens, sample {sample.key[-1]}, seed 1"
        story = WORLDS[task](random.Random(name))
        at = -1
        for fact in story.facts:
            assert (at := context[1].find(fact, at + 1)) >= 0
        assert context[2] == story.question == prompt.fields["question"]
        assert prompt.expected == (story.answer,) and 0 <= prompt.depth <= 100
        assert text.count("<example>") == (3 if task == "qa5" else 2)
        assert len(context[1]) > sum(map(len, story.facts)) + 500


def prompt_of(question, target):
    return Prompt(np.zeros(1, np.int64), (target,), 8, "t", fields={"question": question})


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" The most recent location of Mary is bathroom.", 100),
        (" BATHROOM", 100),
        (" bathroom or kitchen.", 0),
        (" bathroom. The kitchen is", 100),
        (" the garden, no: the bathroom", 100),
        (" kitchen", 0),
        (" Mary", 0),
        ("", 0),
        (" bathroom<example>kitchen", 100),
    ],
)
def test_scores_are_babilongs(answer, score):
    """The garden stands in the question, so it never counts."""
    prompt = prompt_of("Where was the apple before the garden?", "bathroom")
    assert babilong.score("qa3", prompt, answer) == score


def test_labels_are_those_of_the_worlds():
    assert set(babilong.LABELS["qa1"]) == set(PLACES) and len(PLACES) == 6
    assert set(babilong.LABELS["qa5"]) == {*TRADERS, *OBJECTS}


def published(root, rows, name="qa1/4k.json"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    path.write_text(lines)
    return EvalSection(babilong=BabilongSection(["qa1"], [4096], 2, folder=str(root)))


@pytest.mark.parametrize("name", ["qa1/4k.json", "qa1/4k.jsonl", "qa1/4096.json"])
def test_published_files_are_read(given, tmp_path, name):
    row = {"input": "Text. Mary went to the office.", "question": "Where is Mary?"}
    rows = [row | {"target": "office"}, row | {"target": "garden"}]
    samples = babilong.build(published(tmp_path, rows, name), given)
    for sample, row in zip(samples, rows, strict=True):
        prompt = sample.make()
        text = given.tokenizer.decode(prompt.tokens[1:])
        assert f"<context>\n{row['input']}\n</context>\nQuestion: Where is Mary?\nAnswer:" in text
        assert prompt.expected == (row["target"],) and prompt.fields["published"]


def test_published_files_that_do_not_suffice_are_said(given, tmp_path):
    section = published(tmp_path, [])
    with pytest.raises(StageError, match=r"samples=2: .*4k.json holds 0; set it"):
        babilong.build(section, given)
    (tmp_path / "qa1/4k.json").write_text('[{"input": "a"}]')
    with pytest.raises(StageError, match=r"4k.json: is no list of input.*KeyError.*question"):
        babilong.build(section, given)
    section.babilong.lengths = [8192]
    with pytest.raises(StageError, match=r"holds no qa1 of 8192 tokens \(qa1/8k.json\)"):
        babilong.build(section, given)


def test_a_book_is_needed(given):
    with pytest.raises(StageError, match="no text to hide anything in; set eval.prose"):
        babilong.build(EvalSection(), Material(given.tokenizer, []))

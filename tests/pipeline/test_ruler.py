import random
import re
from collections import Counter

import numpy as np
import pytest

from pipeline.manifest import StageError
from pipeline.prompts import encode
from pipeline.schema_of_eval import EvalSection, RulerSection
from pipeline.tasks import ruler
from pipeline.tasks.material import Material, generated_words
from pipeline.tasks.sample import Prompt, Text, fit
from tests.pipeline.task_material import PROSE, material

LENGTH = 6000


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("ruler"))


@pytest.fixture(scope="module")
def made(given):
    """{task: [(text, prompt)]} of two samples each."""
    section = EvalSection(ruler=RulerSection(list(ruler.TASKS), [LENGTH], 2, seed=3))
    found = {}
    for sample in ruler.build(section, given):
        prompt = sample.make()
        text = given.tokenizer.decode(prompt.tokens[1:])
        found.setdefault(sample.subtask, []).append((text, prompt))
    return found


def test_there_are_thirteen(made):
    assert len(made) == 13 == len(ruler.TASKS)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_lengths_are_never_above_and_hardly_below(made, task):
    for _, prompt in made[task]:
        total = len(prompt.tokens) + prompt.answer_tokens
        assert 0.99 * LENGTH <= total <= LENGTH
        assert prompt.tokens[0] == 0 and prompt.tokens[1:].min() > 0
        assert prompt.template == f"ruler/{task}"


def needles_of(text):
    found = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s)", text)
    return [(kind, key, value) for kind, key, value in found]


@pytest.mark.parametrize(
    ("task", "hidden", "asked", "kind"),
    [
        ("niah_single_1", 1, 1, "numbers"),
        ("niah_single_2", 1, 1, "numbers"),
        ("niah_single_3", 1, 1, "uuids"),
        ("niah_multikey_1", 4, 1, "numbers"),
        ("niah_multivalue", 4, 4, "numbers"),
        ("niah_multiquery", 4, 4, "numbers"),
    ],
)
def test_needles_are_hidden_and_asked_for(made, task, hidden, asked, kind):
    for text, prompt in made[task]:
        found = needles_of(text)
        assert len(found) == hidden and {each[0] for each in found} == {kind}
        assert len(prompt.expected) == asked
        values = {value: key for _, key, value in found}
        assert set(prompt.expected) <= values.keys()
        question = text[text.rindex("\nWhat") :]
        for value in prompt.expected:
            assert values[value] in question
        assert (prompt.depth is None) == (hidden > 1)
        one = "is the special magic " + kind[:-1]
        assert (one if asked == 1 else f"are all the special magic {kind}") in question


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_needles_lie_among_needles(made, task):
    for text, prompt in made[task]:
        found = needles_of(text)
        assert len(found) > 20 and prompt.expected[0] in {value for _, _, value in found}
        assert len({key for _, key, _ in found}) == len(found)


def test_an_essay_holds_its_needle_between_sentences(made):
    for text, prompt in made["niah_single_2"]:
        before, after = re.split(r"One of the special magic \S+ for \S+ is: \S+\. ?", text)[:2]
        body = before[before.index("afterwards.\n") + len("afterwards.\n") :]
        assert body == "" or body.rstrip()[-1] in ".!?"
        share = 100 * len(body) / (len(body) + len(after[: after.rindex("\nWhat")]))
        assert share == pytest.approx(prompt.depth, abs=3)


def test_a_chain_leads_to_its_value(made):
    for text, prompt in made["vt"]:
        example, asked = text.split("\n\n\n\n")
        for part in (example, asked):
            value = re.search(r"assigned the value (\d+) in", part)[1]
            given = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", part))
            reached = [name for name in given if follow(given, name) == value]
            assert len(reached) == 5 == len(given)
        assert sorted(reached) == sorted(prompt.expected)
        assert all(
            name in example[-60:] for name in dict(re.findall(r"VAR (\w+) = (\w+)", example))
        )


def follow(given, name):
    while name in given:
        name = given[name]
    return name


def test_the_commonest_words_are_expected(made):
    for text, prompt in made["cwe"]:
        lists = re.findall(r"Memorize the ones that appear most often\.\n(.*?)\nQuestion", text)
        assert len(lists) == 2
        counts = Counter(re.findall(r"\d+\. (\S+)", lists[1]))
        assert {word for word, count in counts.items() if count == 30} == set(prompt.expected)
        assert set(counts.values()) == {30, 3} and len(prompt.expected) == 10
        assert text.endswith("most often in the list are:")


def test_the_most_frequent_coded_words_are_expected(made):
    for text, prompt in made["fwe"]:
        body = text[text.index("coded words. ") + 13 : text.rindex("\nQuestion")]
        counts = Counter(body.split())
        dots = counts.pop("...")
        assert dots > max(counts.values())
        assert [word for word, _ in counts.most_common(3)] == list(prompt.expected)


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_a_question_stands_with_its_documents(made, given, task):
    for text, prompt in made[task]:
        numbers = [int(n) for n in re.findall(r"Document (\d+):\n", text)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 10
        topic = re.search(r"Question: W\w+ is (topic\d+)", text)[1]
        if task == "qa_1":
            assert f" is {prompt.expected[0]}." in text and len(prompt.expected) == 2
        else:
            assert prompt.expected == (f"in {topic}land",)
            assert all(f"{topic} {i}\n" in text for i in range(3))
        assert len(set(re.split(r"Document \d+:\n", text))) == len(numbers) + 1
        assert text.endswith(" Answer:")


def prompt_of(*expected):
    return Prompt(np.zeros(1, np.int64), expected, 8, "t")


def test_scores_are_shares_of_what_is_expected_or_any_of_it():
    prompt = prompt_of("Alpha", "beta", "1234567", "zz")
    assert ruler.score("vt", prompt, "") == 0
    assert ruler.score("vt", prompt, " ALPHA and\x00Beta") == 50
    assert ruler.score("cwe", prompt, "it is 1234567.") == 25
    assert ruler.score("qa_1", prompt, "it is 1234567.") == 100
    assert ruler.score("qa_2", prompt, "none") == 0


def test_prompts_repeat_with_their_seed(given, made):
    section = EvalSection(ruler=RulerSection(["vt", "qa_1"], [LENGTH], 1, seed=3))
    for sample in ruler.build(section, given):
        assert sample.make().sha256() == made[sample.subtask][0][1].sha256()
    section.ruler.seed = 4
    for sample in ruler.build(section, given):
        assert sample.make().sha256() != made[sample.subtask][0][1].sha256()


def test_missing_files_are_said(given, tmp_path):
    bare = Material(given.tokenizer, [np.arange(2, 300)])
    for task, file in (("qa_1", "squad.json"), ("qa_2", "hotpotqa.json")):
        section = EvalSection(ruler=RulerSection([task]))
        with pytest.raises(StageError, match=rf"{task} needs {file}: no folder.*eval.ruler.data"):
            ruler.build(section, bare)
        with pytest.raises(StageError, match=rf"holds no {file}; set eval.ruler.data"):
            ruler.build(section, Material(given.tokenizer, [], None, tmp_path))
    (tmp_path / "squad.json").write_text('{"data": [{}]}')
    with pytest.raises(StageError, match=r"squad.json: is not squad as published \(KeyError"):
        ruler.build(EvalSection(ruler=RulerSection(["qa_1"])), Material(None, [], None, tmp_path))
    with pytest.raises(StageError, match="holds no adjectivelist.txt; set eval.ruler.words"):
        ruler.build(
            EvalSection(ruler=RulerSection(["cwe"])), Material(None, [], None, None, tmp_path)
        )
    with pytest.raises(StageError, match=r"0 held-out documents: no text .* set eval.prose"):
        ruler.build(EvalSection(ruler=RulerSection(["niah_single_2"])), Material(None, []))


@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe", "qa_2"])
def test_too_short_a_length_is_said(given, task):
    section = EvalSection(ruler=RulerSection([task], [300], 1))
    (sample,) = ruler.build(section, given)
    with pytest.raises(StageError, match=rf"ruler {task} at 300 tokens.*raise .*lengths"):
        sample.make()


def test_documents_serve_as_prose_and_words_are_made(given):
    ids = encode(given.tokenizer, PROSE * 30)
    bare = Material(given.tokenizer, [np.concatenate([[0], ids])])
    section = EvalSection(ruler=RulerSection(["niah_single_2", "niah_multikey_2"], [1000], 1))
    text = [given.tokenizer.decode(sample.make().tokens) for sample in ruler.build(section, bare)]
    assert "lazy dogs! Do they live in the mountains?Llamas" in text[0]
    words = generated_words()
    assert len(set(words.every)) == len(words.every) and not {*words.nouns} & {*words.adjectives}
    key = needles_of(text[1])[0][1]
    assert key.split("-")[0] in words.adjectives and key.split("-")[1] in words.nouns


def test_fitting_writes_long_texts_rarely(given):
    written = []

    def write(rng: random.Random, units: int) -> Text:
        written.append(units)
        return Text(" word" * units, ["x"])

    _, ids = fit(write, given.tokenizer, 20_000, "words")
    assert 0.9975 * 20_000 <= len(ids) <= 20_000
    assert sum(units > 1000 for units in written) <= 3
    # nothing more can be added to a list that has an end
    assert len(fit(write, given.tokenizer, 20_000, "words", 4, 50)[1]) < 300

"""Synthetic retrieval: what is hidden is asked for once, in the words of the task."""

import re

import numpy as np
import pytest

from data_prep.needles import TASK_WORDS, Needles
from data_prep.sources import Source, plan_units
from data_prep.tokenizer import Encoder
from data_prep.units import NEVER, Making, UnitTask, Wanted, read_documents, read_names, write_unit
from pipeline.tasks import niah
from tests.data_prep.helpers import byte_level

TEXT = "".join(
    f"line {i} tells of some {word} and an anchor, value{i}\n"
    for i, word in enumerate(
        ["llama", "grass", "mountain", "garden", "wool", "river", "stone", "cloud"] * 20
    )
)
HIDDEN = re.compile(r"\nThe secret number of the (\w+) is (\d{5})\.\n")
ASKED = re.compile(
    r"\nQuestion: What is the secret number of the (\w+)\?"
    r"\nAnswer: The secret number of the (\w+) is (\d{5})\."
)


@pytest.fixture
def made():
    return list(Needles((100, 600), (1, 4), copies=3).documents("a.py", TEXT))


def test_every_needle_is_asked_for_once_behind_all_text(made):
    counts, orders = set(), set()
    for _, text in made:
        behind = text[text.index("\nQuestion") :]
        before = text[: -len(behind)]
        hidden, asked = HIDDEN.findall(before), ASKED.findall(behind)
        assert "".join(ASKED.split(behind)[::4]) == ""
        assert sorted(hidden) == sorted((word, number) for word, _, number in asked)
        assert all(word == again for word, again, _ in asked)
        assert len({word for word, _ in hidden}) == len(hidden)
        filler = HIDDEN.sub("", before)
        assert filler in TEXT
        counts.add(len(hidden))
        orders.add([word for word, _ in hidden] == [word for word, *_ in asked])
    assert counts == {1, 2, 3, 4} and orders == {True, False}


def test_the_keys_are_words_of_the_text_that_the_task_never_asks_about(made):
    keys = {word for _, text in made for word, _ in HIDDEN.findall(text)}
    assert {"llama", "wool"} < keys <= set(re.findall(r"[a-z]+", TEXT))
    assert "anchor" in TEXT and not keys & set(TASK_WORDS)


def test_the_wording_is_the_tasks(made):
    word, number = HIDDEN.search(made[0][1]).groups()
    assert niah.NEEDLE.format(word=word, number=number) in made[0][1]
    assert f"{niah.QUESTION.format(word=word)} {number}." in made[0][1]
    assert niah.WORDS == TASK_WORDS


def test_copies_differ_and_are_the_same_again(made):
    assert made == list(Needles((100, 600), (1, 4), copies=3).documents("a.py", TEXT))
    assert made != list(Needles((100, 600), (1, 4), copies=3, seed=2).documents("a.py", TEXT))
    names = [name for name, _ in made]
    assert len(set(names)) == len({text for _, text in made}) == len(made)
    assert {name.split(".")[1].partition(":")[2] for name in names} == {"0", "1", "2"}
    # Each copy holds the whole text, cut at other places.
    for copy in range(3):
        parts = [text for name, text in made if f":{copy}." in name]
        whole = "".join(HIDDEN.sub("", text[: text.index("\nQuestion")]) for text in parts)
        assert whole == TEXT


def test_a_text_of_few_words_gives_nothing():
    assert list(Needles((100, 600), (1, 4)).documents("a", "one two three = 1\n" * 50)) == []


def test_a_unit_of_needles_trains_only_and_ends_when_it_has_enough(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(TEXT)
    source = Source("s", tmp_path / "in", needles=Needles((100, 600), (1, 4), copies=50))
    making = Making(Encoder(byte_level().to_str(), "tiktoken"), 0, np.dtype("uint16"))
    (unit,) = plan_units(source, None)
    task = UnitTask(source, unit, tmp_path / "000000", Wanted(0.9), 5000, 1, False)
    summary = write_unit(task, making)
    assert summary.held_out == 0 and 5000 <= summary.usable < 6000
    assert (read_documents(tmp_path / "000000")["held_draw"] == NEVER).all()
    assert read_names(tmp_path / "000000")[0] == "a.txt:0.0"

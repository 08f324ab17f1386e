"""Which files of a folder are read: through links, by pattern, and of which split."""

import json
import os

import pytest

from data_prep.listing import matches, pattern_parts
from data_prep.sources import DataError, Source, list_files, other_splits


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return root


def test_linked_folders_are_read_and_loops_end(tmp_path):
    touch(tmp_path / "disk", "books/1.txt", "books/.hidden/2.txt")
    root = touch(tmp_path / "texts", "own/3.txt")
    (root / "books").symlink_to(tmp_path / "disk/books")
    (root / "own/loop").symlink_to(root)
    (tmp_path / "disk/books/back").symlink_to(root)
    assert list_files(Source("s", root)) == ["books/1.txt", "own/3.txt"]
    assert list_files(Source("s", root, glob="books/*.txt")) == ["books/1.txt"]


def test_what_cannot_be_read_is_refused_not_left_out(tmp_path):
    root = touch(tmp_path / "texts", "1.txt")
    (root / "2.txt").symlink_to(tmp_path / "unmounted/2.txt")
    with pytest.raises(DataError, match=r"cannot read .*2\.txt: No such file.*take it out"):
        list_files(Source("s", root))
    assert list_files(Source("s", root, glob="1*")) == ["1.txt"]
    os.mkfifo(root / "1.pipe")
    assert list_files(Source("s", root, glob="1*")) == ["1.txt"]


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        ("**/*", "a", True),
        ("**/*", "a/b/c", True),
        ("*", "a/b", False),
        ("**/*.txt", "a.txt", True),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("a/*/c", "a/c", False),
        ("[ab]?.txt", "b1.txt", True),
    ],
)
def test_patterns_match_as_glob_does(pattern, name, wanted, tmp_path):
    assert matches(name, pattern_parts(pattern)) is wanted
    touch(tmp_path, name)
    assert ((tmp_path / name) in tmp_path.glob(pattern)) is wanted


@pytest.mark.parametrize("pattern", ["", "/a", "a//b", "../a", "a**"])
def test_other_patterns_are_refused(pattern, tmp_path):
    with pytest.raises(DataError, match="set the source's glob to a relative pattern"):
        list_files(Source("s", tmp_path, glob=pattern))


HUB = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")]


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (HUB, HUB[:1]),
        (["en/train/0.jsonl", "en/dev/0.jsonl", "fr/train.jsonl.gz"], [0, 2]),
        (["train_sft-0.parquet", "test_sft-0.parquet"], [0]),
        (["a/0.jsonl", "b/0.jsonl"], [0, 1]),
        (["a/0.jsonl", "a/eval.jsonl"], [0]),
        (["trains/latest.jsonl"], [0]),
    ],
)
def test_the_training_split_alone_is_read(names, kept, tmp_path):
    touch(tmp_path, *names)
    kept = [names[each] if isinstance(each, int) else each for each in kept]
    source = Source("s", tmp_path, "dataset")
    assert list_files(source) == sorted(kept)
    assert sum(other_splits(source).values()) == len(names) - len(kept)
    assert list_files(Source("s", tmp_path, "dataset", split=None)) == sorted(names)


def test_another_split_is_read_where_it_is_asked_for(tmp_path):
    touch(tmp_path, *HUB)
    assert list_files(Source("s", tmp_path, "dataset", split="test")) == HUB[2:]
    (tmp_path / HUB[0]).unlink()
    with pytest.raises(DataError, match=r"split 'train', but 1 of split test, 1 of split valid"):
        list_files(Source("s", tmp_path, "dataset"))


def test_splits_are_those_that_the_card_declares(tmp_path):
    touch(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl", "train.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: a*\n"
        "  - split: test\n    path: [b*]\n- config_name: two\n  data_files: c.jsonl\n---\ntext\n"
    )
    source = Source("s", tmp_path, "dataset")
    assert list_files(source) == ["a.jsonl", "c.jsonl"]
    assert other_splits(source) == {"test": 1, "unknown": 1}
    (tmp_path / "README.md").write_text("---\nconfigs: 5\n---\n")
    assert list_files(source) == ["train.jsonl"]


def test_a_saved_data_set_is_read_without_its_caches(tmp_path):
    touch(tmp_path, *(f"{split}/data-0.arrow" for split in ("train", "unsupervised")))
    touch(tmp_path, "train/cache-1.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "unsupervised"]}')
    state = {"_data_files": [{"filename": "data-0.arrow"}]}
    (tmp_path / "train/state.json").write_text(json.dumps(state))
    source = Source("s", tmp_path, "dataset")
    assert list_files(source) == ["train/data-0.arrow"]
    assert other_splits(source) == {"unsupervised": 1}

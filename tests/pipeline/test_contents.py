"""What a stage's source files are told by."""

import os

import pytest

from pipeline import contents
from pipeline.contents import BLOCK, MIB, SPACING, SourceFiles, look, sampled


@pytest.fixture
def files(tmp_path):
    """a.txt of three bytes, and a file of 40 MiB with holes."""
    (tmp_path / "a.txt").write_text("one")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(40 * MIB)
    return SourceFiles({}, tmp_path, lambda: sorted(path.name for path in tmp_path.iterdir()))


def test_content_and_names_count_and_times_do_not(files):
    first = look(files)
    os.utime(files.root / "a.txt", (1, 1))
    touched = look(files)
    assert touched["content"] == first["content"] and touched["seen"] != first["seen"]
    (files.root / "a.txt").rename(files.root / "b.txt")
    renamed = look(files)
    (files.root / "b.txt").write_text("two")
    assert len({e["content"] for e in (first, renamed, look(files))}) == 3


@pytest.mark.parametrize("place", [0, BLOCK - 1, 2 * SPACING, 40 * MIB - BLOCK, 40 * MIB - 1])
def test_of_large_files_samples_count(files, place):
    before = sampled(files.root / "large")
    with (files.root / "large").open("r+b") as stream:
        stream.seek(place)
        stream.write(b"x")
    assert sampled(files.root / "large") != before


def test_whole_files_and_sizes_count(files):
    path = files.root / "large"
    between = BLOCK + 5
    before = sampled(path), sampled(path, whole=64 * MIB)
    with path.open("r+b") as stream:
        stream.seek(between)
        stream.write(b"x")
    after = sampled(path), sampled(path, whole=64 * MIB)
    assert after[0] == before[0] and after[1] != before[1]
    os.truncate(path, 40 * MIB - 1)
    assert sampled(path) != after[0]


def test_files_as_they_were_are_not_read_again(files, monkeypatch):
    first = look(files)
    monkeypatch.setattr(contents, "sampled", lambda *_: pytest.fail("read"))
    assert look(files, [{**first, "seen": "other"}, first]) == first


def test_the_same_names_and_times_elsewhere_are_other_files(files, tmp_path_factory):
    """Archives unpack with equal times."""
    other = tmp_path_factory.mktemp("other")
    for path in files.root.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "a.txt").write_text("two")
    for folder in (files.root, other):
        for path in folder.iterdir():
            os.utime(path, (1, 1))
    first = look(files)
    moved = SourceFiles({}, other, files.names)
    assert look(moved, [first])["content"] != first["content"]

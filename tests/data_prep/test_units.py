"""Units: whole or not there, the same bytes again, and held against their hashes."""

import errno
import json
import os

import numpy as np
import pytest

from data_prep import shards, units
from data_prep.contamination import EvaluationRuns
from data_prep.mix import Upsampling, Wanted, draw
from data_prep.sources import DataError, Source, plan_units
from data_prep.tokenizer import Encoder
from data_prep.units import Making, UnitTask, is_whole, read_documents, read_names, write_unit
from tests.data_prep.helpers import byte_level

BOS = 0
ENCODER = Encoder(byte_level().to_str(), "tiktoken")
MAKING = Making(ENCODER, BOS, np.dtype("uint16"))
TEXTS = ["first text", " \n", "second, of two lines\n\nand more", "third " * 40]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "in/a.jsonl").write_text("\n".join([*lines[:2], "{broken", *lines[2:]]))
    return Source("s", tmp_path / "in", "jsonl")


def task(source, prefix, **changes):
    (unit,) = plan_units(source, None)
    options = {"wanted": Wanted(0.3), "enough": None, "seed": 1, "strict": False}
    return UnitTask(source, unit, prefix, **(options | changes))


def tokens_of(prefix, dtype="uint16"):
    """Each document's ids."""
    values = np.fromfile(units.token_file(prefix), dtype)
    lengths = read_documents(prefix)["tokens"]
    return np.split(values, np.cumsum(lengths)[:-1])


def test_a_units_documents_are_their_texts_after_bos(source, tmp_path):
    summary = write_unit(task(source, tmp_path / "000000"), MAKING)
    assert is_whole(tmp_path / "000000")
    wanted = [text for text in TEXTS if text.strip()]
    found = tokens_of(tmp_path / "000000")
    assert [ids[0] for ids in found] == [BOS] * 3
    assert [byte_level().decode(ids[1:].tolist()) for ids in found] == wanted
    assert read_names(tmp_path / "000000") == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    assert summary == units.read_summary(tmp_path / "000000", check=True)
    assert (summary.documents, summary.tokens) == (3, sum(map(len, found)))
    assert {reason: count for reason, (count, _) in summary.skipped.items()} == {
        "broken lines": 1,
        "empty documents": 1,
    }
    draws = read_documents(tmp_path / "000000")["held_draw"]
    assert summary.held_out == (draws < 0.3).sum()
    lengths = read_documents(tmp_path / "000000")["tokens"]
    assert summary.usable == lengths[draws >= 0.3].sum()


def test_a_text_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.readers._CHUNK_BYTES", 64)
    monkeypatch.setattr("data_prep.tokenizer.PIECE_CHARACTERS", 50)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("good text " * 30)
    (folder / "b.txt").write_bytes(b"words before it breaks " * 30 + b"\xff")
    (folder / "c.txt").write_text(" " * 500)
    (folder / "d.txt").write_text("the last")
    summary = write_unit(task(Source("s", folder), tmp_path / "0"), MAKING)
    texts = [byte_level().decode(ids[1:].tolist()) for ids in tokens_of(tmp_path / "0")]
    assert texts == ["good text " * 30, "the last"]
    assert summary.documents == 2 and summary.skipped["undecodable texts"][0] == 1
    with pytest.raises(DataError, match=r"b\.txt: byte 0xff at offset 690 is not UTF-8; mend it"):
        write_unit(task(Source("s", folder), tmp_path / "1", strict=True), MAKING)
    assert not is_whole(tmp_path / "1")


def test_a_unit_ends_early_where_it_alone_is_enough(source, tmp_path):
    def held(seed, number):
        return draw(seed, "held out", "s", f"a.jsonl:{number}") < 0.3

    seed = next(seed for seed in range(99) if held(seed, 1) and not held(seed, 4))
    summary = write_unit(task(source, tmp_path / "0", enough=5, seed=seed), MAKING)
    assert summary.documents == 2 and summary.held_out == 1
    assert write_unit(task(source, tmp_path / "1", seed=seed), MAKING).documents == 3


def test_the_same_unit_again_is_the_same_bytes(source, tmp_path):
    for name in "01":
        write_unit(task(source, tmp_path / name), MAKING)
    for suffix in (".bin", ".npy", ".json"):
        assert (tmp_path / f"0{suffix}").read_bytes() == (tmp_path / f"1{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_changed_and_missing_files_are_refused(source, tmp_path, suffix):
    prefix = tmp_path / "units/0/000000"
    prefix.parent.mkdir(parents=True)
    write_unit(task(source, prefix), MAKING)
    path = prefix.with_name(prefix.name + suffix)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(DataError, match="is not the file that was written; remove .*units and run"):
        units.read_summary(prefix, check=True)
    path.unlink()
    with pytest.raises(DataError, match="is not the file that was written"):
        units.read_summary(prefix, check=True)


@pytest.mark.parametrize("full", ["0.bin", "0.npy", "0.json"])
def test_a_full_disk_leaves_no_unit(source, tmp_path, monkeypatch, full):
    fsync = os.fsync

    def full_disk(descriptor):
        if full in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full_disk)
    with pytest.raises(DataError, match="No space left on device; free space there"):
        write_unit(task(source, tmp_path / "0"), MAKING)
    assert not is_whole(tmp_path / "0")
    monkeypatch.setattr(shards.os, "fsync", fsync)
    assert write_unit(task(source, tmp_path / "0"), MAKING).documents == 3


def test_ids_that_the_type_cannot_hold_are_refused(source, tmp_path):
    making = Making(ENCODER, BOS, np.dtype("int8"))
    with pytest.raises(DataError, match="int8 holds up to 127; the tokenizer gives ids outside"):
        write_unit(task(source, tmp_path / "0"), making)


def test_documents_with_a_run_of_an_evaluation_text_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.tokenizer.PIECE_CHARACTERS", 40)
    folder = tmp_path / "in"
    folder.mkdir()
    question = "which llama ate the tall grass on the far side of the mountain in 1987"
    filler = "nothing of interest is said in these words, over and over again. " * 6
    texts = [filler + question + filler, filler, question[:30] + " but " + question[40:], question]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    runs = EvaluationRuns.of([ENCODER.encode(f"Say {question}")], 35)
    making = Making(ENCODER, BOS, np.dtype("uint16"), runs)
    summary = write_unit(task(Source("s", folder), tmp_path / "0"), making)
    documents = read_documents(tmp_path / "0")
    assert documents["contaminated"].tolist() == [True, False, False, True]
    clean = documents[~documents["contaminated"]]
    assert summary.usable == clean["tokens"][clean["held_draw"] >= 0.3].sum()


def test_a_run_is_found_wherever_the_document_is_divided():
    runs = EvaluationRuns.of([np.arange(100, 120)], 20)
    document = np.concatenate([np.arange(30), np.arange(100, 120), np.arange(30)]).astype(np.int32)
    near = np.where(document == 110, 0, document)
    for size in range(1, len(document) + 1):
        for tokens in (document, near):
            seeker = runs.seeker()
            for start in range(0, len(tokens), size):
                seeker.add(tokens[start : start + size])
            assert seeker.found == (tokens is document)


def test_evaluation_texts_without_a_run_are_refused():
    with pytest.raises(DataError, match=r"decontaminate\.tokens=20: none of 1 evaluation texts"):
        EvaluationRuns.of([np.arange(5)], 20)
    with pytest.raises(DataError, match=r"decontaminate\.tokens=1: must be 2 or more"):
        EvaluationRuns.of([np.arange(5)], 1)


def test_upsampling_counts_in_what_is_usable(source, tmp_path):
    wanted = Wanted(0.0001, Upsampling(30, 0.0))
    summary = write_unit(task(source, tmp_path / "0", wanted=wanted), MAKING)
    lengths = read_documents(tmp_path / "0")["tokens"]
    assert summary.usable == lengths[lengths >= 30].sum() > 0

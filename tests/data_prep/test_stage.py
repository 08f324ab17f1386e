"""The stage on real files: same bytes for any workers, held-out never in training, exact budget."""

import dataclasses
import errno
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep import shards, worker
from data_prep.audit import length_histogram
from data_prep.mix import draw
from data_prep.shards import HeldOutDocuments, PackedRows
from data_prep.sources import DataError
from pipeline import progress
from pipeline.contents import look
from pipeline.manifest import StageError
from pipeline.schema import Config
from pipeline.schema_of_data import DecontaminateSection, SourceSection, UpsampleSection
from pipeline.stages import data_prep
from tests.data_prep.helpers import byte_level
from tests.data_prep.stage_runs import (
    COPY,
    digest_of,
    documents_of,
    finished_run,
    run,
    section,
    small_units,
)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_document_once_in_train_or_held_out(fetched, tmp_path, packing):
    counts = run(fetched, tmp_path / "out", packing=packing, held_out=0.1)
    train, held = (PackedRows(tmp_path / "out" / name) for name in ("train", "held_out"))
    whole = HeldOutDocuments(tmp_path / "out/held_out_documents")
    assert all(len(row.tokens) == 128 for rows in (train, held) for row in rows)
    bos = counts["bos_id"]
    assert all(document[0] == bos and bos not in document[1:] for document in whole)
    sources = counts["sources"]
    copies = sum(row["copies_of_held_out"]["documents"] for row in sources)
    read = sum(row["read"]["documents"] for row in sources)
    assert read == 40 + 202
    starts = sum(int((row.tokens[: 128 - row.padding] == bos).sum()) for row in train)
    assert starts == read - len(whole) - copies
    splits = counts["train"]["pieces"] - starts
    assert (splits >= counts["train"]["split_documents"]) and (splits > 0)
    # tokens are the files' own: decoded pieces of training and held-out make up all texts
    texts = [p.read_text() for p in sorted((fetched / "fetch/packages").rglob("*.txt"))]
    raw_lines = (fetched / "lines/a.jsonl").read_text().splitlines()
    texts += [json.loads(line)["text"] for line in raw_lines if line != "{broken"]
    characters = Counter("".join(texts)) - Counter(COPY * copies)
    pieces = "".join(text for rows in (train, held) for _, text in documents_of(rows))
    assert Counter(pieces) == characters
    held_texts = {byte_level().decode(document) for document in whole}
    assert held_texts <= set(texts)
    # a document's number makes its beginning unlike that of any other
    openings = {text.split(" ")[0] + text.split(" ")[1] for text in held_texts}
    for tokens, text in documents_of(train):
        if tokens[0] == bos and len(text.split(" ")) > 2:
            assert text.split(" ")[0] + text.split(" ")[1] not in openings
    assert not (tmp_path / "out/scratch").exists() and not (tmp_path / "out/units").exists()
    assert json.loads((tmp_path / "out/audit.json").read_text()) == counts


def test_a_copy_of_a_held_out_document_is_not_trained_on(fetched, tmp_path):
    ids = [f"a.jsonl:{number}" for number in (202, 203)]
    seed = next(
        seed
        for seed in range(100)
        if [draw(seed, "held out", "lines", i) < 0.3 for i in ids] == [True, False]
    )
    counts = run(fetched, tmp_path / "out", held_out=0.3, seed=seed, packing="best_fit")
    assert counts["sources"][1]["copies_of_held_out"]["documents"] == 1
    train = PackedRows(tmp_path / "out/train")
    assert COPY not in {text.removeprefix("<s>") for _, text in documents_of(train)}
    names = HeldOutDocuments(tmp_path / "out/held_out_documents").names
    assert ids[0] in {name["id"] for name in names}


def test_names_of_held_out_documents_lead_back_to_their_texts(fetched, tmp_path):
    run(fetched, tmp_path / "out", held_out=0.1)
    whole = HeldOutDocuments(tmp_path / "out/held_out_documents")
    lines = (fetched / "lines/a.jsonl").read_text().splitlines()
    for document, name in zip(whole, whole.names, strict=True):
        if name["source"] == "books":
            text = (fetched / "fetch/packages/novels/usr/share" / name["id"]).read_text()
        else:
            text = json.loads(lines[int(name["id"].rpartition(":")[2]) - 1])["text"]
        assert byte_level().decode(document) == text
        assert len(document) == name["tokens"]


@pytest.mark.parametrize("tokens", [None, 6000])
def test_one_and_two_workers_write_the_same_bytes(fetched, tmp_path, monkeypatch, tokens):
    small_units(monkeypatch)
    upsample = UpsampleSection(200, 0.3)
    for workers in (1, 2):
        options = {"workers": workers, "tokens": tokens, "upsample": upsample}
        run(fetched, tmp_path / str(workers), **options)
    assert digest_of(tmp_path / "1") == digest_of(tmp_path / "2")
    run(fetched, tmp_path / "seed", tokens=tokens, upsample=upsample, seed=2)
    assert digest_of(tmp_path / "seed") != digest_of(tmp_path / "1")


def test_the_budget_is_exact_and_shared_by_weights(fetched, tmp_path):
    counts = run(fetched, tmp_path / "out", tokens=12_800)
    assert [row["train"]["tokens"] for row in counts["sources"]] == [9600, 3200]
    assert counts["train"] | {"tokens": 12_800, "rows": 100, "padding": 0} == counts["train"]
    # it stops reading when the share is full
    assert counts["sources"][1]["read"]["documents"] < 202


def test_a_small_source_repeats_and_says_so(fetched, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        counts = run(fetched, tmp_path / "out", tokens=200_000)
    assert counts["train"]["tokens"] == 200_000
    assert all(row["epochs"] > 1 for row in counts["sources"])
    assert "its documents repeat" in caplog.text
    assert "1 broken lines (first: " in caplog.text
    assert counts["sources"][1]["skipped"] == {"broken lines": 1}
    first = counts["sources"][1]["first_skipped"]["broken lines"]
    assert first.startswith(f"{fetched / 'lines/a.jsonl'}:201: not JSON: ")


def test_upsampling_shifts_lengths_within_a_source(fetched, tmp_path):
    plain = run(fetched, tmp_path / "plain", tokens=20_000)
    options = {"upsample": UpsampleSection(700, 0.05), "tokens": 20_000}
    upsampled = run(
        fetched, tmp_path / "upsampled", **options | {"sources": section(fetched).sources[:1]}
    )

    def mean_length(row):
        return row["train"]["tokens"] / row["train"]["documents"]

    assert mean_length(upsampled["sources"][0]) > 1.2 * mean_length(plain["sources"][0])
    assert upsampled["sources"][0]["train"]["tokens"] == 20_000


def test_a_tokenizer_of_another_model_is_refused(fetched, tmp_path):
    with pytest.raises(StageError, match=r"has \d+ ids; must be at most model.vocab_size=100"):
        run(fetched, tmp_path / "out", vocab_size=100)


def test_strict_refuses_the_broken_line(fetched, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:201: not JSON"):
        run(fetched, tmp_path / "out", strict=True)


def test_a_source_of_which_nothing_is_held_out_is_named(fetched, tmp_path, caplog):
    few = tmp_path / "few"
    few.mkdir()
    (few / "one.txt").write_text("a llama eats grass and hay " * 200)
    lines = SourceSection("lines", str(fetched / "lines"), format="jsonl")
    with caplog.at_level("WARNING"):
        counts = run(fetched, tmp_path / "out", sources=[lines, SourceSection("few", str(few))])
    assert [row["held_out"]["documents"] > 0 for row in counts["sources"]] == [True, False]
    assert "few: none of its 1 documents is held out, so that validation" in caplog.text
    assert "raise data.held_out or data.held_out_tokens" in caplog.text
    assert "lines: none of its" not in caplog.text


def test_weights_without_budget_are_said_to_have_no_effect(fetched, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        run(fetched, tmp_path / "out")
    assert "weights have no effect" in caplog.text


def test_wrong_values_are_refused_before_tokenising(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "load_tokenizer", lambda *_: pytest.fail("too late"))
    for name, value in {"packing": "sort", "held_out": 0.0, "seq_length": 1}.items():
        with pytest.raises(DataError, match=f"data.{name}="):
            run(fetched, tmp_path / name, **{name: value})
    sources = section(fetched).sources
    for i, wrong in enumerate(([], [sources[0], sources[0]])):
        with pytest.raises(DataError, match="must be one or more, each once"):
            run(fetched, tmp_path / str(i), sources=wrong)


def test_depends_on_what_changes_the_result_and_nothing_else(fetched, tmp_path):
    def state(root=fetched, **changes):
        config = Config(data=section(root, **changes))
        files = data_prep.source_files(config)
        assert files.keys() == {"lines"}
        return data_prep.depends_on(config), look(files["lines"])["content"]

    first = state()
    assert json.loads(json.dumps(first[0])) == first[0]
    assert state(workers=7, name="other") == first
    assert state(seed=2)[0] != first[0]
    shutil.copytree(fetched / "lines", tmp_path / "lines", copy_function=shutil.copyfile)
    assert state(tmp_path) == first
    with (tmp_path / "lines/a.jsonl").open("r+") as stream:
        stream.write("[")
    assert state(tmp_path)[1] != first[1]


@pytest.mark.parametrize(
    "full", ["train.bin", "held_out_documents.bin", "audit.json", "000000.bin"]
)
def test_a_full_disk_stops_the_stage_with_a_remedy(fetched, tmp_path, monkeypatch, full):
    fsync = os.fsync

    def full_disk(descriptor):
        if full in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full_disk)
    with pytest.raises(DataError, match=rf"{full}: No space left on device; free space there"):
        run(fetched, tmp_path / "out")


def test_progress_speaks_in_lines_without_a_terminal(fetched, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        run(fetched, tmp_path / "out", tokens=3000)
    line = r"tokenize tokens=\d+ tokens_per_second=\d+ percent=\d+ eta_seconds=\d+"
    assert re.search(line, caplog.text) and "write train " in caplog.text


def test_histogram_counts_every_document_once():
    lengths = np.array([1, 63, 64, 127, 128, 5000])
    buckets = length_histogram(lengths)
    assert sum(b["documents"] for b in buckets) == 6
    assert sum(b["tokens"] for b in buckets) == lengths.sum()
    assert [b["documents"] for b in buckets[:3]] == [2, 2, 1]
    assert buckets[-1]["start"] <= 5000 < buckets[-1]["stop"]
    assert length_histogram(np.array([], np.int64)) == []


def test_documents_with_one_text_are_used_once_where_asked(fetched, tmp_path):
    counts = run(fetched, tmp_path / "out", deduplicate=True, packing="best_fit")
    assert [row["repeated"]["documents"] for row in counts["sources"]] == [0, 1]
    pieces = [text for _, text in documents_of(PackedRows(tmp_path / "out/train"))]
    pieces += [text for _, text in documents_of(PackedRows(tmp_path / "out/held_out"))]
    assert [text.removeprefix("<s>") for text in pieces].count(COPY) == 1


def test_evaluation_texts_are_kept_out(fetched, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"question": f"Q: {COPY}"}) + "\n")
    texts = SourceSection("tasks", str(tmp_path / "tasks.jsonl"), format="jsonl", field="question")
    options = {"decontaminate": DecontaminateSection([texts], 8), "packing": "best_fit"}
    counts = run(fetched, tmp_path / "out", **options)
    assert [row["contaminated"]["documents"] for row in counts["sources"]] == [0, 2]
    for name in ("train", "held_out"):
        found = {text for _, text in documents_of(PackedRows(tmp_path / "out" / name))}
        assert COPY not in {text.removeprefix("<s>") for text in found}


def test_a_source_gives_documents_of_its_lengths_and_by_its_own_upsampling(fetched, tmp_path):
    books, lines = section(fetched).sources
    bounded = [dataclasses.replace(books, min_tokens=400, upsample=UpsampleSection(10**6, 1.0))]
    bounded.append(dataclasses.replace(lines, max_tokens=150))
    options = {"sources": bounded, "upsample": UpsampleSection(10**6, 0.2), "held_out": 0.01}
    rows = run(fetched, tmp_path / "out", packing="best_fit", **options)["sources"]
    assert all(row["of_other_length"]["documents"] > 5 for row in rows)
    assert rows[0]["histogram_train"][-1]["documents"] > 0
    assert min(b["start"] for b in rows[0]["histogram_train"] if b["documents"]) >= 256
    assert rows[0]["dropped_by_upsampling"]["documents"] == 0
    assert rows[1]["dropped_by_upsampling"]["documents"] > 50


def test_what_repeats_is_made_up_for_by_further_units(fetched, tmp_path, monkeypatch):
    """The budget is met without a second pass though a third of what is read is the same."""
    small_units(monkeypatch)
    folder = tmp_path / "same"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"text {i % 40} " * 300)
    (source,) = [SourceSection("same", str(folder), format="text")]
    options = {"sources": [source], "tokens": 30_000, "held_out": 0.05, "deduplicate": True}
    (row,) = run(fetched, tmp_path / "out", **options)["sources"]
    assert row["train"]["tokens"] == 30_000 and row["epochs"] <= 1
    assert row["repeated"]["documents"] > 0 and row["read"]["documents"] < 60


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_token_of_every_document_stands_in_one_place_of_the_rows(fetched, tmp_path, packing):
    counts = run(fetched, tmp_path / "out", packing=packing, held_out=0.1, seq_length=64)
    texts = [p.read_text() for p in (fetched / "fetch/packages").rglob("*.txt")]
    lines = (fetched / "lines/a.jsonl").read_text().splitlines()
    texts += [json.loads(line)["text"] for line in lines if line != "{broken"]
    copies = sum(row["copies_of_held_out"]["documents"] for row in counts["sources"])
    texts = (Counter(texts) - Counter({COPY: copies})).elements()
    wanted = [(0, *byte_level().encode(text).ids) for text in texts]
    files = [PackedRows(tmp_path / "out" / name) for name in ("train", "held_out")]
    if packing == "best_fit":
        found = [tuple(tokens.tolist()) for rows in files for tokens, _ in documents_of(rows)]
        wanted = [ids[at : at + 64] for ids in wanted for at in range(0, len(ids), 64)]
    else:
        found = []
        for rows in files:
            # as they stood before the seed shuffled them, each document begins with 0
            order = np.argsort(np.random.default_rng(1).permutation(len(rows)))
            stream = np.concatenate([rows[i].tokens[: 64 - rows[i].padding] for i in order])
            found += [tuple(d.tolist()) for d in np.split(stream, np.flatnonzero(stream == 0))[1:]]
    assert Counter(found) == Counter(wanted)


def test_a_file_that_shrinks_between_two_of_its_units_is_refused(fetched, tmp_path, monkeypatch):
    small_units(monkeypatch)
    path = Path(shutil.copytree(fetched / "lines", tmp_path / "lines")) / "a.jsonl"
    write_unit = worker.write_unit

    def shrinking(task, making):
        os.truncate(path, 9000)
        return write_unit(task, making)

    options = {"sources": [SourceSection("lines", str(path), format="jsonl")], "held_out": 0.1}
    with monkeypatch.context() as patched:
        patched.setattr(worker, "write_unit", shrinking)
        with pytest.raises(DataError, match="sources lines: their files changed while they were"):
            run(fetched, tmp_path / "out", **options)
    # nothing is kept that was read of the file as it was
    (row,) = run(fetched, tmp_path / "out", **options)["sources"]
    assert row["read"]["documents"] == path.read_text().count("\n")
    assert row["skipped"] == {"broken lines": 1}


@pytest.mark.parametrize("tokens", [None, 9000])
def test_shards_merged_are_the_bytes_of_one_run(fetched, tmp_path, monkeypatch, caplog, tokens):
    small_units(monkeypatch)
    options = {"tokens": tokens, "upsample": UpsampleSection(200, 0.3)}
    finished_run(fetched, tmp_path / "one", **options)
    units = 0
    for number in (1, 2, 3):
        counts = finished_run(fetched, tmp_path / "three", shard=f"{number}/3", **options)
        units += sum(row["units"] for row in counts["sources"])
    assert units > 6
    with caplog.at_level("INFO"):
        finished_run(fetched, tmp_path / "three", **options)
    assert "merging 3 shards" in caplog.text
    for name in ("one", "three"):
        (tmp_path / name / "whole/manifest.kept").unlink()
    assert digest_of(tmp_path / "one/whole") == digest_of(tmp_path / "three/whole")


def test_a_missing_and_a_damaged_shard_stop_the_merge(fetched, tmp_path, monkeypatch):
    small_units(monkeypatch)
    for number in (1, 3):
        finished_run(fetched, tmp_path, shard=f"{number}/3")
    with pytest.raises(StageError, match=r"of 3 shards 2/3 is missing; run .*data\.shard=2/3"):
        finished_run(fetched, tmp_path)
    shutil.rmtree(tmp_path / "current.partial")
    finished_run(fetched, tmp_path, shard="2/3")
    files = (tmp_path / "2of3/units/1").glob("*.bin")
    damaged = max(files, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(DataError, match="is not the file that was written; remove .*2of3/units"):
        finished_run(fetched, tmp_path)
    shutil.rmtree(tmp_path / "current.partial")
    with pytest.raises(DataError, match=r"data\.shard='4/3': must be i/n with i from 1 to n"):
        finished_run(fetched, tmp_path, shard="4/3")

"""The stage on real files: same bytes for any workers, held-out never in training, exact budget."""

import errno
import hashlib
import json
import logging
import os
from collections import Counter

import numpy as np
import pytest

from data_prep import shards
from data_prep import tokenizer as tokenizer_module
from data_prep.audit import length_histogram
from data_prep.mix import draw
from data_prep.shards import HeldOutDocuments, PackedRows
from data_prep.sources import DataError
from pipeline.manifest import StageContext, StageError
from pipeline.schema import (
    Config,
    DataSection,
    ModelSection,
    SourceSection,
    UpsampleSection,
)
from pipeline.stages import data_prep
from tests.data_prep.helpers import byte_level, save_model_folder

COPY = "the same text twice"
LOG = logging.getLogger("tests.data_prep")


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """fetch's folder, with a package, and a local folder of JSON lines beside it."""
    root = tmp_path_factory.mktemp("data")
    save_model_folder(root / "fetch/model")
    books = root / "fetch/packages/novels/usr/share"
    books.mkdir(parents=True)
    random = np.random.default_rng(0)
    words = ["llama", "grass", "mountain", "of", "the", "12", "eats\n", "wool", "its", "a"]
    for i in range(40):
        text = " ".join(random.choice(words, random.integers(5, 600)))
        (books / f"{i}.txt").write_text(f"book {i} {text}")
    lines = root / "lines"
    lines.mkdir()
    with (lines / "a.jsonl").open("w") as stream:
        for i in range(200):
            text = " ".join(random.choice(words, random.integers(5, 100)))
            stream.write(json.dumps({"text": f"line {i} {text}"}) + "\n")
        stream.write("{broken\n")
        stream.write(json.dumps({"text": COPY}) + "\n")
        stream.write(json.dumps({"text": COPY}) + "\n")
    return root


def section(root, **changes):
    options = {
        "name": "test",
        "sources": [
            SourceSection("books", "usr/share", package="debian:novels", weight=3.0),
            SourceSection("lines", str(root / "lines"), format="jsonl", weight=1.0),
        ],
        "seq_length": 128,
        "workers": 1,
    }
    return DataSection(**(options | changes))


def run(root, out, vocab_size=4096, **changes):
    out.mkdir()
    context = StageContext(
        Config(data=section(root, **changes), model=ModelSection(vocab_size=vocab_size)),
        out,
        lambda stage: root / stage,
        LOG,
    )
    return data_prep.run(context)


def digest_of(folder):
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def documents_of(rows):
    """Text of each piece of each row."""
    decode = byte_level().decode
    for row in rows:
        start = 0
        for length in row.document_lengths:
            yield row.tokens[start : start + length], decode(row.tokens[start : start + length])
            start += length


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
    assert not (tmp_path / "out/scratch").exists()
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
    monkeypatch.setattr(tokenizer_module, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(tokenizer_module, "ALONE_CHARACTERS", 5000)
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


def test_weights_without_budget_are_said_to_have_no_effect(fetched, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        run(fetched, tmp_path / "out")
    assert "weights have no effect" in caplog.text


def test_wrong_values_are_refused_before_tokenising(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "load_tokenizer", lambda folder: pytest.fail("too late"))
    for name, value in {"packing": "sort", "held_out": 0.0, "seq_length": 1}.items():
        with pytest.raises(DataError, match=f"data.{name}="):
            run(fetched, tmp_path / name, **{name: value})
    sources = section(fetched).sources
    for i, wrong in enumerate(([], [sources[0], sources[0]])):
        with pytest.raises(DataError, match="must be one or more, each once"):
            run(fetched, tmp_path / str(i), sources=wrong)


def test_depends_on_what_changes_the_result_and_nothing_else(fetched):
    def state(**changes):
        return data_prep.depends_on(Config(data=section(fetched, **changes)))

    first = state()
    assert first["local_files"].keys() == {"lines"}
    assert json.loads(json.dumps(first)) == first
    assert state(workers=7, name="other") == first
    assert state(seed=2) != first
    file = fetched / "lines/a.jsonl"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert state() != first
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert state() == first


@pytest.mark.parametrize("full", ["train.bin", "held_out_documents.bin", "audit.json", "0.bin"])
def test_a_full_disk_stops_the_stage_with_a_remedy(fetched, tmp_path, monkeypatch, full):
    fsync = os.fsync

    def full_disk(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full_disk)
    with pytest.raises(DataError, match=rf"{full}: No space left on device; free space there"):
        run(fetched, tmp_path / "out")


def test_progress_speaks_in_lines_without_a_terminal(fetched, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data_prep, "LOG_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        run(fetched, tmp_path / "out", tokens=3000)
    assert "tokenize books: " in caplog.text
    assert "write train: " in caplog.text


def test_histogram_counts_every_document_once():
    lengths = np.array([1, 63, 64, 127, 128, 5000])
    buckets = length_histogram(lengths)
    assert sum(b["documents"] for b in buckets) == 6
    assert sum(b["tokens"] for b in buckets) == lengths.sum()
    assert [b["documents"] for b in buckets[:3]] == [2, 2, 1]
    assert buckets[-1]["start"] <= 5000 < buckets[-1]["stop"]
    assert length_histogram(np.array([], np.int64)) == []

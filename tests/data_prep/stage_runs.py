"""stage=data_prep on a few small files, as tests run it."""

import hashlib
import json
import logging

import numpy as np

from data_prep import corpus, sources
from pipeline.contents import look
from pipeline.manifest import StageContext, finish, stage_id
from pipeline.schema import Config, ModelSection
from pipeline.schema_of_data import DataSection, SourceSection
from pipeline.stages import data_prep
from tests.data_prep.helpers import byte_level, save_model_folder

COPY = "the same text twice"
LOG = logging.getLogger("tests.data_prep")


def make_sources(root):
    """fetch's folder, with a package, and a local folder of JSON lines beside it."""
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
    out.mkdir(exist_ok=True)
    context = StageContext(
        Config(data=section(root, **changes), model=ModelSection(vocab_size=vocab_size)),
        out,
        lambda stage: root / stage,
        LOG,
    )
    return data_prep.run(context)


def small_units(monkeypatch):
    """Several units of each source, and ranges of its file of lines."""
    monkeypatch.setattr(corpus, "UNIT_BYTES", 4000)
    monkeypatch.setattr(corpus, "_LEAST_UNIT_BYTES", 4000)
    monkeypatch.setattr(sources, "SPLIT_BYTES", 20_000)


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


def finished_run(root, folder, **changes):
    """Run the stage into folder/NAME and finish it as the runner does; NAME's manifest is there."""
    config = Config(data=section(root, **changes), model=ModelSection(vocab_size=4096))
    out = folder / "current.partial"
    out.mkdir(parents=True)
    depends_on = json.loads(json.dumps(data_prep.depends_on(config)))
    entries = {name: look(files) for name, files in data_prep.source_files(config).items()}
    depends_on["source_files"] = entries
    id_ = stage_id("data_prep", depends_on, {"fetch": "1"})
    (out / "partial.json").write_text(json.dumps({"id": id_, "config": depends_on}))
    context = StageContext(config, out, lambda stage: root / stage, LOG)
    counts = data_prep.run(context)
    name = (changes.get("shard") or "whole").replace("/", "of")
    finish(out, folder / name, "data_prep", depends_on, {"fetch": "1"}, {}, counts, 0.0)
    (folder / name / "partial.json").unlink()
    (folder / name / "manifest.json").rename(folder / name / "manifest.kept")
    if changes.get("shard"):
        (folder / name / "manifest.kept").rename(folder / name / "manifest.json")
    return counts

"""stage=inspect shows what data_prep has made, and finds what is not as it was written."""

import json
import shutil

import numpy as np
import pytest

from data_prep.shards import IndexedWriter, PackedRows
from pipeline.manifest import StageError
from pipeline.stages import inspect
from tests.pipeline.running import refused, run
from tests.pipeline.small_run import save_llama, save_text, small


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    save_llama(root / "model")
    save_text(root / "text")
    return root


def command(root, stage, *more):
    return small(root, root / "model", f"stage={stage}", "data.tokens=4000", *more)


def test_rows_sources_and_lengths_are_shown(made, capsys):
    for stage in ("fetch", "data_prep"):
        assert run(capsys, *command(made, stage))[0] == 0
    code, lines = run(capsys, *command(made, "inspect", "inspect.rows=1000"))
    assert code == 0, lines
    row = next(line for line in lines if line.startswith("notes  "))
    assert row.split()[3:6] == ["4,000", "100.00%", "100.000%"]
    assert any(line.endswith("files are as they were written") for line in lines)
    folder = made / "outputs/small/main/inspect"
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    shown = (folder / "rows.txt").read_text().splitlines()
    assert [line for line in shown if line.startswith("train, row")][0] == "train, row 0:"
    prepared = next((made / "outputs/artifacts/data_prep").glob("*/audit.json")).parent
    rows = PackedRows(prepared / "train")
    lengths = rows[0].document_lengths.tolist()
    ends = np.cumsum(lengths).tolist()
    starts = [line.split()[0] for line in shown[1 : 1 + len(lengths)]]
    assert starts == [f"{end - length}..{end}" for end, length in zip(ends, lengths, strict=True)]
    bos = json.loads((prepared / "audit.json").read_text())["bos_id"]
    ends = [0, *ends]
    begins = ["begins" if rows[0].tokens[start] == bos else "goes" for start in ends[:-1]]
    assert [line.split()[1] for line in shown[1 : 1 + len(lengths)]] == begins
    beginnings = sum(int((row.tokens == bos).sum() - row.padding) for row in rows)
    assert sum("begins  '<s>" in line for line in shown) >= beginnings > 3


def test_a_file_that_changed_is_refused(made, capsys):
    (prepared,) = (made / "outputs/artifacts/data_prep").glob("[0-9a-f]*")
    path = prepared / "train.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    message = refused(capsys, *command(made, "inspect"))
    assert message.startswith(f"{path}: has the hash ")
    assert message.endswith("write it again with stage=data_prep force=true")
    path.unlink()
    assert f"{path}: is missing" in refused(capsys, *command(made, "inspect"))
    path.write_bytes(raw)
    assert run(capsys, *command(made, "inspect"))[0] == 0


def test_rows_that_are_not_as_counted_are_refused(made, tmp_path):
    (prepared,) = (made / "outputs/artifacts/data_prep").glob("[0-9a-f]*")
    counts = json.loads((prepared / "audit.json").read_text())
    rows = PackedRows(prepared / "train")
    inspect.check_rows(rows, counts["train"], counts["vocab_size"])
    with pytest.raises(StageError, match="must be ids below 40"):
        inspect.check_rows(rows, counts["train"], 40)
    with pytest.raises(StageError, match=r"tokens, \d+ of padding; must be"):
        inspect.check_rows(rows, counts["train"] | {"tokens": 1}, counts["vocab_size"])
    for path in prepared.glob("train*"):
        shutil.copy(path, tmp_path)
    with IndexedWriter(tmp_path / "train_lengths", "int32") as writer:
        for _ in rows:
            writer.add(np.array([65]))
    with pytest.raises(StageError, match="padding -1; must be"):
        inspect.check_rows(PackedRows(tmp_path / "train"), counts["train"], counts["vocab_size"])


def test_shares_of_long_documents_are_counted_by_buckets():
    histogram = [
        {"start": 16384, "stop": 32768, "documents": 1, "tokens": 20_000},
        {"start": 32768, "stop": 65536, "documents": 1, "tokens": 40_000},
        {"start": 131072, "stop": 262144, "documents": 1, "tokens": 140_000},
    ]
    assert inspect.tokens_from(histogram, 1 << 15) == 180_000
    assert inspect.tokens_from(histogram, 1 << 17) == 140_000

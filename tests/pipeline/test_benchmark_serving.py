"""benchmark=serving at a tiny shape: its rows by hand, what does not fit, what is refused."""

import csv
import json
from pathlib import Path

import pytest
import torch

from kernels.pattern import Pattern
from pipeline.benchmarks import serving
from pipeline.benchmarks.serving_stock import StockLlama
from pipeline.schema import ServingCase
from pipeline.validation import parse
from tests.pipeline.running import composed, refused, run
from tests.pipeline.small_run import SHAPE

PATTERN = {"sink_tokens": 4, "window": 12, "block": 8}
CONFIG = (
    "name=small",
    "stage=benchmark",
    "benchmark.name=serving",
    "benchmark.repeats=2",
    "benchmark.precision=fp32",
    "benchmark.prefill_chunk=30",
    "benchmark.commit=abc",
    "benchmark.groups=[a]",
    *(f"model.{key}={value}" for key, value in SHAPE.items()),
    *(f"pattern.{key}={value}" for key, value in PATTERN.items()),
    "schedule.full=[1]",
)


def with_cases(*cases):
    cases = [{"group": "a", "new_tokens": 2} | case for case in cases]
    return f"benchmark.serving_cases={json.dumps(cases)}"


def table(capsys, tmp_path, *cases, more=()):
    code, lines = run(capsys, *CONFIG, with_cases(*cases), *more, f"outputs={tmp_path}")
    assert code == 0, lines
    folder = tmp_path / "small/main/benchmark"
    with (folder / "serving.csv").open() as file:
        return list(csv.DictReader(file)), lines, folder


def test_the_table_of_one_run(tmp_path, capsys):
    arms = ["hybrid", "full", "stock"]
    cases = {"length": 70, "arms": arms}, {"length": 40, "batch": 3}
    rows, lines, folder = table(capsys, tmp_path, *cases)
    names = {f"serving{end}" for end in (".csv", ".json", "_by_length.png", "_by_length.svg")}
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json"}
    told = [(row["arm"], row["length"], row["batch"], row["full_layers"]) for row in rows]
    assert told[:4] == [
        ("hybrid", "70", "1", "1"),
        ("full", "70", "1", "2"),
        ("stock", "70", "1", "2"),
        ("hybrid", "40", "3", "1"),
    ]
    token = 2 * 2 * 16 * 4
    for row in rows:
        length, batch = int(row["length"]), int(row["batch"])
        least, middle, most = (float(row[f"decode_ms{x}"]) for x in ("_least", "", "_most"))
        assert 0 < least <= middle <= most
        speed = float(row["decode_tokens_per_second"])
        assert speed == pytest.approx(batch * 1e3 / middle, rel=1e-4)
        seconds = float(row["prefill_seconds"])
        assert float(row["prefill_tokens_per_second"]) == pytest.approx(
            batch * length / seconds, rel=1e-4
        )
        assert (row["gpu"], row["commit"], row["reason"]) == ("CPU", "abc", "")
        # Room for what is decoded: twice what is timed, and as much before.
        room = length + 2 * 3
        if row["arm"] == "stock":
            assert int(row["cache_allocated_bytes"]) == batch * 2 * room * token
            continue
        assert row["dense_backend"] == "torch_sdpa"
        keys = torch.arange(length)
        live = Pattern(**PATTERN).visible(torch.tensor(length), keys).sum().item()
        sparse = row["arm"] == "hybrid"
        wanted = batch * token * (length + (live if sparse else length))
        assert int(row["cache_live_bytes"]) == wanted == int(row["cache_live_bytes_by_pattern"])
        slots = room + (4 + 12 if sparse else room)
        assert int(row["cache_allocated_bytes"]) == batch * token * slots
    ratio = float(rows[1]["decode_ms"]) / float(rows[0]["decode_ms"])
    assert float(rows[0]["decode_over"]) == pytest.approx(ratio, rel=1e-4)
    assert any(line.startswith("70 tokens, batch 1: hybrid over full") for line in lines)
    assert "measured: 5" in lines and "not measured: 0" in lines


def test_what_does_not_fit_is_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("model.engine.free_bytes", lambda device: 200_000)
    cases = {"length": 4000, "arms": ["full"]}, {"length": 40, "batch": 2, "arms": ["hybrid"]}
    rows, lines, folder = table(capsys, tmp_path, *cases, {"length": 40, "arms": ["full"]})
    assert "1 rows of 4006 tokens" in rows[0]["reason"] and rows[0]["decode_ms"] == ""
    assert rows[1]["decode_ms"] and rows[2]["decode_ms"]
    assert any("each at its largest batch measured: hybrid" in line for line in lines)
    assert not (folder / "serving_by_length.png").exists()


def test_a_run_that_is_killed_keeps_its_rows(tmp_path, capsys, monkeypatch):
    honest, rows = serving.Serving.row, []

    def row(self, case, arm):
        if rows:
            raise KeyboardInterrupt
        rows.append(honest(self, case, arm))
        return rows[0]

    monkeypatch.setattr(serving.Serving, "row", row)
    code, _ = run(capsys, *CONFIG, with_cases({"length": 40}), f"outputs={tmp_path}")
    assert code != 0
    (path,) = Path(tmp_path).rglob("serving.csv")
    assert [found["arm"] for found in csv.DictReader(path.open())] == ["hybrid"]


def test_past_the_budget_nothing_is_begun(tmp_path, capsys):
    rows, *_ = table(capsys, tmp_path, {"length": 40}, more=["benchmark.budget_minutes=0"])
    assert [row["reason"] for row in rows] == ["past the budget of 0 minutes"] * 2


def test_stock_and_full_say_the_same():
    """The reference multiplies the engine's own weights: their greedy tokens agree."""
    config = parse(composed(*CONFIG, with_cases({"length": 40})))
    one = serving.Serving(config)
    engine = serving.Engine(one.arm("full"), one.weights)
    prompts = one._prompts(ServingCase(length=40, batch=2), 40)
    ours = [step for step in engine.generate([p.tolist() for p in prompts], 5)]
    stock = StockLlama(one.arm("stock"), one.weights)
    stock.reserve(50)
    found = [stock.forward(torch.stack(prompts))]
    while len(found) < 5:
        found.append(stock.forward(found[-1]))
    assert torch.cat(found, 1).T.tolist() == ours


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([with_cases({"length": 0})], "length=0: must be at least 1"),
        ([with_cases({"length": 9, "new_tokens": 1})], "new_tokens=1: must be at least 2"),
        ([with_cases({"length": 9, "arms": ["half"]})], "must name some of hybrid, full, stock"),
        (["benchmark.prefill_chunk=0"], "benchmark.prefill_chunk=0: must be at least 1"),
        (["benchmark.dense_backend=flash"], "dense_backend='flash': must be null or one of"),
        (["benchmark.groups=[b]"], "must name some of the cases' groups a"),
        (["parallel.gpus_per_node=2"], "parallel.tensor=1 of 2 processes: .*set parallel.tensor=2"),
    ],
)
def test_refusals(more, words, tmp_path, capsys):
    import re

    told = refused(capsys, *CONFIG, with_cases({"length": 9}), f"outputs={tmp_path}", *more)
    assert re.search(words, told), told

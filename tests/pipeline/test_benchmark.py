"""A benchmark runs by itself, says on what it ran, and leaves its figures alone."""

import json

from tests.pipeline.running import run
from tests.pipeline.small_run import SHAPE

CONFIG = (
    "name=small",
    "stage=benchmark",
    "benchmark.repeats=2",
    *(f"model.{key}={value}" for key, value in SHAPE.items()),
    "schedule.full=[1]",
    "data.seq_length=64",
    "train.precision=fp32",
    "train.rows_per_step=2",
    "train.micro_batch_rows=1",
)


def test_what_a_checkpoint_costs(layout, tmp_path, capsys):
    code, lines = run(capsys, *CONFIG, f"outputs={tmp_path}")
    assert code == 0, lines
    folder = tmp_path / "small/main/benchmark"
    record = json.loads((folder / "checkpoint.json").read_text())
    assert (record["benchmark"], record["machine"]) == ("checkpoint", "CPU")
    assert record["config"]["model"]["num_layers"] == 2 and record["versions"]["torch"]
    figures = record["figures"]
    # Masters and two moments in float32, and what describes them.
    assert figures["bytes_per_parameter"] > 12
    assert figures["seconds_in_the_background"] > 0 and figures["seconds_blocked"] >= 0
    assert any(line.startswith("bytes_per_parameter: ") for line in lines)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", "manifest.json"]
    # Measured again each time it is asked for.
    assert run(capsys, *CONFIG, f"outputs={tmp_path}")[0] == 0

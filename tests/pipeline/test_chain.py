"""Every stage of a real run, from text to report, at the smallest size; and the same run killed."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from pipeline.schema import CHAIN
from tests.pipeline.running import ROOT, alone, run
from tests.pipeline.small_run import save_llama, save_text, small

PATTERNS = {
    "sink": {"sink_tokens": 4, "window": 16, "block": 8},
    "per_head": {"sink_tokens": 4, "window": 16, "block": 8, "stride": 4, "phase": "per_head"},
}
# Dies as under kill -9 after the third step, half-way between two checkpoints.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[1]))
from pipeline.runner import execute
from pipeline.training.metrics import Metrics
from tests.pipeline.running import composed
honest = Metrics.write
def write(metrics, record):
    honest(metrics, record)
    if (record["kind"], record["step"]) == ("train", 3):
        # Step 2 is saved in the background, which may take longer than a step.
        latest = Path(metrics.file.name).parent / "checkpoints/latest"
        until = time.monotonic() + 60
        while not latest.exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
Metrics.write = write
execute(composed(*sys.argv[2:]))
"""


def pattern(name):
    return [f"pattern.{key}={value}" for key, value in PATTERNS[name].items()]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(folder):
    """metrics.jsonl without what is measured with a clock."""
    clocks = ("seconds", "tokens_per_second", "mfu", "memory_bytes", "data_wait", "time")
    return [
        {key: value for key, value in line.items() if key not in clocks}
        for line in lines_of(folder / "finetune/metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    save_llama(folder / "model")
    save_text(folder / "text")
    return folder


def chain(root, name, *more):
    return small(root, root / "model", *pattern(name), f"variant={name}", *more)


@pytest.mark.parametrize("name", PATTERNS)
def test_chain(root, capsys, name):
    code, lines = run(capsys, *chain(root, name))
    assert code == 0, lines
    folder = root / "outputs/small" / name
    assert lines[-1] == str(folder / "report/index.html")

    metrics = results(folder)
    kinds = [(line["kind"], line["step"]) for line in metrics]
    train, validation = [("train", step) for step in (1, 2, 3, 4)], ("validation",)
    assert [k for k in kinds if k[0] == "train"] == train
    assert [k[1] for k in kinds if k[0] == validation[0]] == [0, 2, 4]
    losses = [line["loss"] for line in metrics if line["kind"] == "validation"]
    assert losses[-1] < losses[0]

    records = lines_of(folder / "evaluate/records.jsonl")
    found = {(line["task"], line["model"]) for line in records}
    assert found == {("perplexity", m) for m in ("base", "final")} | {
        ("niah", "base"),
        ("niah", "final"),
        ("kv_bytes", "final"),
    }
    by_model = {
        model: sum(r["nll"] for r in records if (r["task"], r["model"]) == ("perplexity", model))
        for model in ("base", "final")
    }
    assert by_model["final"] < by_model["base"]
    longest = max((r for r in records if r["task"] == "kv_bytes"), key=lambda r: r["length"])
    assert longest["live_bytes"] < longest["full_bytes"]

    page = (folder / "report/index.html").read_text()
    assert "S1 F1" in page and list((folder / "report").rglob("*.png"))

    code, lines = run(capsys, *chain(root, name))
    assert code == 0
    skipped = [line.partition(": ")[0] for line in lines if "up to date, skipped" in line]
    assert skipped == list(CHAIN) and lines[-1] == str(folder / "report/index.html")


def test_killed_and_continued_is_never_stopped(root, capsys):
    name = "per_head"
    whole = root / "outputs/small" / name
    assert run(capsys, *chain(root, name))[0] == 0
    again = chain(root, name, "variant=killed", "stage=finetune")
    threads = str(torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", KILLED, threads, *again], cwd=ROOT, env=alone())
    assert done.returncode == -signal.SIGKILL
    folder = root / "outputs/small/killed"
    assert not (folder / "finetune").exists()
    left = lines_of(folder / "finetune.partial/metrics.jsonl")
    assert [line["step"] for line in left if line["kind"] == "train"] == [1, 2, 3]
    code, lines = run(capsys, *again)
    assert code == 0 and "finetune: resume step=2" in lines, lines
    assert results(folder) == results(whole)

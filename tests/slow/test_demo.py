"""What `make demo` claims, on three seeds; and stopped in every stage it ends the same.

Takes some 15 minutes on two cores.
"""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from pipeline.records import read_records
from tests.pipeline.running import ROOT, alone

pytestmark = pytest.mark.slow
OLD, NEW, WINDOW = 256, 2048, 128
CLOCKS = ("seconds", "tokens_per_second", "mfu", "memory_bytes", "data_wait")


def command(outputs, experiment, *keys):
    run = [sys.executable, str(ROOT / "pipeline/run.py"), f"experiment={experiment}"]
    return [*run, f"outputs={outputs}", *keys]


def perplexity(records, model, start, stop):
    """Over the buckets in [start, stop)."""
    rows = [r for r in records if (r["task"], r["model"]) == ("perplexity", model)]
    rows = [r for r in rows if start <= r["start"] and r["stop"] <= stop]
    return math.exp(sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows))


def needles(records, model="final"):
    """Mean score of those further back than the window."""
    rows = [r for r in records if (r["task"], r["model"]) == ("niah", model)]
    scores = [r["score"] for r in rows if r["distance"] > WINDOW]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_claim(tmp_path, seed):
    keys = (f"train.seed={seed}", f"eval.niah.seed={seed}", f"data.sources.1.needles.seed={seed}")
    for experiment in ("demo_window", "demo"):
        subprocess.run(command(tmp_path, experiment, *keys), check=True, env=alone())
    records = read_records(tmp_path / "demo/main/evaluate/records.jsonl")
    control = read_records(tmp_path / "demo_window/main/evaluate/records.jsonl")
    far = {model: perplexity(records, model, 4 * OLD, NEW) for model in ("base", "final")}
    near = {model: perplexity(records, model, 0, OLD) for model in ("base", "final")}
    assert far["base"] >= 5 * near["base"]
    assert far["final"] <= 1.15 * near["final"]
    assert needles(records) >= 90
    assert needles(control) <= 30
    summary = json.loads((tmp_path / "demo/main/report/manifest.json").read_text())["counts"]
    assert len(summary["summary"]) == 6


def result(outputs):
    """Training's and evaluation's records without what a clock measured."""
    run = outputs / "demo/main"
    found = [*read_records(run / "finetune/metrics.jsonl")]
    found += sorted(read_records(run / "evaluate/records.jsonl"), key=json.dumps)
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in found]


def test_stopped_in_every_stage_it_ends_the_same(tmp_path):
    """Ctrl-C when a stage has begun, and the same command again; at last the run's own end."""
    keys = ("train.steps=8", "train.save_every=3", "train.log_every=1", "eval.niah.samples=1")
    keys += ("data.tokens=400_000", "eval.perplexity.documents=2")
    cuts = ("fetch", "data_prep", "convert", "finetune: step 5", "export", "evaluate", "report")
    for cut in cuts:
        stage, _, sign = cut.partition(": ")
        process = subprocess.Popen(
            command(tmp_path / "cut", "demo", *keys),
            stdout=subprocess.PIPE,
            text=True,
            env=alone(),
            # A shell starts what runs in its background with Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for line in process.stdout:
            if (sign or f"{stage}: starts") in line:
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                break
        else:
            pytest.fail(f"{cut} was never reached")
        rest = process.stdout.read()
        assert process.wait() == 130, (cut, rest)
    for name in ("cut", "whole"):
        subprocess.run(command(tmp_path / name, "demo", *keys), check=True, env=alone())
    assert result(tmp_path / "cut") == result(tmp_path / "whole")

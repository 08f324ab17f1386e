"""Every shipped recipe that fits one GPU: training, export, evaluation and an answer, there.

Three steps on a sample, by the recipe's own shape, pattern, precision and row length; alone and as
two ranks that share the GPU. Only what would be fetched is replaced: weights are random and text is
the standard library's, a folder a document.
"""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.records import read_records
from tests.pipeline.running import ROOT, alone

pytestmark = pytest.mark.gpu
SAMPLE = "data.sources=[{name: sample, path: stdlib, format: directory, glob: '**/*.py'}]"
# Of every recipe.
FEWER = (
    "train.steps=3",
    "train.validation_rows=2",
    "train.save_every=2",
    "train.log_every=1",
    "eval.perplexity.documents=1",
    "eval.niah.samples=1",
    "eval.niah.depths=[50]",
    "wandb.mode=disabled",
    "device=cuda",
)
SMOLLM2 = (SAMPLE, "model.source=random", "model.vocab_size=2048", "data.held_out_tokens=100_000")
# Recipe -> what takes the place of its weights and text.
RECIPES = {
    "tiny": (),
    "demo": (),
    "demo_full": (),
    "demo_window": (),
    "demo_base": ("data.tokens=1_000_000", "train.micro_batch_rows=64"),
    "smollm2_smoke": (*SMOLLM2, "data.tokens=200_000"),
    "smollm2_32k": (*SMOLLM2, "data.tokens=900_000"),
    "smollm2_32k_full": (*SMOLLM2, "data.tokens=900_000"),
    "smollm2_32k_window": (*SMOLLM2, "data.tokens=900_000"),
}
RANKS = {"alone": (), "shared": ("parallel.gpus_per_node=2", "parallel.share_gpus=true")}
# Relative, between the losses of one rank and of two: bf16 rounds what the ranks add up.
BOUND = 2e-3


def run(*keys: str) -> str:
    """stdout of one command.

    Raises:
        AssertionError: where it fails, with the end of what it printed.
    """
    command = [sys.executable, str(ROOT / "pipeline/run.py"), *keys]
    ended = subprocess.run(command, capture_output=True, text=True, env=alone(), timeout=400)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    assert "Traceback" not in ended.stdout + ended.stderr
    return ended.stdout


def losses(folder) -> list[float]:
    """Training's, step by step, and the held-out ones."""
    return [record["loss"] for record in read_records(folder / "finetune/metrics.jsonl")]


def train_and_answer(recipe, outputs, name) -> list[float]:
    """The losses of one layout, whose records and, alone, answer are looked at too."""
    keys = (f"experiment={recipe}", f"outputs={outputs}", f"variant={name}")
    keys += (*FEWER, *RECIPES[recipe], *RANKS[name])
    run(*keys)
    folder = outputs / recipe / name
    records = read_records(folder / "evaluate/records.jsonl")
    assert {("final", "perplexity"), ("final", "niah")} <= {
        (record["model"], record["task"]) for record in records
    }
    if name == "alone":
        run(*keys, "stage=generate", "generate.prompt=def main", "generate.max_new_tokens=8")
        answer = json.loads((folder / "generate/generate.json").read_text())
        assert answer["new_tokens"] >= 1
    assert max(r["step"] for r in read_records(folder / "finetune/metrics.jsonl")) == 3
    return losses(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_on_a_gpu(recipe, tmp_path):
    shared = (f"experiment={recipe}", f"outputs={tmp_path}", *FEWER, *RECIPES[recipe])
    for stage in ("fetch", "data_prep"):
        run(*shared, f"stage={stage}")
    with ThreadPoolExecutor() as pool:
        alone_, together = pool.map(lambda name: train_and_answer(recipe, tmp_path, name), RANKS)
    assert all(map(math.isfinite, alone_))
    assert together == pytest.approx(alone_, rel=BOUND)

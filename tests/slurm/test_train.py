"""slurm/train_*.sh on a real cluster: two nodes train together over gloo, stop, and go on."""

import json
import re
import sys

import pytest

from pipeline.runner import execute
from tests.pipeline.running import ROOT, composed, fresh_logger
from tests.pipeline.small_run import save_llama, save_text, small
from tests.slurm.cluster import wait_until

STEPS = 300
# A start takes some 20 seconds on two cores: the recipe's check, the pre-flight and the training
# each import torch, two processes at a time.
START = 150


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data and weights."""
    root = tmp_path_factory.mktemp("slurm")
    save_llama(root / "model")
    save_text(root / "text")
    with fresh_logger():
        for stage in ("fetch", "data_prep", "convert"):
            assert execute(composed(*small(root, root / "model", f"stage={stage}"))) == 0
    return root


def keys(root, *more):
    fixed = ("device=cpu", "wandb.mode=disabled", f"train.steps={STEPS}", "train.hang_seconds=60")
    often = ("train.save_every=100", "train.validate_every=100")
    world = ("parallel.nodes=2", "parallel.gpus_per_node=1")
    every = ("experiment=demo", *small(root, root / "model"), *fixed, *often, *world, *more)
    # Hydra's grammar has no quotes around keys.
    return [re.sub(r'"(\w+)":', r"\1:", key) for key in every]


def submitted(cluster, log, *arguments, nodes=2, script="slurm/train_7b.sh"):
    flags = (f"--nodes={nodes}", "--gpus-per-node=1", f"--output={log}")
    command = ("sbatch", "--parsable", *flags, script, *arguments)
    return cluster.run(*command, cwd=ROOT, VENV=sys.prefix).stdout.strip()


def train_steps(folder):
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [
        int(found[1]) for line in lines if (found := re.search(r'"train", "step": (\d+)', line))
    ]


def test_a_signal_saves_and_the_requeued_job_goes_on(cluster, root, tmp_path):
    log, run = tmp_path / "log", root / "outputs/small/told"
    job = submitted(cluster, log, *keys(root, "variant=told"))
    try:
        partial = run / "finetune.partial"
        wait_until(lambda: len(train_steps(partial)) >= 5, START, "five steps")
        # What --signal=B:USR1@600 does ten minutes before the end.
        cluster.run("scancel", "--signal=USR1", "--batch", job)
        wait_until(lambda: "to go on from step_" in log.read_text(), 60, "the requeue")
        saved = int((partial / "checkpoints/latest").read_text()[5:])
        assert 5 <= saved < STEPS
        ended = cluster.wait_for_job(job, START)
    finally:
        cluster.run("scancel", job, check=False)
        print(log.read_text() if log.exists() else "no log")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert f"continuing from step {saved}" in log.read_text()
    assert train_steps(run / "finetune") == list(range(1, STEPS + 1))
    starts = (run / "slurm/starts").read_text().splitlines()
    assert starts == [f"{job} none", f"{job} step_{saved:06d}"]
    lines = log.read_text().splitlines()
    assert sum(line.startswith("preflight: node node") for line in lines) == 4
    assert json.loads((run / "finetune/manifest.json").read_text())["counts"]["steps"] == STEPS


def test_a_world_that_is_not_the_recipes_is_refused_at_once(cluster, root, tmp_path):
    log = tmp_path / "log"
    job = submitted(cluster, log, *keys(root, "variant=one"), nodes=1)
    assert cluster.wait_for_job(job, START)["ExitCode"] == "2:0"
    told = "error: --nodes=1: the recipe has parallel.nodes=2; submit with --nodes=2"
    assert told in log.read_text()


def test_missing_data_names_the_line_to_run(cluster, root, tmp_path):
    log = tmp_path / "log"
    job = submitted(cluster, log, *keys(root, "data.seed=7", "variant=other"))
    assert cluster.wait_for_job(job, START)["ExitCode"] == "2:0"
    text = log.read_text()
    assert "stage data_prep is missing" in text
    assert "run slurm/chain.sh demo " in text and "data.seed=7" in text

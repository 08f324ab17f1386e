"""SIGKILL of a random rank at a random moment: the run goes on, and nothing is lost or doubled."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline.runner import execute
from tests.pipeline.running import ROOT, alone, composed, fresh_logger
from tests.pipeline.small_run import save_llama, save_text, small

# Steps of a run by how often it is killed.
STEPS = {1: 12, 20: 90}
LAYOUT = ("parallel.gpus_per_node=2", "parallel.zero_stage=2", "parallel.restarts=100")


FIXED = ("device=cpu", "wandb.mode=disabled", "train.hang_seconds=60")


def command(root, variant, steps):
    keys = small(root, root / "model", *LAYOUT, f"variant={variant}", "stage=finetune")
    # Hydra's grammar has no quotes around keys.
    keys = [re.sub(r'"(\w+)":', r"\1:", key) for key in keys]
    values = (f"train.steps={steps}", "train.save_every=3", "train.validate_every=30")
    run = [sys.executable, str(ROOT / "pipeline/run.py"), "experiment=tiny"]
    return [*run, *keys, *values, *FIXED]


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in lines if r["kind"] == "train"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data and weights."""
    root = tmp_path_factory.mktemp("kills")
    save_llama(root / "model")
    save_text(root / "text")
    with fresh_logger():
        for stage in ("fetch", "data_prep", "convert"):
            assert execute(composed(*small(root, root / "model", f"stage={stage}"))) == 0
    return root


def workers(parent: int) -> dict[int, int]:
    """Process ids of the ranks that `parent` runs."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            environment = (path.parent / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        ranks = [int(line[5:]) for line in environment if line.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(path.parent.name)
    return found


def newest(folder: Path) -> int:
    try:
        return int((folder / "checkpoints/latest").read_text()[5:])
    except FileNotFoundError:
        return 0


def recorded(folder: Path) -> int:
    """Steps in the record, which a killed rank may have left half a line of."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = [re.search(r'"train", "step": (\d+)', line) for line in lines]
    return max((int(found[1]) for found in steps if found), default=0)


def wait_for(condition, alive, timeout=60):
    """Whether the condition came true while the process lived."""
    until = time.monotonic() + timeout
    while time.monotonic() < until and alive.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def kill_one(process, folder, dice) -> tuple[int, bool] | None:
    """Kill a random rank some steps from now; (newest checkpoint before it, inside a save)."""
    target = recorded(folder) + dice.randint(1, 7)
    if not wait_for(lambda: recorded(folder) >= target, process):
        return None
    if dice.random() < 0.5:
        wait_for(lambda: any((folder / "checkpoints").glob("step_*.partial")), process, 5)
        time.sleep(dice.random() * 0.05)
    else:
        time.sleep(dice.random() * 0.3)
    ranks = workers(process.pid)
    if len(ranks) < 2 or process.poll() is not None:
        return None
    before = newest(folder)
    os.kill(ranks[dice.randrange(2)], signal.SIGKILL)
    return before, any((folder / "checkpoints").glob("step_*.partial"))


def _lives(printed: Path) -> int:
    """How often workers have begun."""
    return printed.read_text().count("to save and stop: touch")


def _another(printed: Path, life: int) -> bool:
    return _lives(printed) > life


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 20])
def test_killed_ranks_lose_and_double_nothing(root, kills, tmp_path):
    dice = random.Random(kills)
    whole, variant, steps = f"whole{kills}", f"killed{kills}", STEPS[kills]
    subprocess.run(command(root, whole, steps), cwd=ROOT, check=True, env=alone())
    folder = root / "outputs/small" / variant
    again = command(root, variant, steps)
    done, starts, printed = [], 0, tmp_path / "printed"
    with printed.open("w") as out:
        while not (folder / "finetune").exists():
            starts += 1
            assert starts <= kills + 2, printed.read_text()[-4000:]
            process = subprocess.Popen(
                again, cwd=ROOT, env=alone(), stdout=out, stderr=subprocess.STDOUT
            )
            while len(done) < kills and process.poll() is None:
                killed = kill_one(process, folder.joinpath("finetune.partial"), dice)
                if killed is None:
                    continue
                done.append(killed)
                wait_for(partial(_another, printed, _lives(printed)), process)
            process.wait(300)
    text = printed.read_text()
    assert len(done) == kills, text[-4000:]
    assert losses(folder / "finetune") == losses(root / f"outputs/small/{whole}/finetune")
    # Of each life: it began at the newest checkpoint, or one that became whole after this look.
    continued = [int(step) for step in re.findall(r"resume step=(\d+)", text)]
    befores = [before for before, _ in done if before]
    assert len(continued) == len(befores)
    assert all(step >= before for step, before in zip(continued, befores, strict=True))
    if kills > 1:
        assert sum(inside for _, inside in done) >= 3, done
    print(f"{kills} kills, {sum(inside for _, inside in done)} inside a save, {starts} starts")

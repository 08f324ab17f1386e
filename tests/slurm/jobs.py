"""What the tests of the scripts share: submitting, and reading what a run has left."""

import json
import runpy
import sys
from functools import cache
from pathlib import Path

from tests.pipeline.running import ROOT

STAND_IN = Path(__file__).with_name("stand_in.py")


@cache
def recipe_facts() -> str:
    """What slurm/recipe.py says of experiment demo on two nodes, for outputs OUTPUTS."""
    before = sys.path[:]
    facts = runpy.run_path(str(ROOT / "slurm/recipe.py"))["facts"]
    sys.path[:] = before
    keys = ("device=cpu", "parallel.nodes=2", "outputs=/OUTPUTS", "variant=VARIANT")
    found = facts(["experiment=demo", *keys])
    return "".join(f"{key}\t{'' if value is None else value}\n" for key, value in found.items())


def stand_in(folder: Path, outputs: Path, **settings: str) -> Path:
    """A VENV whose python is stand_in.py, with its settings."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
    python.chmod(0o755)
    (folder / "recipe.tsv").write_text(recipe_facts().replace("/OUTPUTS", str(outputs)))
    for name, value in settings.items():
        (folder / name).write_text(value)
    return folder


class Scripts:
    """The scripts of slurm/ on a cluster, with an environment for Python at `venv`."""

    def __init__(self, cluster, venv: Path, *keys: str) -> None:
        """`keys`: what every call is given beside its own."""
        self.cluster, self.venv, self.keys = cluster, venv, keys

    def run(self, script: str, *arguments: str):
        """chain.sh or status.sh of experiment demo, finished."""
        command = (f"slurm/{script}.sh", "demo", *self.keys, *arguments)
        return self.cluster.run(*command, cwd=ROOT, check=False, VENV=str(self.venv))

    def sbatch(self, log: Path, *keys: str, flags: tuple[str, ...] = ("--nodes=2",)) -> str:
        """The id of a training job of experiment demo without GPUs."""
        options = ("--parsable", "--gpus-per-node=0", f"--output={log}", *flags)
        given = ("experiment=demo", *self.keys, *keys)
        command = ("sbatch", *options, "slurm/train_7b.sh", *given)
        return self.cluster.run(*command, cwd=ROOT, VENV=str(self.venv)).stdout.strip()


def train_records(run: Path) -> list[dict]:
    """What a run has recorded of its steps, finished or not."""
    for folder in ("finetune", "finetune.partial"):
        path = run / folder / "metrics.jsonl"
        if path.exists():
            break
    else:
        return []
    records = []
    for line in path.read_text().splitlines():
        # Of a killed run, or one that writes just now.
        if line.endswith("}"):
            records.append(json.loads(line))
    return [record for record in records if record["kind"] == "train"]


def steps(run: Path) -> list[int]:
    """The steps of train_records()."""
    return [record["step"] for record in train_records(run)]


def saved(run: Path) -> int:
    """The step of the newest checkpoint of an unfinished run; 0 where there is none."""
    try:
        return int((run / "finetune.partial/checkpoints/latest").read_text()[5:])
    except FileNotFoundError:
        return 0


def text(path: Path) -> str:
    """What a log says so far."""
    return path.read_text() if path.exists() else ""

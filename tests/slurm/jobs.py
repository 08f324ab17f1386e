"""What the tests of the scripts share: submitting, and reading what a run has left."""

import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from pipeline.runner import execute
from tests.pipeline.running import ROOT, composed, fresh_logger
from tests.pipeline.small_run import save_llama, save_text, small
from tests.slurm.cluster import wait_until

# Nodes x GPUs.
TWO_NODES = "2x1"
# Looked at in a moment, as the demo's own source, Python's library, is not.
SOURCE = f"data.sources=[{{name: docs, path: {ROOT}/docs, format: text}}]"
STAND_IN = Path(__file__).with_name("stand_in.py")


@cache
def script_module(name: str) -> ModuleType:
    """slurm/NAME.py, imported: the folder is no package."""
    before = sys.path[:]
    spec = importlib.util.spec_from_file_location(f"slurm_{name}", ROOT / f"slurm/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@cache
def recipe_facts(world: str) -> str:
    """What slurm/recipe.py says of experiment tiny for outputs OUTPUTS; `world`: nodes x GPUs."""
    nodes, gpus = world.split("x")
    keys = ("device=cpu", "outputs=/OUTPUTS", "variant=VARIANT", "train.rows_per_step=64")
    keys += (f"parallel.nodes={nodes}", f"parallel.gpus_per_node={gpus}")
    every = ["experiment=tiny", SOURCE, *keys, "train.micro_batch_rows=1"]
    found = dict(script_module("recipe").facts(every))
    return "".join(f"{key}\t{'' if value is None else value}\n" for key, value in found.items())


def stand_in(folder: Path, outputs: Path, world: str = TWO_NODES, **settings: str) -> Path:
    """A VENV whose python is stand_in.py, with its settings."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
    python.chmod(0o755)
    (folder / "recipe.tsv").write_text(recipe_facts(world).replace("/OUTPUTS", str(outputs)))
    for name, value in settings.items():
        (folder / name).write_text(value)
    return folder


class Scripts:
    """The scripts of slurm/ on a cluster, with an environment for Python at `venv`."""

    def __init__(self, cluster, venv: Path, *keys: str) -> None:
        """`keys`: what every call is given beside its own."""
        self.cluster, self.venv, self.keys = cluster, venv, keys

    def run(self, script: str, *arguments: str, **env: str):
        """chain.sh or status.sh of experiment tiny, finished."""
        command = (f"slurm/{script}.sh", "tiny", *self.keys, *arguments)
        return self.cluster.run(*command, cwd=ROOT, check=False, VENV=str(self.venv), **env)

    def sbatch(self, log: Path, *keys: str, flags: tuple[str, ...] = ("--nodes=2",)) -> str:
        """The id of a training job of experiment tiny without GPUs."""
        options = ("--parsable", "--gpus-per-node=0", f"--output={log}", *flags)
        given = ("experiment=tiny", *self.keys, *keys)
        command = ("sbatch", *options, "slurm/train_7b.sh", *given)
        return self.cluster.run(*command, cwd=ROOT, VENV=str(self.venv)).stdout.strip()


def small_run(root: Path) -> list[str]:
    """Make data and weights of tests/pipeline/small_run.py in `root`; keys for two nodes."""
    save_llama(root / "model")
    save_text(root / "text")
    keys = small(root, root / "model")
    with fresh_logger():
        for stage in ("fetch", "data_prep", "convert"):
            assert execute(composed(*keys, f"stage={stage}")) == 0
    # Hydra's grammar has no quotes around keys.
    keys = [re.sub(r'"(\w+)":', r"\1:", key) for key in keys]
    world = ("parallel.nodes=2", "parallel.gpus_per_node=1", "device=cpu")
    return [*keys, *world, "train.hang_seconds=60"]


def rank_processes(job: str) -> dict[int, int]:
    """Process ids of a job's ranks that train."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"pipeline/run.py" not in words[1:2]
            or b"SLURM_JOB_ID=" + job.encode() not in environment
        ):
            continue
        found |= {int(v[5:]): int(path.name) for v in environment if v.startswith(b"RANK=")}
    return found


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


class Training:
    """A training of a variant of small_run() that scripts have submitted."""

    def __init__(self, scripts: Scripts, root: Path, variant: str) -> None:
        self.cluster, self.log = scripts.cluster, root / f"{variant}.log"
        self.run = root / "outputs/small" / variant
        self.id = scripts.sbatch(self.log, f"variant={variant}")

    def reach(self, step: int, seconds: float) -> None:
        """Wait until that step is recorded."""
        wait_until(lambda: step in steps(self.run), seconds, f"step {step}\n{text(self.log)}")

    def losses(self, seconds: float) -> list[tuple]:
        """Of the finished run, by step."""
        ended = self.cluster.wait_for_job(self.id, seconds)
        assert ended["JobState"] == "COMPLETED", text(self.log)
        return [(r["step"], r["loss"], r["grad_norm"]) for r in train_records(self.run)]

    def restarts(self) -> int:
        """How often Slurm has started it again."""
        return int(self.cluster.job(self.id)["Restarts"])

"""The sbatch scripts are read by bash, and what they ask for is what the recipes need."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from model.cost import parameters
from pipeline.runner import Runner
from pipeline.schema import section_shape
from pipeline.validation import parse
from tests.pipeline.running import ROOT
from tests.slurm.jobs import SOURCE, Scripts, script_module, stand_in

SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch")])
TRAIN = {"slurm/train_7b.sh": "llama2_7b_128k", "slurm/train_70b.sh": "llama2_70b_128k"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(path):
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) <= 100


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_is_content():
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("script", "experiment"), TRAIN.items())
def test_a_script_asks_for_its_recipes_world(script, experiment):
    text = (ROOT / script).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.M))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        parallel = compose("config", overrides=[f"experiment={experiment}"]).parallel
    assert int(asked["nodes"]) == parallel.nodes
    assert int(asked["gpus-per-node"]) == parallel.gpus_per_node
    assert asked["job-name"] == experiment and f"train_job {experiment} " in text
    assert (asked["signal"], asked["output"]) == ("B:USR1@600", "%x-%j.out")
    assert not {"account", "partition", "time"} & set(asked)


@pytest.mark.parametrize("script", [*TRAIN, "slurm/stage.sbatch"])
def test_off_slurm_it_says_how_to_run_here(script):
    done = subprocess.run(
        ["bash", script, "export"] if "stage" in script else ["bash", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "this is no Slurm job" in done.stderr and "pipeline/run.py" in done.stderr


def facts(keys):
    return dict(script_module("recipe").facts(keys))


def test_recipe_tells_states_and_the_room_for_checkpoints(tmp_path):
    keys = ["experiment=tiny", SOURCE, f"outputs={tmp_path}", "train.keep_last=3"]
    found = facts(keys)
    assert found["run"] == tmp_path / "tiny/main" and found["stages"].split()[0] == "fetch"
    assert found["finetune.inputs"] == "data_prep convert"
    states = {key: found[key] for key in ("convert.state", "export.state")}
    assert states == {"convert.state": "missing", "export.state": "missing"}
    # Masters and two moments in fp32 of every parameter, three kept and one being written.
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        shape = section_shape(compose("config", ["experiment=tiny"]).model)
    assert found["checkpoint_room"] == 4 * 12 * parameters(shape)
    for stage in ("convert", "export"):
        folder = found[f"{stage}.folder"]
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"id": folder.name}))
    # A shared folder's name is its id; the export was made by another configuration.
    again = facts(keys)
    assert (again["convert.state"], again["export.state"]) == ("done", "changed")
    assert "evaluate.shards" not in again
    forced = facts([*keys, "force=true", "cluster.evaluate_shards=2"])
    assert (forced["convert.state"], forced["evaluate.left"]) == ("missing", "1 2")


def test_recipe_tells_which_parts_are_missing(tmp_path):
    keys = ["experiment=tiny", SOURCE, f"outputs={tmp_path}"]
    folders = {}
    for stage, section in (("data_prep", "data"), ("evaluate", "eval")):
        # As the job of a part calls it.
        second = [*keys, f"stage={stage}", f"{section}.shard=2/3"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            runner = Runner(parse(compose("config", overrides=second)))
        folders[stage] = runner.folder(stage)
        folders[stage].mkdir(parents=True)
        manifest = json.dumps({"id": runner.wanted(stage)[2]})
        (folders[stage] / "manifest.json").write_text(manifest)
    shards = ("cluster.data_shards=3", "cluster.evaluate_shards=3")
    found = facts([*keys, *shards])
    for stage in folders:
        assert (found[f"{stage}.shards"], found[f"{stage}.left"]) == (3, "1 3")
    (folders["evaluate"] / "manifest.json").write_text(json.dumps({"id": "another's"}))
    found = facts([*keys, *shards])
    changed = found["evaluate.state"], found["evaluate.folder"]
    assert changed == ("changed", folders["evaluate"])


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("train.steps=0", "error: train.steps=0: must be at least 1"),
        ("train.stepz=1", "error: Could not override 'train.stepz'"),
        ("cluster=gone", "error: In 'config': Could not find 'cluster/gone'"),
        ("cluster.evaluate_gpus=-1", "error: cluster.evaluate_gpus=-1: must be at least 0"),
    ],
)
def test_recipe_refuses_what_the_entry_refuses(key, told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "experiment=tiny", key])
    assert script_module("recipe").main() == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(told)
    # What does not need the part that is wrong can be checked too.
    assert "cluster.partition\t\n" in printed.out or "Could not" in told


@pytest.mark.parametrize("script", TRAIN)
def test_64_nodes_of_8_gpus_would_take_it(large, script):
    """Slurm itself says what it would do; it refuses what these nodes never have."""

    def tried(*flags):
        return large.run("sbatch", "--test-only", *flags, script, check=False, cwd=ROOT)

    taken = tried()
    assert taken.returncode == 0 and "to start at" in taken.stderr, taken.stderr
    nodes = "node1 in" if "7b" in script else "node[1-8] in"
    assert f"on nodes {nodes} partition batch" in taken.stderr
    assert tried("--nodes=64").returncode == 0
    assert tried("--nodes=65").returncode
    assert tried("--gpus-per-node=9").returncode


def test_the_resolved_command_line_of_70b_is_shown_and_taken(large, tmp_path):
    venv = stand_in(tmp_path / "venv", tmp_path / "outputs", world="8x8")
    done = Scripts(large, venv).run("chain", "--dry-run", "device=cuda")
    (line,) = re.findall(r"^finetune=\$\(sbatch (.*)\)$", done.stdout, flags=re.M)
    flags = [word for word in line.split(" slurm/")[0].split() if "dependency" not in word]
    flags.remove("--parsable")
    assert {"--nodes=8", "--gpus-per-node=8"} <= set(flags)
    taken = large.run("sbatch", "--test-only", *flags, "slurm/train_70b.sh", cwd=ROOT)
    assert "on nodes node[1-8]" in taken.stderr

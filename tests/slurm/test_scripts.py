"""The sbatch scripts are read by bash, and what they ask for is what the recipes need."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tests.pipeline.running import ROOT
from tests.slurm.cluster import Cluster, why_not

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


@pytest.fixture(scope="module")
def large():
    """64 GPUs, pretended: 8 nodes of 8."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    started = Cluster(folder, nodes=8, cpus=64)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder)


@pytest.mark.parametrize("script", TRAIN)
def test_a_large_cluster_would_take_it(large, script):
    tried = large.run("sbatch", "--test-only", script, check=False, cwd=ROOT)
    assert tried.returncode == 0, tried.stderr
    assert "to start at" in tried.stderr
    more = large.run("sbatch", "--test-only", "--nodes=9", script, check=False, cwd=ROOT)
    assert more.returncode
    bigger = large.run("sbatch", "--test-only", "--gpus-per-node=9", script, check=False, cwd=ROOT)
    assert bigger.returncode

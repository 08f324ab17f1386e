"""What a user or a site can have wrong: refused at submit, or in the job's first seconds."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.pipeline.running import ROOT
from tests.slurm.jobs import Scripts, stand_in, text

SOON = 60
# What the scripts call beside bash and Slurm.
TOOLS = ("bash", "basename", "cat", "date", "dirname", "hostname", "id", "mkdir", "tr")
GONE = "cluster.container_image=/gone.sqsh"


@pytest.fixture
def scripts(cluster, tmp_path):
    venv = stand_in(tmp_path / "venv", tmp_path / "outputs", steps="2")
    return Scripts(cluster, venv)


def refused(done) -> str:
    """The only line of a script that ended with 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny", "more"], "more: one experiment at a time, and tiny is named"),
        (
            ["tiny", "--nodes=3"],
            "--nodes=3: the only flag is --dry-run; what sbatch is to be given",
        ),
        (
            ["tiny", "stage=export"],
            "stage=export: a chain has all stages; for one: sbatch slurm/st",
        ),
        (
            ["train.steps=3"],
            "no experiment: slurm/chain.sh EXPERIMENT [--dry-run] [key=value ...],",
        ),
        (
            ["tiny", "cluster.partition=gone"],
            "partition gone: this cluster has batch grace high ; set cl",
        ),
        (
            ["tiny", "cluster.partition=batch,gone"],
            "partition gone: this cluster has batch grace high",
        ),
        (["tiny", GONE], "cluster.container_image=/gone.sqsh: is not there; it must be an image"),
        (
            ["tiny", "cluster.container_image=site#image"],
            "cluster.container_image=site#image: this",
        ),
    ],
)
def test_chain_refuses(cluster, scripts, words, told):
    command = ("slurm/chain.sh", *words)
    done = cluster.run(*command, cwd=ROOT, check=False, VENV=str(scripts.venv))
    assert refused(done).startswith(told)
    assert not cluster.run("squeue", "-h").stdout


def test_a_recipe_that_fails_does_not_hide_an_unknown_partition(cluster, scripts):
    (scripts.venv / "fails").write_text("recipe")
    both = scripts.run("chain", "cluster.partition=gone").stderr
    assert "recipe fails, as told" in both and "error: partition gone: this cluster" in both
    assert refused(scripts.run("chain", "--dry-run")) == "recipe fails, as told"


def test_the_environments_partition_is_checked_as_well(cluster, scripts):
    keys = {"VENV": str(scripts.venv), "SBATCH_PARTITION": "gone"}
    done = cluster.run("slurm/chain.sh", "tiny", cwd=ROOT, check=False, **keys)
    assert refused(done).startswith("partition gone")


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused(cluster, tmp_path, where):
    done = Scripts(cluster, stand_in(tmp_path / "venv", Path(where))).run("chain")
    assert "cannot be written by root" in refused(done)
    assert "set outputs=OTHER_FOLDER" in done.stderr


def test_what_another_configuration_made_is_refused(cluster, scripts, tmp_path):
    folder = tmp_path / "outputs/tiny/main/export"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"changed": True}))
    assert "choose variant=NAME to keep it, or force=true" in refused(scripts.run("chain"))


def test_without_slurm_it_says_how_to_run_here(scripts, tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in TOOLS:
        (bare / tool).symlink_to(
            next(p for p in ("/usr/bin", "/bin") if Path(p, tool).exists()) + f"/{tool}"
        )
    done = subprocess.run(
        ["bash", "slurm/chain.sh", "tiny", "train.steps=3"],
        cwd=ROOT,
        env={"PATH": str(bare), "VENV": str(scripts.venv)},
        capture_output=True,
        text=True,
    )
    line = refused(done)
    assert line.startswith("sbatch: not found, so this is no Slurm cluster; run on this machine:")
    assert line.endswith("pipeline/run.py experiment=tiny train.steps=3")


def test_without_a_python_it_names_make(cluster, tmp_path):
    done = Scripts(cluster, tmp_path / "gone").run("chain")
    assert refused(done).endswith(f"run make setup in {ROOT}, or set VENV")


def test_sbatch_from_another_folder_is_told(cluster, tmp_path):
    for script in ("train_7b.sh", "train_70b.sh", "stage.sbatch"):
        log = tmp_path / script
        command = ("sbatch", "--parsable", f"--output={log}", "--nodes=1", "--gpus-per-node=0")
        job = cluster.run(*command, str(ROOT / "slurm" / script), "export", cwd=tmp_path)
        assert cluster.wait_for_job(job.stdout.strip(), SOON)["ExitCode"] == "2:0"
        assert text(log).startswith(f"error: {tmp_path}: is not the repository; cd into it")


def test_a_job_whose_world_or_inputs_do_not_fit_ends_at_once(cluster, scripts, tmp_path):
    told = {
        ("--nodes=1",): "error: --nodes=1: the recipe has parallel.nodes=2; submit with --nodes=2",
        ("--nodes=2", "device=cuda"): "error: --gpus-per-node=0: the recipe has parallel.gpus_per_",
        ("--nodes=2",): "stage data_prep is missing; it must be done before training; run slurm/ch",
        ("--nodes=2", GONE): "error: cluster.container_image=/gone.sqsh: is not there",
    }
    jobs = {}
    for number, words in enumerate(told):
        if GONE in words:
            for stage in ("data_prep", "convert"):
                finish(scripts, stage)
        flags = tuple(word for word in words if word.startswith("--"))
        keys = tuple(word for word in words if word not in flags)
        log = tmp_path / f"log{number}"
        job = scripts.sbatch(log, *keys, flags=flags)
        assert cluster.wait_for_job(job, SOON)["ExitCode"] == "2:0", text(log)
        jobs[words] = text(log)
    assert all(line in jobs[words] for words, line in told.items()), jobs
    assert "slurm/chain.sh tiny" in jobs[("--nodes=2",)]
    assert not (tmp_path / "outputs/tiny/main/slurm/failures").exists()


def finish(scripts, stage):
    """Let a stage of the stand-in be done."""
    command = (scripts.venv / "bin/python", "pipeline/run.py", f"stage={stage}")
    subprocess.run(command, cwd=ROOT, check=True)


def test_pyxis_flags_reach_srun(cluster, scripts, tmp_path):
    """No pyxis here: an srun before the true one in PATH has its flags, and says what it got."""
    for stage in ("data_prep", "convert"):
        finish(scripts, stage)
    image, srun = tmp_path / "image.sqsh", tmp_path / "bin/srun"
    image.touch()
    srun.parent.mkdir()
    srun.write_text(
        '#!/bin/sh\n[ "$1" != --help ] || exec echo --container-image\necho "srun $*"\n'
    )
    srun.chmod(0o755)
    path = f"{srun.parent}{os.pathsep}{cluster.env['PATH']}"
    keys = ("experiment=tiny", f"cluster.container_image={image}", "cluster.container_mounts=/d:/d")
    flags = ("--parsable", "--nodes=2", "--gpus-per-node=0", f"--output={tmp_path}/log")
    command = ("sbatch", *flags, "slurm/train_7b.sh", *keys)
    job = cluster.run(*command, cwd=ROOT, VENV=str(scripts.venv), PATH=path).stdout.strip()
    assert cluster.wait_for_job(job, SOON)["JobState"] == "COMPLETED", text(tmp_path / "log")
    (line,) = (line for line in text(tmp_path / "log").splitlines() if line.startswith("srun "))
    outputs = tmp_path / "outputs"
    mounts = f"{ROOT}:{ROOT},{outputs}:{outputs},/d:/d"
    wanted = f"--container-image={image} --container-workdir={ROOT} --container-mounts={mounts}"
    assert wanted in line and "slurm/launch.py --nnodes=2" in line

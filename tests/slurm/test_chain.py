"""slurm/chain.sh and status.sh on a real cluster: what is left of a run, in order.

With a stand-in for the stages; with the true ones in the test at the end.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.jobs import Scripts, rank_processes, small_run, stand_in, steps, text

STAGES = ("fetch", "data_prep", "convert", "finetune", "export", "evaluate", "report")
JOBS = STAGES[1:]
SOON = 60
# Of one stage with the true Python: some ten seconds, on idle cores.
STAGE = 400


@pytest.fixture
def scripts(cluster, tmp_path):
    """The scripts with a stand-in whose training takes 8 steps."""
    venv = stand_in(tmp_path / "venv", tmp_path / "outputs", steps="8", save_every="4")
    yield Scripts(cluster, venv)
    cluster.run("scancel", "--user=root")
    wait_until(lambda: not cluster.run("squeue", "-h").stdout, SOON, "the queue is empty")
    for log in sorted((tmp_path / "outputs").glob("**/*.out")):
        print(f"== {log.name}\n{text(log)}")


def job_ids(printed: str) -> dict[str, str]:
    """{stage: job} of what chain.sh says that it has submitted."""
    return dict(re.findall(r" (\w+): job (\d+)\b(?! is)", printed))


def ends(cluster, jobs: dict[str, str], seconds: float = SOON) -> dict[str, str]:
    """{stage: how Slurm says that its job has ended}."""
    return {s: cluster.wait_for_job(job, seconds)["JobState"] for s, job in jobs.items()}


def dry_lines(printed: str) -> dict[str, str]:
    """{stage: what sbatch is given} of what chain.sh --dry-run prints."""
    return dict(re.findall(r"^(\w+)=\$\(sbatch (.*)\)$", printed, flags=re.M))


def test_a_dry_run_shows_every_line_and_submits_nothing(cluster, scripts, tmp_path):
    done = scripts.run("chain", "--dry-run", "train.lr=0.1", "cluster.partition=batch")
    assert done.returncode == 0, done.stderr
    lines = dry_lines(done.stdout)
    assert tuple(lines) == JOBS
    assert all(line.endswith(" train.lr=0.1 cluster.partition=batch") for line in lines.values())
    assert all("--partition=batch" in line for line in lines.values())
    assert "--dependency=afterok:${data_prep}:${convert} " in lines["finetune"]
    assert "--nodes=2" in lines["finetune"] and "slurm/train_70b.sh" in lines["finetune"]
    assert all("--kill-on-invalid-dep=yes" in lines[stage] for stage in JOBS[2:])
    assert "slurm/stage.sbatch export" in lines["export"]
    assert not (tmp_path / "outputs").exists() and not cluster.run("squeue", "-h").stdout


def test_gpus_and_account_are_asked_for_where_they_are_wanted(scripts):
    keys = ("device=auto", "cluster.account=us", "cluster.train_time=1-00:00:00")
    done = scripts.run("chain", "--dry-run", *keys)
    lines = dry_lines(done.stdout)
    asked = {s: re.findall(r"--gpus-per-node=(\d+)", line) for s, line in lines.items()}
    nothing = {stage: [] for stage in JOBS}
    assert asked == nothing | {"finetune": ["1"], "evaluate": ["1"]}
    assert all("--account=us" in line for line in lines.values())
    assert [stage for stage in JOBS if "--time=1-00:00:00" in lines[stage]] == ["finetune"]


def test_a_dry_run_is_a_script_that_gives_sbatch_the_same_words(cluster, tmp_path):
    """Whatever is in them; that what Hydra reads as one value stays one word."""
    outputs = tmp_path / "out puts"
    scripts = Scripts(cluster, stand_in(tmp_path / "venv", outputs))
    keys = ("generate.prompt='a, \\\"b\\\" $HOME'", "data.sources=[{name: mine, path: 'x y'}]")
    script = scripts.run("chain", "--dry-run", *keys).stdout
    record = 'n=0; sbatch() { printf "%s\\n" "$@" >&3; n=$((n + 1)); echo "$RANDOM"; }'
    with (tmp_path / "words").open("w") as words:
        command = f"exec 3>&{words.fileno()}; set -eu; {record}\n{script}"
        kept = (words.fileno(),)
        subprocess.run(["bash", "-c", command], check=True, pass_fds=kept, timeout=SOON)
    given = text(tmp_path / "words").splitlines()
    assert given.count("--parsable") == len(JOBS)
    assert all(given.count(key) == len(JOBS) for key in keys)
    assert f"--output={outputs}/tiny/main/slurm/%x-%j.out" in given
    # The stand-in has "fetched": that line runs too.
    assert re.search(r"^\S+python pipeline/run.py stage=fetch ", script, flags=re.M)


def test_a_stage_has_the_cores_that_a_node_has_and_data_workers_count_more(scripts):
    for key, cores in (("", "16"), ("cluster.stage_cpus=4", "4"), ("cluster.stage_cpus=64", "16")):
        lines = dry_lines(scripts.run("chain", "--dry-run", *filter(None, [key])).stdout)
        asked = {s: re.findall(r"--cpus-per-task=(\d+)", line) for s, line in lines.items()}
        assert asked == {s: [] if s == "finetune" else [cores] for s in JOBS}


def test_a_failed_stage_cancels_what_follows_and_the_chain_goes_on_once_mended(
    cluster, scripts, tmp_path
):
    (scripts.venv / "fails").write_text("convert")
    jobs = job_ids(scripts.run("chain").stdout)
    assert tuple(jobs) == JOBS
    ended = ends(cluster, jobs)
    assert (ended["data_prep"], ended["convert"]) == ("COMPLETED", "FAILED")
    assert {ended[stage] for stage in JOBS[2:]} == {"CANCELLED"}
    status = scripts.run("status").stdout
    assert re.search(r"convert +missing, job \d+ FAILED NonZeroExitCode", status), status
    (scripts.venv / "fails").unlink()
    # Called in an allocation (salloc), of which srun in the jobs must see nothing.
    outer = {"SLURM_GPUS_PER_NODE": "3", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "1"}
    mended = scripts.run("chain", **outer).stdout
    assert "data_prep: done" in mended
    assert tuple(job_ids(mended)) == JOBS[1:]
    assert set(ends(cluster, job_ids(mended)).values()) == {"COMPLETED"}
    status = scripts.run("status").stdout
    assert status.count(" done\n") == len(STAGES)
    assert "step 8 of" in status
    # Two controls, at once: what is shared is there, and neither sees the other's run.
    both = [job_ids(scripts.run("chain", f"variant={name}").stdout) for name in ("a", "b")]
    for name, jobs in zip("ab", both, strict=True):
        assert tuple(jobs) == JOBS[2:]
        assert set(ends(cluster, jobs).values()) == {"COMPLETED"}
        run = tmp_path / "outputs/tiny" / name
        assert steps(run) == list(range(1, 9))
        logs = sorted(path.name.rsplit("-", 1)[0] for path in run.glob("slurm/*.out"))
        assert logs == sorted(f"tiny-{name}-{stage}" for stage in JOBS[2:])


def test_nothing_is_submitted_twice(cluster, scripts):
    (scripts.venv / "holds").write_text("data_prep convert")
    first = job_ids(scripts.run("chain").stdout)
    again = scripts.run("chain").stdout
    assert not job_ids(again) and again.count("is in the queue") == len(JOBS), again
    # A control waits for the jobs that make what both need.
    control = scripts.run("chain", "variant=control").stdout
    assert all(f"{stage}: job {first[stage]} is in the queue" in control for stage in JOBS[:2])
    assert tuple(job_ids(control)) == JOBS[2:]
    assert f"after {first['data_prep']}:{first['convert']}" in control
    (scripts.venv / "holds").unlink()
    assert set(ends(cluster, job_ids(control)).values()) == {"COMPLETED"}


def logs_of(run: Path, stage: str) -> int:
    """How many tasks of the stage's arrays have run."""
    return len(list(run.glob(f"slurm/tiny-main-{stage}_parts-*_*.out")))


def test_an_array_makes_the_parts_and_what_fails_alone_is_made_again(cluster, scripts, tmp_path):
    keys = ("cluster.data_shards=2", "cluster.evaluate_shards=3", "cluster.at_once=2")
    shown = scripts.run("chain", "--dry-run", *keys).stdout
    lines = dry_lines(shown)
    assert set(lines) == {*JOBS, "data_prep_parts", "evaluate_parts"}
    assert "--array=1,2%2 slurm/stage.sbatch data_prep/2 " in lines["data_prep_parts"]
    assert "--array=1,2,3%2 --dependency" in lines["evaluate_parts"]
    assert " slurm/stage.sbatch evaluate/3 " in lines["evaluate_parts"]
    parts = "${data_prep_parts}_1:${data_prep_parts}_2"
    assert f"--dependency=afterok:{parts} --kill-on-invalid-dep=yes " in lines["data_prep"]
    assert "afterok:${data_prep}:${export} " in lines["evaluate_parts"]
    assert "afterok:${data_prep}:${export}:${evaluate_parts}_1:" in lines["evaluate"]

    run = tmp_path / "outputs/tiny/main"
    (scripts.venv / "fails").write_text("evaluate/2")
    (scripts.venv / "holds").write_text("evaluate/3")
    jobs = job_ids(scripts.run("chain", *keys).stdout)
    for stage in ("data_prep", "finetune"):
        assert cluster.wait_for_job(jobs[stage], SOON)["JobState"] == "COMPLETED"
    parts = jobs["evaluate_parts"]
    assert cluster.wait_for_job(f"{parts}_2", SOON)["JobState"] == "FAILED"
    assert {ends(cluster, jobs)[stage] for stage in ("evaluate", "report")} == {"CANCELLED"}
    assert "parts missing: 2 3 of 3" in scripts.run("status", *keys).stdout
    # The third still runs: the second alone is made again.
    (scripts.venv / "fails").unlink()
    mended = scripts.run("chain", *keys).stdout
    again = job_ids(mended)
    assert set(again) == {"evaluate_parts", "evaluate", "report"} and "finetune: done" in mended
    both = f"{parts}_3:{again['evaluate_parts']}_2"
    assert f"evaluate: job {again['evaluate']} after {both}\n" in mended
    (scripts.venv / "holds").unlink()
    assert set(ends(cluster, again).values()) == {"COMPLETED"}
    assert (logs_of(run, "data_prep"), logs_of(run, "evaluate")) == (2, 4)
    assert all((run / f"evaluate_{n}of3/manifest.json").exists() for n in (1, 2, 3))


def rewrite(path: Path, data: bytes) -> None:
    """With the times as they were: a disk that reads wrongly, and not another model."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_true_stages_on_two_nodes(cluster, tmp_path):
    keys = small_run(tmp_path)
    scripts = Scripts(cluster, Path(sys.prefix), *keys, "wandb.mode=disabled", "train.steps=6")
    shutil.rmtree(tmp_path / "outputs")
    weights = tmp_path / "model/model.safetensors"
    whole = weights.read_bytes()
    rewrite(weights, bytes(8) + whole[8:])
    first = scripts.run("chain")
    ended = ends(cluster, job_ids(first.stdout), STAGE)
    assert (ended["data_prep"], ended["convert"]) == ("COMPLETED", "FAILED"), first.stderr
    assert {ended[stage] for stage in JOBS[2:]} == {"CANCELLED"}
    rewrite(weights, whole)
    mended = scripts.run("chain").stdout
    # A control beside it: what is shared is made once.
    keys = ("variant=control", "schedule.full=all", "cluster.evaluate_shards=2")
    control = scripts.run("chain", *keys).stdout
    assert tuple(job_ids(mended)) == JOBS[1:] and "data_prep: done" in control
    assert set(job_ids(control)) == {"finetune", "export", "evaluate_parts", "evaluate", "report"}
    trained = job_ids(mended)["finetune"]
    wait_until(lambda: len(rank_processes(trained)) == 2, 2 * STAGE, "two ranks")
    for jobs in (job_ids(mended), job_ids(control)):
        jobs.pop("evaluate_parts", None)
        assert set(ends(cluster, jobs, 6 * STAGE).values()) == {"COMPLETED"}
    for variant in ("main", "control"):
        run = tmp_path / "outputs/small" / variant
        assert steps(run) == list(range(1, 7)) and (run / "report/index.html").exists()
    schedules = [
        json.loads((tmp_path / f"outputs/small/{v}/finetune/manifest.json").read_text())["counts"]
        for v in ("main", "control")
    ]
    assert [counts["schedule"] for counts in schedules] == ["S1 F1", "F2"]
    status = scripts.run("status").stdout
    assert status.count(" done\n") == len(STAGES) and "step 6 of 6" in status

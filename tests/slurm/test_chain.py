"""slurm/chain.sh and status.sh on a real cluster: what is left of a run, in order."""

import sys

from tests.pipeline.running import ROOT
from tests.slurm.test_train import START, keys, root  # noqa: F401


def script(cluster, name, *arguments):
    return cluster.run(f"slurm/{name}.sh", *arguments, cwd=ROOT, check=False, VENV=sys.prefix)


def chain_keys(root):  # noqa: F811
    """One node: the rest of the chain after data_prep and convert."""
    # The first key is experiment=demo, which chain.sh takes as a word.
    return keys(root, "variant=chain", "train.steps=4")[1:]


def submitted(run):
    """{stage: job id} as chain.sh has noted it."""
    lines = (run / "slurm/jobs.tsv").read_text().splitlines()
    return {line.split("\t")[0]: line.split("\t")[1] for line in lines}


def test_a_dry_run_submits_nothing(cluster, root):  # noqa: F811
    done = script(cluster, "chain", "demo", "--dry-run", *chain_keys(root))
    assert done.returncode == 0, done.stderr
    assert "convert: done" in done.stdout and "--dependency=afterok:<finetune>" in done.stdout
    assert not (root / "outputs/small/chain").exists()
    assert not cluster.run("squeue", "-h").stdout


def test_an_unknown_partition_is_refused(cluster, root):  # noqa: F811
    done = script(cluster, "chain", "demo", "cluster.partition=gone", *chain_keys(root))
    assert done.returncode == 2
    assert "error: partition gone: this cluster has batch high" in done.stderr


def test_a_chain_runs_to_its_report(cluster, root):  # noqa: F811
    run = root / "outputs/small/chain"
    first = script(cluster, "chain", "demo", *chain_keys(root))
    assert first.returncode == 0, first.stdout + first.stderr
    jobs = submitted(run)
    assert list(jobs) == ["finetune", "export", "evaluate", "report"]
    again = script(cluster, "chain", "demo", *chain_keys(root))
    assert again.stdout.count("is in the queue") == 4 and submitted(run) == jobs
    try:
        for job in jobs.values():
            assert cluster.wait_for_job(job, START)["JobState"] == "COMPLETED"
    finally:
        cluster.run("scancel", *jobs.values(), check=False)
        for log in sorted(run.glob("slurm/*.out")):
            print(f"== {log.name}\n{log.read_text()}")
    assert (run / "report/index.html").exists()
    status = script(cluster, "status", "demo", *chain_keys(root)).stdout
    assert status.count(" done\n") == 7 and "step 4 of 4, 0.0 hours" in status

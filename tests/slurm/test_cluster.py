"""The cluster that the other tests need: several nodes, chains, and nothing left behind."""


def submitted(cluster, folder, *arguments) -> str:
    output = f"--output={folder}/out"
    done = cluster.run("sbatch", "--parsable", output, *arguments, cwd=folder)
    return done.stdout.strip()


def test_a_job_runs_on_two_nodes(cluster, tmp_path):
    wrapped = "--wrap=srun bash -c 'echo $SLURM_NODEID $(hostname)'"
    job = submitted(cluster, tmp_path, "--nodes=2", "--ntasks-per-node=1", wrapped)
    assert cluster.wait_for_job(job, 30)["JobState"] == "COMPLETED"
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["0 node1", "1 node2"]


def test_a_job_waits_for_another_and_is_cancelled_with_it(cluster, tmp_path):
    fails = submitted(cluster, tmp_path, "--wrap=exit 3")
    keys = (f"--dependency=afterok:{fails}", "--kill-on-invalid-dep=yes", "--wrap=true")
    follows = submitted(cluster, tmp_path, *keys)
    assert cluster.wait_for_job(fails, 30)["ExitCode"] == "3:0"
    assert cluster.wait_for_job(follows, 30)["JobState"] == "CANCELLED"

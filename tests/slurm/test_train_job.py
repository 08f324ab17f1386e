"""slurm/train_*.sh on a real cluster, with a stand-in that trains in seconds: what stops, goes on.

That the true training goes on with the same losses: test_survival.py.
"""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.conftest import running
from tests.slurm.jobs import TWO_NODES, Scripts, recipe_facts, saved, stand_in, steps, text

# Seconds for what the cluster does within five, unless others use this machine as well.
SOON = 60


class Job:
    """A submitted training: its run's folder, log and id."""

    def __init__(
        self, cluster, folder: Path, flags: tuple[str, ...] = ("--nodes=2",), **settings: str
    ) -> None:
        """`flags`: of sbatch; `settings`: of the stand-in."""
        self.cluster, self.log = cluster, folder / "log"
        self.venv = stand_in(folder / "venv", folder / "outputs", **settings)
        for stage in ("fetch", "data_prep", "convert"):
            self._finished(stage)
        self.run = folder / "outputs/tiny/main"
        self.id = Scripts(cluster, self.venv).sbatch(self.log, flags=flags)

    def _finished(self, stage: str) -> None:
        for line in (self.venv / "recipe.tsv").read_text().splitlines():
            key, _, value = line.partition("\t")
            if key == f"{stage}.folder":
                Path(value).mkdir(parents=True)
                (Path(value) / "manifest.json").write_text("{}")

    def reach(self, step: int) -> None:
        """Wait until a step is recorded."""
        wait_until(lambda: step in steps(self.run), SOON, f"step {step}\n{text(self.log)}")

    def end(self, seconds: float = SOON) -> dict[str, str]:
        """What Slurm says of it once it is over."""
        return self.cluster.wait_for_job(self.id, seconds)

    def starts(self) -> list[str]:
        """The checkpoint of each start."""
        return re.findall(r" start \d+, from (\S+)$", text(self.log), flags=re.M)

    def ranks(self) -> list[int]:
        """Process ids of the stand-in's agents, of all nodes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if len(words) > 2 and str(self.venv / "bin/python").encode() in words[2:4]:
                found += [int(path.parent.name)] if b"stage=finetune" in words else []
        return found


def check_whole(job: Job, restarts: int) -> None:
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(restarts)), text(job.log)
    assert steps(job.run) == list(range(1, 61))


def told_to_stop(train):
    job = train(save_every="")
    job.reach(5)
    # What --signal=B:USR1@600 does ten minutes before the end.
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    wait_until(lambda: "to go on from step_" in text(job.log), SOON, "the requeue")
    at = saved(job.run)
    assert 5 <= at < 60
    check_whole(job, restarts=1)
    assert job.starts() == ["none", f"step_{at:06d}"]


def stopped_by_hand(train):
    job = train()
    job.reach(15)
    (job.run / "finetune.partial/stop").touch()
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    assert f"saved as step_{saved(job.run):06d}; the same sbatch line" in text(job.log)
    assert saved(job.run) >= 15


def a_rank_is_killed(train):
    job = train()
    job.reach(15)
    first = job.ranks()
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)
    check_whole(job, restarts=0)
    # A busy machine may have reached the next checkpoint before the kill.
    first, second = job.starts()
    assert first == "none" and second >= "step_000010"
    assert f"training failed, and starts again from {second}" in text(job.log)


def it_always_fails(train):
    job = train(fails="finetune")
    assert job.end()["ExitCode"] == "2:0"
    assert f"error: job {job.id}: failed 3 times at checkpoint none" in text(job.log)
    assert text(job.log).count("finetune fails, as told") >= 3


def requeued_again_and_again(train):
    """Before the first checkpoint, which is nobody's failure."""
    job = train(save_every="")
    for number in range(4):
        wait_until(lambda n=number: len(job.starts()) == n + 1, SOON, f"start {number + 1}")
        job.cluster.run("scontrol", "requeue", job.id)
    check_whole(job, restarts=4)
    assert not (job.run / "slurm/failures").exists()


def told_before_it_trains(train):
    """While the recipe is read, which takes seconds."""
    # As SBATCH_EXPORT, which holds for srun in the job as well.
    job = train(holds="recipe", flags=("--nodes=2", "--time=14", "--export=VENV"))
    wait_until(lambda: (job.venv / "reads").exists(), SOON, "the recipe is read")
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    (job.venv / "holds").write_text("")
    check_whole(job, restarts=1)
    assert "asked to stop" in text(job.log) and job.starts() == ["none"]
    assert re.search(r"warning: the time limit ends this job in 1\d minutes", text(job.log))


def preempt(job):
    """Wait until a job of another partition has had this job's nodes."""
    nodes = job.cluster.job(job.id)["NodeList"]
    urgent = ("--partition=high", "--nodes=2", f"--nodelist={nodes}", "--output=/dev/null")
    other = job.cluster.run("sbatch", "--parsable", *urgent, "--wrap=sleep 1", cwd=job.run)
    ended = job.cluster.wait_for_job(other.stdout.strip(), SOON)
    assert ended["JobState"] == "COMPLETED"


def check_saved_when_preempted(job):
    """At the step's edge, for there is no other checkpoint; and no failure is counted."""
    check_whole(job, restarts=1)
    first, second = job.starts()
    assert first == "none" and "step_000015" <= second < "step_000060"
    assert not (job.run / "slurm/failures").exists()


def preempted(train):
    """All processes and the batch shell get SIGTERM, KillWait seconds before SIGKILL."""
    job = train(save_every="")
    job.reach(15)
    preempt(job)
    check_saved_when_preempted(job)
    assert "Slurm ends this job: saved is step_" in text(job.log)


def preempted_with_grace(train):
    """The steps get SIGTERM, the batch shell nothing; the job is Slurm's only GraceTime later."""
    job = train(save_every="", flags=("--nodes=2", "--partition=grace"))
    job.reach(15)
    preempt(job)
    check_saved_when_preempted(job)
    assert "back into the queue, to go on from step_" in text(job.log)


def a_node_is_lost(train):
    job = train()
    job.reach(15)
    last = re.fullmatch(r"node\[\d+-(\d+)\]", job.cluster.job(job.id)["NodeList"])[1]
    job.cluster.kill_node(f"node{last}")
    # What Slurm does by itself after SlurmdTimeout; test_survival.py waits for it.
    down = ("scontrol", "update", f"nodename=node{last}", "state=down", "reason=lost")
    job.cluster.run(*down)
    check_whole(job, restarts=1)
    assert len(job.starts()) == 2 and job.starts()[1] >= "step_000010"


SCENARIOS = (
    told_to_stop,
    told_before_it_trains,
    stopped_by_hand,
    a_rank_is_killed,
    it_always_fails,
    requeued_again_and_again,
    preempted,
    preempted_with_grace,
    a_node_is_lost,
)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All at once, for they mostly wait: two nodes each, and one more for that which is lost."""
    # Hydra cannot compose in several threads.
    recipe_facts(TWO_NODES)
    shape = {"nodes": 2 * len(SCENARIOS) + 1}
    with running(**shape) as cluster, ThreadPoolExecutor(len(SCENARIOS)) as pool:

        def submit_later(name):
            folder = tmp_path_factory.mktemp(name)
            fixed = {"steps": "60", "save_every": "10"}
            return lambda **settings: Job(cluster, folder, **fixed | settings)

        yield {f: pool.submit(f, submit_later(f.__name__)) for f in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_job_ends_well_or_says_why(jobs, scenario):
    jobs[scenario].result()

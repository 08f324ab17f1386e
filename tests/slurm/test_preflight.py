"""slurm/launch.py and preflight.py: what a rank lacks is told with its node; else work begins."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.pipeline.running import ROOT, alone
from tests.slurm.jobs import script_module

GOOD = {
    "torch": "2",
    "python": "3",
    "gpu": "H100",
    "driver": "5",
    "in node": 4e11,
    "together": 5e10,
    "unseen": [],
}
# Joins a process group of its own over the launcher's store: nothing of the pre-flight is left.
WORK = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.ones(1)
dist.all_reduce(value)
# In one write, since two ranks share the output.
sys.stdout.write(f"work {sys.argv[1:]} {value.item()}\\n")
sys.stdout.flush()
# Python's exit would race with the group's threads.
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def preflight():
    return script_module("preflight")


@pytest.fixture
def rank(monkeypatch):
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)


def test_ranks_check_and_then_work(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "work.py").write_text(WORK)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    check = ("slurm/preflight.py", str(tmp_path / "run"), "cpu", "1", "20", "1")
    done = subprocess.run(
        [*torchrun, *check, str(tmp_path / "work.py"), "a=1"],
        cwd=ROOT,
        env=alone() | {"SLURMD_NODENAME": "n7", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("work ['a=1'] 2.0") == 2
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("preflight:"))
    assert f"node n7, torch {torch.__version__}" in line and " GB/s, together " in line
    assert not any((tmp_path / "run").iterdir())


def test_a_rank_that_lacks_something_ends_and_names_its_node(preflight, rank, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "NODE", "n7")
    # Where nothing can be written, and with what would otherwise become this process.
    monkeypatch.setattr(sys, "argv", ["preflight.py", "/proc", "cpu", "1", "20", "1", "work.py"])
    assert preflight.main() == 1
    printed = capsys.readouterr().out
    assert printed.startswith("preflight: error: n7, rank 0: [Errno") and "/proc/" in printed


def test_checkpoints_that_are_there_take_no_more_room(preflight, rank, tmp_path, monkeypatch):
    saved = tmp_path / "finetune.partial/checkpoints/step_000001"
    saved.mkdir(parents=True)
    usage = preflight.shutil._ntuple_diskusage(2**40, 2**40 - 10**10, 10**10)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(preflight.Unfit, match="10.0 GB free, the run's checkpoints take 10.0"):
        preflight.check_disks(tmp_path, 10**10 + 100)
    (saved / "a").write_bytes(bytes(100))
    assert preflight.check_disks(tmp_path, 10**10 + 100) == 10**10


def test_a_full_disk_of_the_node_is_told(preflight, rank, tmp_path, monkeypatch):
    usage = preflight.shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(preflight.Unfit, match="less than 1 GB free; clean it, or set TMPDIR"):
        preflight.check_disks(tmp_path, 1)


def test_a_run_that_cannot_be_written_is_told(preflight, rank):
    with pytest.raises(OSError, match="/proc/"):
        preflight.check_disks(Path("/proc"), 1)


def test_a_missing_gpu_is_told_with_the_node(preflight, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    remedy = f"shows 7 CUDA GPUs, 8 are wanted; submit with --exclude={preflight.NODE}"
    with pytest.raises(preflight.Unfit, match=remedy):
        preflight.check_gpu(0, 8)


def ranks(**changed):
    """Two nodes of two ranks, of which the last is changed."""
    return [GOOD | {"node": node} for node in ("n1", "n1", "n2")] + [
        GOOD | {"node": "n2"} | changed
    ]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"driver": "4"}, "n2: driver 4, but 5 on n1; all must be alike: submit with --exclude=n2"),
        ({"torch": "1"}, "n2: torch 1, but 2 on n1"),
        ({"gpu": "A100"}, "n2: gpu A100, but H100 on n1"),
        (
            {"unseen": [0, 1]},
            "n2: does not see what n1 wrote into the run's folder, which",
        ),
        ({"in node": 3e9}, "n2: 3.0 GB/s between its ranks, 20 at least; submit with --exclude=n2"),
    ],
)
def test_a_node_that_differs_is_named(preflight, changed, told):
    (line,) = preflight.faults(ranks(**changed), 20e9, 1e9)
    assert line.startswith(told)


def test_alike_nodes_have_no_faults_and_a_slow_network_is_everyones(preflight):
    assert preflight.faults(ranks(), 20e9, 1e9) == []
    slow = [rank | {"together": 1e8, "in node": 3e9} for rank in ranks()]
    *_, line = preflight.faults(slow, 20e9, 1e9)
    assert "where there is no faster one, set cluster.min_gbps" in line
    # As machines with PCIe alone are.
    assert preflight.faults(slow, 2e9, 1e7) == []
    assert line.startswith("all nodes: 0.1 GB/s, 1 at least; NCCL may have taken the wrong network")


def test_gloo_that_finds_no_network_is_told(preflight, tmp_path, monkeypatch):
    """Saves and votes to stop use it; NCCL, which is tried too, has a network of its own."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "0"}
    for key, value in environment.items() | {("MASTER_ADDR", "127.0.0.1")}:
        monkeypatch.setenv(key, value)
    joined = []
    monkeypatch.setattr(preflight, "rendezvous", lambda *_, **__: iter([(HashStore(), 0, 1)]))
    monkeypatch.setattr(
        preflight.dist, "init_process_group", lambda *words, **_: joined.append(words)
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")

    def new_group(**_):
        raise RuntimeError("Unable to find address for: nothing0")

    monkeypatch.setattr(preflight.dist, "new_group", new_group)
    with pytest.raises(preflight.Unfit, match=r"gloo.*GLOO_SOCKET_IFNAME.*address for: nothing0"):
        preflight.meet({}, "cuda", tmp_path)
    assert joined == [("nccl",)]


def test_marks_of_ranks_on_another_disk_are_not_seen(preflight, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SEEN_WITHIN", 0.1)
    marks = [tmp_path / name for name in "abc"]
    marks[1].touch()
    assert preflight.unseen(marks) == [0, 2]
    marks[0].touch(), marks[2].touch()
    assert preflight.unseen(marks) == []


def test_what_hangs_is_ended_and_named(preflight, rank, capsys, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(preflight.os, "_exit", lambda code: ended.set())
    with preflight.at_most(0.01, "a sum over all ranks"):
        assert ended.wait(30)
    told = f"preflight: error: {preflight.NODE}, rank 0: a sum over all ranks: not done in 0.01 s"
    assert capsys.readouterr().out.startswith(told)
    ended.clear()
    with preflight.at_most(0.05, "a quick one"):
        pass
    assert not ended.wait(0.2)


@pytest.mark.parametrize(
    ("codes", "ends_with", "said"),
    [
        ({}, 0, []),
        # By SIGTERM, by the file `stop`: saved, and nothing that torchrun should call a failure.
        ({0: 143, 1: 143}, 0, []),
        ({0: 75}, 0, []),
        ({0: 143, 5: -9}, 1, ["launch: n7: rank 5 failed with exit code -9"]),
        # Before there was anything to save.
        ({1: -15}, 1, ["launch: n7: rank 1 failed with exit code -15"]),
    ],
)
def test_ranks_that_saved_and_stopped_are_no_failure(monkeypatch, capsys, codes, ends_with, said):
    launch, given = script_module("launch"), []

    def run(arguments):
        given.append((arguments.rdzv_conf, arguments.signals_to_handle))
        # torchrun has no say in what SIGTERM, which Slurm sends to all, ends.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        if codes:
            failures = {rank: ProcessFailure(0, 1, code, "") for rank, code in codes.items()}
            raise ChildFailedError("preflight.py", failures)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(sys, "argv", ["launch.py", "--rdzv-conf=join_timeout=9", "preflight.py"])
    try:
        assert launch.main() == ends_with
    finally:
        signal.signal(signal.SIGTERM, before)
    assert given == [("is_host=1,join_timeout=9", "SIGINT,SIGHUP,SIGQUIT")]
    assert capsys.readouterr().out.splitlines() == said

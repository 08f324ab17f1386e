"""Processes of one stage: started, watched, stopped, restarted, and never left behind."""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from pipeline import runner, stage_folders, workers
from pipeline.console_log import log_to_terminal
from pipeline.schema import CHAIN
from pipeline.workers import WorkersEnded, run_once, run_workers
from tests.pipeline.running import ROOT, WORLD, composed, fresh_logger

# A worker without torch, which starts in no time: `act` with its rank, and the folder to write in.
LIGHT = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), sys.argv[1]
def note(name, text=""):
    with open(f"{folder}/{name}.partial", "w") as file:
        file.write(str(text))
    os.replace(f"{folder}/{name}.partial", f"{folder}/{name}")
note(f"pid_{os.getpid()}")
"""
SAVES = """
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while rank and not os.path.exists(f"{folder}/ready_{rank - 1}"):
    time.sleep(0.01)
note(f"ready_{rank}")
while not stop:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]) * rank)
note(f"saved_{rank}")
sys.exit(143)
"""
# A whole run whose stages are fakes: `finetune` joins gloo and does what generate.prompt says.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from pipeline import runner, stage_folders
from pipeline.manifest import StageError, StageStopped
from pipeline.training.guards import StopRequest
from tests.pipeline.running import composed
torch.set_num_threads(1)
INPUTS = {"finetune": ("convert",), "export": ("finetune",)}

def finetune(context):
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    total = torch.ones(())
    torch.distributed.all_reduce(total)
    (context.out / f"rank_{rank}.json").write_text(json.dumps({
        "total": total.item(), "inputs": str(context.folder("convert")), "pid": os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"], "variant": context.config.variant,
        "force": context.config.force, "seed": context.config.train.seed, "stage":
        context.config.stage, "sources": [s.path for s in context.config.data.sources]}))
    context.log.info("trains")
    context.log.warning("take care")
    act = context.config.generate.prompt
    if act == "refuse":
        raise StageError("step 1: the loss is nan")
    if act == "wait":
        speak = lambda: rank or context.log.warning("saving after this step")
        with StopRequest(context.out / "stop", speak) as stop:
            (context.out / f"waits_{rank}").write_text("")
            while not stop.wanted():
                time.sleep(0.02)
        (context.out / f"saved_{rank}").write_text("")
        raise StageStopped(signal.SIGTERM)
    latest = context.out / "checkpoints/latest"
    if act == "kill_1" and not latest.exists():
        torch.distributed.barrier()
        if rank == 0:
            latest.parent.mkdir()
            latest.write_text("step_000001\\n")
        torch.distributed.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    # Whoever lags must still find the folder.
    time.sleep(0.5 * rank)
    torch.distributed.all_reduce(total)
    (context.out / f"late_{rank}").write_text("")
    return {"rank": rank, "continued": latest.exists()}

def module(stage):
    return SimpleNamespace(
        INPUTS=INPUTS.get(stage, ()), RESUMABLE=True, DISTRIBUTED=stage == "finetune",
        depends_on=lambda config: {},
        run=finetune if stage == "finetune" else lambda context: {"stage": stage},
    )

if __name__ == "__main__":
    stage_folders.stage_module = module
    # As with Hydra, the last of equal keys counts.
    sys.exit(runner.execute(composed(*sys.argv[1:]), sys.argv))
"""


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    """A Layout of this process alone leaves a launcher's environment behind."""
    for key in (*WORLD, "OMP_NUM_THREADS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(workers, "GRACE", 0.3)
    handlers = {number: signal.getsignal(number) for number in workers.TAKEN}
    yield
    assert handlers == {number: signal.getsignal(number) for number in workers.TAKEN}


def light(folder: Path, act: str, *more) -> list[str]:
    return ["-S", "-c", LIGHT + act, str(folder), *map(str, more)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for whoever reaps orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def told(pid: int) -> str:
    """What is known of a process that should be gone: its state and where in the kernel it is."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text() + Path(f"/proc/{pid}/wchan").read_text()
    return f"{pid}, ended meanwhile"


def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "never came"
        time.sleep(0.02)


def gone(processes):
    end = time.monotonic() + 3
    while left := [told(pid) for pid in processes if alive(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.02)


def pids(folder):
    return [int(path.name.removeprefix("pid_")) for path in folder.glob("pid_*[0-9]")]


def ended(folder, act, *more, size=2) -> WorkersEnded:
    with pytest.raises(WorkersEnded) as error:
        run_once(light(folder, act, *more), size)
    gone(pids(folder))
    return error.value


def after(folder, names, *signals):
    """Send this process signals, one after the other, once the workers have left these files."""

    def send():
        for name, number in zip(names, signals, strict=True):
            until(lambda name=name: (folder / name).exists())
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_workers_that_end_well(tmp_path):
    act = "note('world_' + os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'])"
    assert run_once(light(tmp_path, act), 3) is None
    assert [(tmp_path / f"world_{rank}").read_text() for rank in range(3)] == ["3"] * 3


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL (is the host out of memory?)"),
        ("os.kill(os.getpid(), 11)", "rank 1 was killed by SIGSEGV"),
        ("sys.exit(1)", "rank 1 failed with exit code 1"),
        ("os._exit(70)", "rank 1 was ended by its hang watchdog (exit code 70)"),
    ],
)
def test_who_died_of_what_and_the_others_are_closed(tmp_path, act, said):
    """Also one that SIGTERM does not end."""
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if "9" in act else ""
    wait = f"note('deaf'); time.sleep(60)\nwhile not os.path.exists(folder + '/deaf'): pass\n{act}"
    started = time.monotonic()
    assert run_once(light(tmp_path, f"{deaf}if rank == 0: {wait}"), 2) == said
    assert time.monotonic() - started < 10
    assert len(pids(tmp_path)) == 2
    gone(pids(tmp_path))


def test_a_rank_that_was_killed_is_the_cause_and_not_who_missed_it(tmp_path):
    """Not the user's error either that a save without that rank amounts to."""
    act = "os.kill(os.getpid(), 9) if rank == 2 else sys.exit(2)"
    assert run_once(light(tmp_path, act), 3).startswith("rank 2 was killed by SIGKILL")
    act = "os.abort() if rank == 0 else sys.exit(2)"
    assert run_once(light(tmp_path, act), 2) == "rank 0 was killed by SIGABRT"


def test_children_of_a_dead_worker_are_gone(tmp_path):
    act = (
        "child = os.fork()\nif not child: note(f'pid_{os.getpid()}'); time.sleep(60)\n"
        "while len(os.listdir(folder)) < 4: time.sleep(0.01)\nos.kill(os.getpid(), 9)"
    )
    assert "SIGKILL" in run_once(light(tmp_path, act), 2)
    assert len(pids(tmp_path)) == 4
    gone(pids(tmp_path))


@pytest.mark.parametrize("code", [2, 75, 143, 130])
def test_a_users_error_and_a_stop_by_request_are_final(tmp_path, code):
    error = ended(tmp_path, f"sys.exit({code})")
    assert error.exit_code == code and str(error) == ""
    if code in workers.STOPPED:
        left = "os.path.exists(folder + '/left')"
        dies = f"while not {left}: time.sleep(0.01)\nos.kill(os.getpid(), 9)"
        error = ended(tmp_path, f"if rank: note('left'); sys.exit({code})\n{dies}")
        assert error.exit_code == code and "rank 0 was killed by SIGKILL" in str(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_get_sigterm_and_the_time_they_need_to_save(tmp_path, number):
    thread = after(tmp_path, ["ready_1", "ready_1"], number, signal.SIGTERM)
    # Longer than what workers have that are to be closed.
    slow = 3 * workers.GRACE
    error = ended(tmp_path, SAVES, slow)
    thread.join()
    assert error.exit_code == 128 + number and str(error) == ""
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_ctrl_c_after_a_signal_ends_workers_at_once(tmp_path):
    hold = "import threading\nthreading.Timer(0.3, note, ['asked']).start()"
    act = SAVES.replace("time.sleep(float", f"{hold}\ntime.sleep(60 + float")
    thread = after(tmp_path, ["ready_1", "asked"], signal.SIGINT, signal.SIGINT)
    started = time.monotonic()
    error = ended(tmp_path, act, 0)
    thread.join()
    assert error.exit_code == 130 and str(error) == "interrupted"
    assert time.monotonic() - started < 10 and not (tmp_path / "saved_0").exists()


def test_stopped_before_there_is_anything_to_save(tmp_path):
    thread = after(tmp_path, ["ready_1"], signal.SIGTERM)
    error = ended(tmp_path, "note(f'ready_{rank}'); time.sleep(60)")
    thread.join()
    assert error.exit_code == 143
    assert str(error) == "stopped by SIGTERM"


def test_stopped_while_workers_start(tmp_path, monkeypatch):
    """torchrun's process manager has handlers of its own until they are replaced."""

    def start(*arguments):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise workers.SignalException("", signal.SIGTERM)

    monkeypatch.setattr(workers, "_start", start)
    error = ended(tmp_path, "")
    assert error.exit_code == 143
    assert str(error) == "stopped by SIGTERM"


def test_a_rank_that_dies_while_others_save_is_told(tmp_path):
    # Rank 1 is the last to listen; a signal before that would end it otherwise.
    thread = after(tmp_path, ["ready_1"], signal.SIGTERM)
    dies = "if rank: os.kill(os.getpid(), 9)\nelse: time.sleep(60)\n"
    error = ended(tmp_path, SAVES.replace("time.sleep(float", f"{dies}time.sleep(float"), 0)
    thread.join()
    assert error.exit_code == 143
    assert str(error).startswith("rank 1 was killed by SIGKILL")
    assert str(error).endswith("; stopped by SIGTERM")


def restarted(folder, act, restarts=3, finished=lambda: False):
    latest = folder / "latest"
    run_workers(
        light(folder, act),
        2,
        restarts,
        reached=lambda: latest.read_text() if latest.exists() else None,
        finished=finished,
    )


# Saves one more checkpoint at each start, and ends well at the fifth.
ADVANCES = """
last = folder + "/latest"
step = int(open(last).read()) + 1 if os.path.exists(last) else 1
# Both have read before one writes.
note(f"{os.getpid()}.read")
while sum(name.endswith(".read") for name in os.listdir(folder)) < 2 * step: time.sleep(0.01)
if rank:
    note("latest", step)
    os.kill(os.getpid(), 9 if step < 5 else 0)
else:
    while not os.path.exists(last) or int(open(last).read()) < step: time.sleep(0.01)
"""

# Rank 1 fails, once both have started.
FAILS = """
note(f"{os.getpid()}.read")
while sum(name.endswith(".read") for name in os.listdir(folder)) < 2: time.sleep(0.01)
sys.exit(rank)
"""


def test_a_failed_run_starts_again_while_it_advances(tmp_path, capsys, monkeypatch):
    with fresh_logger():
        log_to_terminal("stdout")
        restarted(tmp_path, ADVANCES, restarts=4)
    lines = capsys.readouterr().out.splitlines()
    killed = "rank 1 was killed by SIGKILL (is the host out of memory?)"
    assert [line.partition(" ")[2] for line in lines] == [
        f"{killed}; all workers start again from {n}, restart {n} of 4" for n in (1, 2, 3, 4)
    ]
    assert (tmp_path / "latest").read_text() == "5" and len(pids(tmp_path)) == 10


def test_restarts_have_a_number(tmp_path):
    with pytest.raises(WorkersEnded, match="not restarted after 2 restarts") as error:
        restarted(tmp_path, ADVANCES, restarts=2)
    assert error.value.exit_code == 1 and len(pids(tmp_path)) == 6
    with pytest.raises(WorkersEnded, match="after 0 restarts"):
        restarted(tmp_path, ADVANCES, restarts=0)


def test_what_fails_without_progress_is_given_up(tmp_path):
    (tmp_path / "latest").write_text("7")
    with pytest.raises(WorkersEnded, match="not restarted, for no checkpoint was written") as error:
        restarted(tmp_path, FAILS)
    assert str(error.value).startswith("rank 1 failed with exit code 1; ")
    assert error.value.exit_code == 1 and len(pids(tmp_path)) == 2


def test_a_rank_that_fails_after_the_end_costs_nothing(tmp_path, capsys):
    with fresh_logger():
        log_to_terminal("stdout")
        restarted(tmp_path, FAILS, finished=lambda: True)
    assert "rank 1 failed with exit code 1, after the stage was done" in capsys.readouterr().out
    assert len(pids(tmp_path)) == 2


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A script that is a whole run, here too; and the keys and folders of this test's."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(stage_folders, "stage_module", runpy.run_path(str(script))["module"])
    keys = [f"outputs={tmp_path}/o", "name=demo", "variant=x", "parallel.gpus_per_node=2"]
    run = tmp_path / "o/demo/x"
    return SimpleNamespace(script=str(script), keys=keys, run=run, partial=run / "finetune.partial")


def whole(at, capfd, *keys, arguments=None) -> tuple[int, list[str]]:
    """(exit code, lines of this process and its workers) of a run in this process."""
    keys = [*at.keys, *keys]
    capfd.readouterr()
    with fresh_logger():
        code = runner.execute(composed(*keys), arguments or [at.script, *keys])
    out, err = capfd.readouterr()
    assert "Traceback" not in err, err
    return code, [line.partition(" ")[2] for line in out.splitlines()]


def test_a_chain_whose_finetune_has_two_processes_one_of_which_is_killed(at, capfd, monkeypatch):
    """Started again it continues, though forced; and the chain goes on."""
    # So that rank 0 can say what it missed.
    monkeypatch.setattr(workers, "GRACE", 10)
    keys = ["train.seed=7", 'data.sources=[{name: a, path: "b c"}]', "generate.prompt=kill_1"]
    code, lines = whole(at, capfd, "stage=chain", "force=true", *keys)
    assert code == 0, lines
    starts = [line for line in lines if line.endswith(": starts")]
    twice = [stage for stage in CHAIN for _ in range(1 + (stage == "finetune"))]
    assert starts == [f"{stage}: starts" for stage in twice]
    assert lines.count("finetune: starting 2 processes") == 1
    assert lines.count("continuing what an earlier run left") == 1
    killed = "rank 1 was killed by SIGKILL (is the host out of memory?)"
    assert f"{killed}; all workers start again from step_000001, restart 1 of 3" in lines
    (missed,) = [line for line in lines if line.endswith(" (rank 1 failed first)")]
    assert missed.startswith("rank 0: RuntimeError: ")
    # Rank 0 speaks for both, in each of the two starts.
    assert lines.count("trains") == lines.count("take care") == 2
    manifest = json.loads((at.run / "finetune/manifest.json").read_text())
    assert manifest["counts"] == {"rank": 0, "continued": True}
    for rank in (0, 1):
        told = json.loads((at.run / f"finetune/rank_{rank}.json").read_text())
        assert told["total"] == 2 and told["threads"] == "1"
        assert (told["variant"], told["force"], told["seed"]) == ("x", True, 7)
        assert told["stage"] == "finetune" and told["sources"] == ["b c"]
        assert (at.run / f"finetune/late_{rank}").exists()
    code, lines = whole(at, capfd, "stage=chain", *keys, arguments=["/no/such/script"])
    assert code == 0 and "starting 2" not in " ".join(lines)
    assert f"finetune: up to date, skipped ({at.run}/finetune)" in lines


def test_no_worker_outlives_its_parent_and_the_same_command_goes_on(at, capfd):
    whole(at, capfd, "stage=convert")
    keys = ["stage=finetune", "generate.prompt=wait"]
    parent = subprocess.Popen([sys.executable, at.script, *at.keys, *keys])
    waits = [at.partial / f"waits_{rank}" for rank in (0, 1)]
    until(lambda: all(path.exists() for path in waits), 60)
    told = [json.loads((at.partial / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    running = [one["pid"] for one in told]
    assert all(map(alive, running))
    parent.kill()
    parent.wait()
    gone(running)
    waits[1].unlink()
    after(at.partial, ["waits_1"], signal.SIGTERM)
    code, lines = whole(at, capfd, *keys)
    assert code == 143, lines
    assert lines.count("saving after this step") == 1
    assert "continuing what an earlier run left" in lines
    assert lines[-1] == "stopped by SIGTERM after a save; the same command continues"
    assert (at.partial / "saved_0").exists() and (at.partial / "saved_1").exists()


def test_torchrun_starts_the_same_workers_and_they_say_an_error_once(at, capfd):
    whole(at, capfd, "stage=convert")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", at.script]
    command = [sys.executable, *launch, *at.keys, "stage=finetune", "generate.prompt=refuse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "(exitcode: 2)" in done.stderr, done.stderr
    lines = [line.partition(" ")[2] for line in done.stdout.splitlines()]
    assert lines.count("finetune: starts") == 1
    assert [line for line in lines if "error" in line] == ["error: step 1: the loss is nan"]
    assert at.partial.exists() and not (at.run / "finetune").exists()
    assert json.loads((at.partial / "rank_1.json").read_text())["total"] == 2


def test_run_py_says_how_to_start_the_same_run(monkeypatch, tmp_path):
    """With every key, and another configuration folder and name."""
    seen = []
    monkeypatch.setattr(runner, "execute", lambda *told: seen.append(told) or 0)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    script = str(ROOT / "pipeline/run.py")

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", list(arguments))
        runpy.run_path(arguments[0], run_name="__main__")
        composed, again = seen.pop()
        return OmegaConf.to_container(composed), again

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nname: mine\n")
    keys = ["experiment=mine", "variant=x", "force=true", 'data.sources=[{name: a, path: "b c"}]']
    monkeypatch.chdir(tmp_path)
    first, again = start(script, "--config-dir", ".", *keys, "stage=chain", "hydra.verbose=false")
    assert first["name"] == "mine" and first["force"] is True
    assert first["data"]["sources"] == [{"name": "a", "path": "b c"}]
    second, _ = start(*again, "stage=finetune")
    assert second == {**first, "stage": "finetune"}
    # Read by OpenMP as it is loaded, here and in workers.
    assert os.environ["GOMP_SPINCOUNT"] == "2000"

"""The watchdog in processes of its own: it ends them."""

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

from pipeline.training.watchdog import EXIT_CODE

ROOT = Path(__file__).resolve().parents[2]
# What every process below starts with; `tell` writes another rank's record.
PRELUDE = """
import json, logging, sys, threading, time
from pathlib import Path
from pipeline.training import watchdog
from pipeline.training.watchdog import Watchdog

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
folder = Path(sys.argv[1])

class Dictionary(dict):
    # A store of one process, with torch.distributed.Store's interface.
    clone = lambda self: self
    set = lambda self, key, value: self.update({key: value.encode()})
    get = lambda self, key: self[key]
    check = lambda self, keys: all(key in self for key in keys)
    multi_get = lambda self, keys: [self[key] for key in keys]

def tell(store, rank, told, **changes):
    record = dict(count=1, what="step 7", age=0.1, limit=60.0, where="there (x.py:1)", told=told)
    store.set(f"{watchdog.PREFIX}/{rank}", json.dumps(record | changes))

def asleep(seconds):
    time.sleep(seconds)
"""


def start(folder, body, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body, str(folder), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, seconds=60):
    """(exit code, what was logged, stderr); a process that does not end by itself fails."""
    try:
        logged, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, logged, errors


def run(folder, body):
    return end(start(folder, body))


def run_all(folder, bodies):
    """Side by side, each in a folder of its own."""
    processes = [start(folder / str(index), body) for index, body in enumerate(bodies)]
    return [end(process) for process in processes]


RANK_OF_TWO = """
import torch, torch.distributed as dist
rank = int(sys.argv[2])
dist.init_process_group("gloo")
with Watchdog(2.0, rank, 2, dist.distributed_c10d._get_default_store(), folder) as watch:
    for step in (1, 2):
        watch.beat(f"step {step}: forward 1")
        if (step, rank) == (2, 1):
            asleep(60)
        # Rank 0 is not late: it ends because it is told.
        watch.beat(f"step {step}: backward 1", allowance=60)
        dist.all_reduce(torch.ones(3))
"""


def test_a_hang_names_the_rank_behind_and_ends_every_rank(tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [start(tmp_path, RANK_OF_TWO, rank, RANK=str(rank), **world) for rank in (0, 1)]
    ended = [end(process) for process in ranks]
    assert [code for code, _, _ in ended] == [EXIT_CODE, EXIT_CODE]
    for rank, (_, logged, errors) in enumerate(ended):
        assert 'the run hangs: behind: rank 1 at "step 2: forward 1" for ' in logged
        assert " s, in asleep (<string>:" in logged
        stacks = (tmp_path / f"hang_rank_{rank}.txt").read_text()
        # Where each main thread stood, in the file and on the terminal.
        for text in (stacks, errors):
            assert f"Stacks of rank {rank}, at " in text
            assert " in asleep" in text if rank else " in all_reduce" in text
    assert "rank 0 ends with code 70" in ended[0][1]


def test_a_run_that_beats_is_left_alone(tmp_path):
    code, logged, errors = run(
        tmp_path,
        """
with Watchdog(0.8, 0, 2, Dictionary(), folder) as watch:
    for step in range(10):
        watch.beat(f"step {step}")
        time.sleep(0.1)
    watch.beat("compiles", allowance=60)
    time.sleep(1.1)
    watch.beat("end")
    time.sleep(0.1)
assert threading.active_count() == 1
time.sleep(1.7)
""",
    )
    assert (code, logged, errors) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_longer_allowance_is_for_one_beat(tmp_path):
    code, logged, _ = run(
        tmp_path,
        """
watch = Watchdog(0.4, 0, 1, None, folder)
with watch:
    watch.beat("compiles", allowance=60)
# Entered again, it watches again.
with watch:
    watch.beat("step 1")
    asleep(30)
""",
    )
    assert code == EXIT_CODE
    assert 'ERROR rank 0: the run hangs: it stands at "step 1" for ' in logged


def test_no_timeout_watches_nothing(tmp_path):
    code, logged, errors = run(
        tmp_path,
        """
with Watchdog(0, 0, 2, Dictionary(), folder) as watch:
    watch.beat("step 1", allowance=1)
    assert threading.active_count() == 1
    time.sleep(0.5)
""",
    )
    assert (code, logged, errors) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# Rank 1, as rank 0 finds it in the store while it waits; `told` grows with every look.
OTHER = """
store = Dictionary()
stop = threading.Event()
def other():
    told = 0
    while not stop.wait(0.02):
        told += 1
        {tell}
threading.Thread(target=other, daemon=True).start()
with Watchdog({timeout}, 0, 2, store, folder) as watch:
    watch.beat("step 7")
    watch.beat("step 8")
    asleep({seconds})
stop.set()
"""


def test_a_rank_that_is_not_ahead_may_use_its_own_time(tmp_path):
    tells = [f"tell(store, 1, told, count={count})" for count in (1, 3)]
    bodies = [OTHER.format(tell=tell, timeout=1.0, seconds=1.5) for tell in tells]
    assert run_all(tmp_path, bodies) == [(0, "", "")] * 2


def test_who_is_behind(tmp_path):
    says = {
        "tell(store, 1, told, age=61.0)": 'behind: rank 1 at "step 7" for 61.0 s, in there',
        "tell(store, 1, 0)": 'behind: rank 1 no longer answering, last at "step 7" for 0.1 s',
        "tell(store, 1, told, count=4)": 'behind: rank 0 at "step 8" for ',
        "tell(store, 1, told, count=3, age=61.0)": "no rank is behind the others: rank 0 at ",
        "pass": "behind: rank 1 not heard of since the start",
    }
    bodies = [OTHER.format(tell=tell, timeout=1.0, seconds=30) for tell in says]
    ended = run_all(tmp_path, bodies)
    for said, (code, logged, _) in zip(says.values(), ended, strict=True):
        assert code == EXIT_CODE
        assert f"rank 0: the run hangs: {said}" in logged


def test_many_ranks_are_counted(tmp_path):
    _, logged, _ = run(
        tmp_path,
        """
with Watchdog(0.4, 0, 32, Dictionary(), folder):
    asleep(30)
""",
    )
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 23 more not heard of since" in logged


def test_every_rank_ends_when_one_says_that_the_run_hangs(tmp_path):
    code, logged, _ = run(
        tmp_path,
        """
store = Dictionary()
store.set(watchdog.HANG_KEY, "of a run before this one")
with Watchdog(4, 0, 2, store, folder) as watch:
    time.sleep(0.6)
    print("lives")
    store.set(watchdog.HANG_KEY, "rank 1: the run hangs: behind: rank 0")
    asleep(3)
""",
    )
    assert code == EXIT_CODE
    assert logged.startswith("lives\nERROR rank 1: the run hangs: behind: rank 0. Stacks")
    assert " in asleep" in (tmp_path / "hang_rank_0.txt").read_text()


def test_what_a_hang_breaks_does_not_change_the_exit_code(tmp_path):
    """A peer that has gone makes a collective raise while the others still write."""
    code, _, _ = run(
        tmp_path,
        """
with Watchdog(1.0, 0, 1, None, folder) as watch:
    while not watch._over.is_set():
        time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")
""",
    )
    assert code == EXIT_CODE


def test_a_log_that_hangs_does_not_keep_the_process(tmp_path):
    code, _, _ = run(
        tmp_path,
        """
with Watchdog(0.4, 0, 1, None, folder) as watch, logging.getLogger().handlers[0].lock:
    asleep(30)
""",
    )
    assert code == EXIT_CODE
    assert " in asleep" in (tmp_path / "hang_rank_0.txt").read_text()


def test_a_native_call_that_keeps_the_interpreter_is_ended(tmp_path):
    code, _, _ = run(
        tmp_path,
        """
import ctypes
def keeps_the_interpreter():
    ctypes.PyDLL(None).sleep(30)
with Watchdog(0.4, 0, 1, None, folder) as watch:
    watch.beat("step 1")
    keeps_the_interpreter()
""",
    )
    # faulthandler's code.
    assert code == 1
    assert " in keeps_the_interpreter" in (tmp_path / "hang_rank_0.txt").read_text()


def test_a_long_native_call_has_its_allowance(tmp_path):
    body = """
import ctypes
with Watchdog(0.4, 0, 1, None, folder) as watch:
    watch.beat("loads", allowance=60)
    ctypes.PyDLL(None).sleep(2)
"""
    assert run(tmp_path, body) == (0, "", "")


def test_the_block_is_left_though_the_store_blocks(tmp_path):
    body = """
store = Dictionary()
store.clone = lambda: time.sleep(60)
with Watchdog(0.4, 0, 2, store, folder):
    pass
"""
    assert run(tmp_path, body) == (0, "", "")


def test_stacks_of_an_earlier_hang_stay(tmp_path):
    file = tmp_path / "hang_rank_0.txt"
    file.write_text("an earlier hang\n")
    assert run(tmp_path, "with Watchdog(5, 0, 1, None, folder): pass")[0] == 0
    assert file.read_text() == "an earlier hang\n"
    run(tmp_path, "with Watchdog(0.4, 0, 1, None, folder): asleep(30)")
    assert file.read_text().startswith("an earlier hang\n2")


CLIENT = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[2]))
with Watchdog(1.5, 0, 2, store, folder) as watch:
    watch.beat("step 1")
    time.sleep(0.5)
    print("ready", flush=True)
    watch.beat("step 2")
    asleep(60)
"""


def test_a_store_whose_host_is_gone(tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = start(tmp_path, CLIENT, store.port)
    assert client.stdout.readline() == "ready\n"
    # Its server goes with it.
    del store
    code, logged, _ = end(client)
    assert code == EXIT_CODE
    assert "WARNING rank 0: the store is gone: " in logged
    assert "a hang is still noticed, but not which rank is behind" in logged
    assert "the other ranks are not known (the store is gone: " in logged
    assert " in asleep" in (tmp_path / "hang_rank_0.txt").read_text()


def test_a_store_that_blocks_does_not_keep_the_process(tmp_path):
    """As one does whose host is stopped or cut off."""
    body = """
store = Dictionary()
tell(store, 1, 1)
store.{call} = lambda *arguments: time.sleep(60)
with Watchdog(1.0, 0, 2, store, folder) as watch:
    asleep(60)
"""
    bodies = [body.format(call=call) for call in ("clone", "set", "check", "multi_get")]
    for index, (code, logged, _) in enumerate(run_all(tmp_path, bodies)):
        assert code == EXIT_CODE
        assert "the other ranks are not known (the store does not answer)" in logged
        assert " in asleep" in (tmp_path / str(index) / "hang_rank_0.txt").read_text()

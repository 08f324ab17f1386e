"""Tasks in processes: every answer, in any number of them; a dead one is an error, not a hang."""

import errno
import hashlib
import os
import signal
import threading
import time

import pytest

from data_prep.pool import Pool
from data_prep.sources import DataError
from data_prep.worker import CheckTask, HashTask, Setup

SETUP = Setup(tokenizer=None, engine="tokenizers", bos_id=0, dtype="uint16")


def giving(tasks):
    waiting = iter(tasks)
    return lambda: next(waiting, None)


@pytest.mark.parametrize("count", [1, 2])
def test_every_task_is_answered(tmp_path, count):
    tasks = []
    for number in range(7):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 1000)
        tasks.append(HashTask(path))
    with Pool(count, SETUP) as pool:
        for _ in range(2):
            found = dict(pool.run(giving(tasks)))
            for number, task in enumerate(tasks):
                assert found[task] == hashlib.sha256(bytes([number]) * 1000).hexdigest()
        # none is started that has nothing to do
        assert len(pool._processes) == (2 if count > 1 else 0)
    assert all(process.poll() is not None for process in pool._processes)


@pytest.mark.parametrize("count", [1, 2])
def test_errors_come_back(tmp_path, count):
    missing = pytest.raises((RuntimeError, FileNotFoundError), match="No such file")
    with Pool(count, SETUP) as pool, missing:
        list(pool.run(giving([HashTask(tmp_path / "none")])))
    (tmp_path / "0.json").write_text('{"sha256": {".bin": "0"}, "summary": {}}')
    with Pool(count, SETUP) as pool, pytest.raises(DataError, match="is not the file that was"):
        list(pool.run(giving([CheckTask(tmp_path / "0")])))


def test_a_dead_process_is_an_error_not_a_hang(tmp_path):
    os.mkfifo(tmp_path / "never")
    with Pool(2, SETUP) as pool:

        def kill():
            while not pool._processes:
                time.sleep(0.05)
            os.kill(pool._processes[0].pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(DataError, match=r"a process of data_prep's 2 died.*data\.workers"):
            list(pool.run(giving([HashTask(tmp_path / "never")])))
        thread.join()


def test_a_process_does_not_outlive_the_one_that_gives_tasks(tmp_path):
    os.mkfifo(tmp_path / "never")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with Pool(2, SETUP) as pool:
            task = HashTask(tmp_path / "never")

            def next_task():
                if pool._processes:
                    os.write(writer, b"%d\n" % pool._processes[0].pid)
                    return None
                return task

            list(pool.run(next_task))
        os._exit(1)
    worker = int(os.read(reader, 20))
    # not before it is at its task, and waits there for what never comes
    never = _opened_by_a_reader(tmp_path / "never")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}") or "Z" in _state(worker):
            os.close(never)
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    os.close(never)
    pytest.fail("it lives on")


def _opened_by_a_reader(fifo):
    """A file descriptor of the fifo's writing end, once another process has opened it to read."""
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO
            time.sleep(0.05)


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_workers_below_one_are_refused():
    with pytest.raises(DataError, match=r"data\.workers=0: must be 1 or more"):
        Pool(0, SETUP)

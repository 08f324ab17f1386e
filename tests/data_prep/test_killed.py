"""Killed at any moment, the same command ends in the same bytes."""

import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.tokenizer import load_tokenizer
from tests.data_prep.stage_runs import digest_of, run, small_units

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"packing": "best_fit", "deduplicate": True}
# argv: root, out, workers, the number of the operation on a file at which it kills itself; 0: never
RUN_ALONE = f"""
import os, pickle, signal, sys
from pathlib import Path
from data_prep import corpus, sources
from tests.data_prep import stage_runs
root, out = map(Path, sys.argv[1:3])
workers, last = map(int, sys.argv[3:])
corpus.UNIT_BYTES, sources.SPLIT_BYTES = 4000, 20_000
# as transformers reads it, without the seconds that importing it takes
tokenizer = pickle.loads((root / "tokenizer").read_bytes())
stage_runs.data_prep.load_tokenizer = lambda *_: (tokenizer, "")
done, fsync = 0, os.fsync

def count():
    global done
    done += 1
    if done == last:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        count()

def counted_fsync(descriptor):
    count()
    fsync(descriptor)

os.fsync = counted_fsync
sys.addaudithook(watch)
stage_runs.run(root, out, workers=workers, **{OPTIONS})
print(done)
"""


@pytest.fixture
def whole(fetched, tmp_path, monkeypatch):
    """The digest of a run that nothing disturbed; runs alone find their tokenizer."""
    small_units(monkeypatch)
    (fetched / "tokenizer").write_bytes(pickle.dumps(load_tokenizer(fetched / "fetch/model")[0]))
    run(fetched, tmp_path / "whole", **OPTIONS)
    return digest_of(tmp_path / "whole")


def start(fetched, out, workers, last=0):
    command = [sys.executable, "-c", RUN_ALONE, fetched, out, workers, last]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def killed_after(fetched, out, seconds):
    """Kill a run so long after its first unit; whether it was still at work."""
    process = start(fetched, out, 2)
    while process.poll() is None and not list(out.glob("units/*/*.json")):
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def ends_in(fetched, out, workers=2):
    run(fetched, out, workers=workers, **OPTIONS)
    return digest_of(out)


def test_a_killed_run_ends_in_the_same_bytes(fetched, tmp_path, whole):
    assert killed_after(fetched, tmp_path / "out", 0.02)
    assert list(tmp_path.glob("out/units/*/*.json"))
    assert ends_in(fetched, tmp_path / "out") == whole


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_in_the_same_bytes(fetched, tmp_path, whole):
    process = start(fetched, tmp_path / "timed", 2)
    # When each further unit was there: half of the kills come while units are made.
    units = [(0, 0.0)]
    while process.poll() is None:
        there = len(list(tmp_path.glob("timed/units/*/*.json")))
        if there > units[-1][0]:
            units.append((there, time.monotonic()))
        time.sleep(0.002)
    assert process.wait() == 0, process.communicate()
    (_, first_unit), (_, last_unit), end = units[1], units[-1], time.monotonic()
    draw = np.random.default_rng().uniform
    moments = [*draw(0, last_unit - first_unit, 10), *draw(0, end - first_unit, 10)]
    killed, left = 0, set()
    for number, seconds in enumerate(moments):
        out = tmp_path / str(number)
        killed += killed_after(fetched, out, seconds)
        left.add(len(list(out.glob("units/*/*.json"))))
        assert ends_in(fetched, out) == whole, f"killed {seconds} s after the first unit"
    assert killed > 10 and len(left) > 3


@pytest.mark.slow
def test_a_run_killed_at_operations_on_files_ends_in_the_same_bytes(fetched, tmp_path, whole):
    """Also where a run is only for moments: while it renames, finishes and tidies up."""
    printed, errors = start(fetched, tmp_path / "counted", 1).communicate()
    assert digest_of(tmp_path / "counted") == whole, errors
    count = int(printed.split()[-1])
    for last in [*np.linspace(1, count - 8, 6, dtype=int), *range(count - 7, count + 1)]:
        out = tmp_path / str(last)
        process = start(fetched, out, 1, last)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert ends_in(fetched, out) == whole, f"killed at operation {last} of {count}"

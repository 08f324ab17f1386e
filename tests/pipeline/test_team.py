"""Ranks of one stage: one decides, one speaks, and all leave with the same exit code."""

import json
import logging
import socket
import threading
import time
import warnings
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed import HashStore, TCPStore

from pipeline import runner, team
from pipeline.console_log import log_to_terminal
from pipeline.manifest import STOPPED_BY_FILE, StageError, StageStopped
from pipeline.team import Failure, Team, first_failure, loopback_store, note_failure, own_keys
from tests.pipeline.fake_stages import raising
from tests.pipeline.running import composed, fresh_logger, refused, run


class Ranks:
    """Two ranks of one finetune as threads: what each does, how it ends, what it logs."""

    def __init__(self, monkeypatch, stages, at, capsys):
        self.stages, self.at, self.capsys = stages, at, capsys
        self.store = None
        self.codes, self.left = {}, {}
        monkeypatch.setattr(team, "PATIENCE", 0.5)
        monkeypatch.setattr(runner, "NOTICE", 0.1)
        monkeypatch.setattr(runner.Team, "join", lambda: Team(self.rank(), 2, self.store))
        monkeypatch.setattr(runner, "launched", lambda: True)

    @staticmethod
    def rank() -> int:
        name = threading.current_thread().name
        return int(name.removeprefix("rank ")) if name.startswith("rank ") else 0

    def _execute(self, keys):
        try:
            self.codes[self.rank()] = runner.execute(composed(*keys))
        except Exception as error:
            self.codes[self.rank()] = error
        self.left[self.rank()] = time.monotonic()

    def run(self, *more, stage="finetune"):
        """(how rank 0 and rank 1 ended, the lines of both)."""
        keys = [self.at.outputs, f"stage={stage}", "parallel.gpus_per_node=2", *more]
        self.store = HashStore()
        self.capsys.readouterr()
        with fresh_logger(), warnings.catch_warnings():
            log_to_terminal("stdout")
            ranks = [
                threading.Thread(target=self._execute, args=(keys,), name=f"rank {n}", daemon=True)
                for n in (0, 1)
            ]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(30)
        lines = self.capsys.readouterr().out.splitlines()
        return (self.codes[0], self.codes[1]), [line.partition(" ")[2] for line in lines]


@pytest.fixture
def ranks(monkeypatch, stages, at, capsys):
    for stage in ("fetch", "data_prep", "convert"):
        assert run(capsys, at.outputs, f"stage={stage}")[0] == 0
    stages.calls.clear()
    return Ranks(monkeypatch, stages, at, capsys)


def test_ranks_run_what_rank_0_decides_and_its_folder_is_renamed_last(ranks, stages, at):
    seen = {}

    def act(context):
        time.sleep(0.5 * ranks.rank())
        seen[ranks.rank()] = (context.out, context.out.exists())
        return {"rank": ranks.rank()}

    stages.acts["finetune"] = act
    assert ranks.run()[0] == (0, 0)
    assert seen == dict.fromkeys((0, 1), (at.run / "finetune.partial", True))
    assert json.loads((at.run / "finetune/manifest.json").read_text())["counts"] == {"rank": 0}
    assert ranks.run()[0] == (0, 0) and stages.calls == ["finetune"] * 2


def test_what_rank_0_refuses_no_rank_does(ranks, stages, at):
    assert ranks.run()[0] == (0, 0)
    codes, lines = ranks.run("train.seed=9")
    assert codes == (2, 2) and stages.calls == ["finetune"] * 2
    assert [line for line in lines if "error" in line] == [
        f"error: {at.run}/finetune: was made with another configuration (train.seed: "
        "1 -> 9); choose variant=NAME to keep it, or force=true to redo it"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [("rank {}", ["error: rank 0", "error: rank 1: rank 1"]), ("step 1", ["error: step 1"])],
)
def test_an_error_of_all_ranks_is_said_once(ranks, stages, text, said):
    stages.acts["finetune"] = lambda context: raising(StageError(text.format(ranks.rank())))(0)
    codes, lines = ranks.run()
    assert codes == (2, 2) and sorted(line for line in lines if "error" in line) == said


def test_an_error_of_some_ranks_is_said_by_one_of_them(monkeypatch, capsys):
    monkeypatch.setattr(team, "PATIENCE", 0.2)
    store = HashStore()
    with fresh_logger():
        log_to_terminal("stdout")
        ranks = [
            threading.Thread(target=Team(rank, 4, store).say, args=("no disk",))
            for rank in (1, 2, 3)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(": no disk") and "error: rank " in line


def only(rank, ranks, error):
    def act(context):
        if ranks.rank() == rank:
            raise error
        return {}

    return act


def test_an_error_of_one_rank_names_it_and_ends_all(ranks, stages, at):
    stages.acts["finetune"] = only(1, ranks, StageError("no disk here"))
    codes, lines = ranks.run()
    assert codes == (2, 2) and "error: rank 1: no disk here" in lines
    assert not (at.run / "finetune").exists() and (at.run / "finetune.partial").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_user_cannot_mend_ends_all_ranks_and_keeps_one_traceback(ranks, stages, rank):
    error = ZeroDivisionError("seven")
    stages.acts["finetune"] = only(rank, ranks, error)
    codes, _ = ranks.run()
    assert codes[rank] is error and codes[1 - rank] == 1


@pytest.mark.parametrize("code", [1, 2])
def test_who_only_missed_the_failed_rank_says_so_in_a_line(ranks, stages, code):
    first, missed = ZeroDivisionError("seven"), RuntimeError("closed by peer\n1\n2")

    def act(context):
        if ranks.rank() == 1:
            raise first if code == 1 else StageError("seven")
        time.sleep(0.2)
        raise missed

    stages.acts["finetune"] = act
    codes, lines = ranks.run()
    assert codes[0] == code and (codes[1] is first or codes[1] == 2)
    told = "rank 0: RuntimeError: closed by peer (rank 1 failed first)"
    assert (told in lines) == (code == 1)


def test_ranks_stop_together(ranks, stages):
    saved = []

    def act(context):
        if ranks.rank() == 0:
            time.sleep(0.5)
            saved.append(time.monotonic())
        raise StageStopped(STOPPED_BY_FILE)

    stages.acts["finetune"] = act
    codes, lines = ranks.run()
    assert codes == (75, 75)
    # A launcher closes all once the first has left.
    assert min(ranks.left.values()) > saved[0]
    told = "stopped by the trigger file after a save; the same command continues"
    assert [line for line in lines if "stopped" in line] == [told]


def test_only_this_machine_reaches_the_store_and_no_strangers_key_ends_a_run():
    server = loopback_store()
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.port
    ]
    assert listening == ["127.0.0.1"]
    theirs = TCPStore("127.0.0.1", server.port, is_master=False)
    theirs.set("longgen_team/0/failed", '{"rank": 1, "exit_code": 2}')
    keys = own_keys(server, "a random one", "0")
    assert first_failure(keys) is None
    note_failure(keys, Failure(0, 1))
    assert first_failure(own_keys(theirs, "a random one", "0")) == Failure(0, 1)


def test_a_warning_of_all_ranks_is_given_once_each_time():
    store = HashStore()
    teams = [Team(rank, 2, store) for rank in (0, 1)]

    def given(rank, text, level=logging.WARNING):
        return teams[rank].says(logging.makeLogRecord({"msg": text, "levelno": level}))

    assert [given(rank, "left out") for rank in (1, 0, 1, 0, 1)] == [True, False, True, False, True]
    assert given(0, "slow disk") and given(0, "slow disk")
    # Both handlers of a process, the terminal's and the file's, are told the same.
    record = logging.makeLogRecord({"msg": "for both", "levelno": logging.WARNING})
    assert teams[0].says(record) and teams[0].says(record)
    assert all(given(rank, "hangs", logging.ERROR) for rank in (0, 1))
    assert all(Team().says(logging.makeLogRecord({"msg": "x", "levelno": 30})) for _ in (0, 1))


@pytest.mark.parametrize(("stage", "first"), [("chain", "fetch"), ("export", "export")])
def test_what_several_processes_would_do_several_times_is_refused(ranks, stages, stage, first):
    codes, lines = ranks.run(stage=stage)
    assert codes == (2, 2) and stages.calls == []
    assert [line for line in lines if "error" in line] == [
        f"error: stage={stage}: 2 processes were started, and each would do {first} as a whole; "
        "set stage=finetune, and run other stages by python pipeline/run.py stage=NAME, without "
        "torchrun"
    ]


def test_a_launchers_environment_that_is_not_whole(stages, at, capsys, monkeypatch):
    monkeypatch.setattr(team.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    message = refused(capsys, at.outputs)
    assert message.startswith("RANK=1: the other processes cannot be reached (")
    assert message.endswith("; start every process by torchrun, or unset RANK to run one alone")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(closed.getsockname()[1]))
        monkeypatch.setattr(team, "CONNECT", 1)
        message = refused(capsys, at.outputs)
    assert message.startswith("RANK=1: the other processes cannot be reached (")
    assert stages.calls == []

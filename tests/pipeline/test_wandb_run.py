"""W&B never holds up or ends a run: no network, a wrong key, a service that died."""

import logging
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipeline import wandb_run
from pipeline.manifest import StageError
from pipeline.schema import WandbSection
from pipeline.wandb_run import open_run, resolve_mode

KEY = "0" * 40


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Neither a key nor a mode, and no report of errors to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@contextmanager
def server(code):
    """The address of a server that answers with `code`; of one that never does where None."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()

        def log_message(self, *words):
            pass

    if code is None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"
        return
    with HTTPServer(("127.0.0.1", 0), Handler) as answering:
        threading.Thread(target=answering.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_port}"
        answering.shutdown()


def own(caplog):
    """What this project has logged, and not W&B's client."""
    return [record.getMessage() for record in caplog.records if record.name == "longgen.wandb"]


@pytest.mark.parametrize(
    ("key", "variable", "mode"),
    [
        (KEY, None, "online"),
        ("", None, "offline"),
        (None, None, "offline"),
        (KEY, "offline", "offline"),
        (KEY, "dryrun", "offline"),
        (KEY, "disabled", "disabled"),
        (None, "online", "online"),
        (KEY, "", "online"),
    ],
)
def test_auto_reads_the_key_and_wandbs_own_variable(monkeypatch, key, variable, mode):
    monkeypatch.setattr(wandb_run, "_unreachable", lambda: None)
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", variable)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert resolve_mode(WandbSection()) == mode
    # What the configuration says counts more.
    assert resolve_mode(WandbSection(mode="offline")) == "offline"


def test_an_unknown_wandb_mode_is_an_error(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(StageError, match="WANDB_MODE=on: must be online, offline or disabled"):
        resolve_mode(WandbSection())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (200, None),
        (404, None),
        (503, "HTTP 503"),
        (None, "no answer in 0.3 s|timed out"),
    ],
)
def test_only_a_server_that_answers_is_logged_to_online(monkeypatch, caplog, code, reason):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_run, "PROBE_SECONDS", 0.3)
    with server(code) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert resolve_mode(WandbSection()) == ("offline" if reason else "online")
    said = rf"{address} cannot be reached \(({reason})\), logging offline"
    assert [bool(re.search(said, line)) for line in own(caplog)] == [True] * bool(reason)


def test_a_wait_that_wandb_does_not_limit_ends_and_the_run_is_offline(
    monkeypatch, tmp_path, caplog
):
    """Its init() waits for ever where the network goes after the probe."""
    monkeypatch.setattr(wandb_run, "_unreachable", lambda: None)
    monkeypatch.setattr(wandb_run, "OPEN_SECONDS", 2.0)
    forget = wandb_run._forget_service

    def forget_and_give_time():
        forget()
        # To open an offline run may take longer, on a busy machine.
        wandb_run.OPEN_SECONDS = 60.0

    monkeypatch.setattr(wandb_run, "_forget_service", forget_and_give_time)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    started = time.monotonic()
    with server(None) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        run = open_run(WandbSection(), tmp_path, "test", {}, None)
    assert time.monotonic() - started < 30
    assert "no run could be opened mode=online" in caplog.text
    run.log({"loss": 1.0}, step=1)
    run.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_a_service_that_died_is_said_once_and_stops_nothing(tmp_path, caplog):
    """As by Slurm, whose SIGTERM reaches every process of a job."""
    run = open_run(WandbSection(mode="offline"), tmp_path, "test", {}, None)
    wandb_run._end_service()
    with caplog.at_level(logging.INFO, "longgen.wandb"):
        until = time.monotonic() + 20
        while not own(caplog) and time.monotonic() < until:
            run.log({"loss": 1.0})
            time.sleep(0.02)
        run.log({"loss": 2.0})
        run.finish()
    (said,) = own(caplog)
    assert "nothing more is logged to it now; metrics.jsonl has every step" in said
    # The next run has a service of its own.
    open_run(WandbSection(mode="offline"), tmp_path, "test", {}, None).finish()

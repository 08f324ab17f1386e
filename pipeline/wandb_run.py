"""The W&B run of an experiment's variant: opened by training, opened again by the report.

Online, W&B appends to the run of the same id. Offline it cannot: every init() begins another store,
and a resumed training repeats the steps since its last checkpoint. So the store is made anew each
time, from metrics.jsonl, which holds every step once; the run's folder has one store at any time.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import shutil
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from pipeline.manifest import StageError
from pipeline.records import Record, read_records
from pipeline.report_page import Section
from pipeline.schema import WandbSection

log = logging.getLogger("longgen.wandb")


# Seconds for W&B's server to answer, for a run to be opened, and for what is left to be uploaded.
PROBE_SECONDS = 10.0
OPEN_SECONDS = 60.0
FINISH_SECONDS = 300.0
# Values of WANDB_MODE that W&B documents, with the older names of two.
MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _has_key() -> bool:
    # W&B takes an empty variable for none, and then reads ~/.netrc.
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(_server()).hostname) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _unreachable() -> str | None:
    """Why W&B's server does not answer from here, through the environment's proxy; None if it does.

    Without an answer wandb.init() waits for ever, whatever its init_timeout.
    """
    found = [f"no answer in {PROBE_SECONDS:g} s"]

    def ask() -> None:
        try:
            urlopen(_server(), timeout=PROBE_SECONDS).close()
            found[0] = None
        except HTTPError as error:
            # A proxy says so of a server that it does not reach.
            found[0] = f"HTTP {error.code}" if error.code >= 500 else None
        except URLError as error:
            # W&B has its own settings for certificates; that one was sent shows a network.
            found[0] = None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
        except (OSError, ValueError, HTTPException) as error:
            found[0] = str(error) or type(error).__name__

    # In a thread: the look-up of a name has no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return found[0]


def resolve_mode(section: WandbSection) -> str:
    """online, offline or disabled: "auto" is WANDB_MODE, or online where there is a key.

    A server that does not answer makes online offline.

    Raises:
        StageError: where W&B is asked for by another mode than auto, and is not installed; where
            WANDB_MODE is unknown.
    """
    mode = section.mode
    if mode == "disabled":
        return mode
    if find_spec("wandb") is None:
        if mode != "auto":
            raise StageError(
                f"wandb.mode={mode}: wandb is not installed; install it "
                "(pip install -r requirements.txt), or set wandb.mode=disabled"
            )
        log.info("wandb: not installed, nothing is logged to it")
        return "disabled"
    if mode == "auto" and (given := os.environ.get("WANDB_MODE")):
        if given not in MODES:
            raise StageError(
                f"WANDB_MODE={given}: must be online, offline or disabled; fix or unset it, or set "
                "wandb.mode"
            )
        mode = MODES[given]
    elif mode == "auto":
        mode = "online" if _has_key() else "offline"
    if mode == "online" and (reason := _unreachable()):
        log.warning("wandb: %s cannot be reached (%s), logging offline", _server(), reason)
        return "offline"
    return mode


def _end_service() -> None:
    """End wandb-core, the process that W&B's client talks to and may wait for without a limit."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            # It may have ended by now.
            with suppress(OSError):
                if (Path("/proc") / child / "comm").read_text() == "wandb-core\n":
                    os.kill(int(child), signal.SIGKILL)


def _forget_service() -> None:
    """Let W&B start anew, and not wait for its service when Python ends."""
    import wandb as client

    _end_service()
    with suppress(Exception):
        client.teardown()


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Run:
    """A run of W&B whose errors stop no work: after the first one nothing more is sent to it."""

    def __init__(self, client_run: Any) -> None:
        self.id, self._run, self._failed = client_run.id, client_run, False

    def log(self, values: dict[str, Any], **options: Any) -> None:
        """wandb.Run.log()."""
        self._attempt(self._run.log, values, **options)

    def finish(self) -> None:
        """Finish the run; where it is offline, log the command that uploads it."""
        self._attempt(self._run.finish)
        if self._run.offline and not self._failed:
            store = Path(self._run.dir).parent
            log.info("wandb: to upload it: %s -m wandb sync %s", sys.executable, store)

    def _attempt(self, call: Callable[..., Any], *values: Any, **options: Any) -> None:
        if self._failed:
            return
        try:
            call(*values, **options)
        # The client raises errors of several libraries. Slurm's signals, for one, end wandb-core
        # before the run has saved.
        except Exception as error:
            self._failed = True
            log.warning(
                "wandb: %s; nothing more is logged to it now; metrics.jsonl has every step",
                _words(error),
            )
            _forget_service()


def open_run(
    section: WandbSection,
    folder: Path,
    name: str,
    config: dict[str, Any],
    run_id: str | None,
    metrics: Path | None = None,
) -> Run | None:
    """The run `run_id`, or a new one where that is None; None where W&B is disabled or fails.

    Args:
        folder: the run's, in which W&B keeps its own folder.
        metrics: the records so far, which an offline store begins with.
    """
    mode = resolve_mode(section)
    if mode == "disabled":
        return None
    try:
        found = _open(section, folder, name, config, run_id, mode)
    # Whatever it is (a key that is refused, a wandb-core that cannot start): training goes on.
    except Exception as error:
        log.warning("wandb: no run could be opened mode=%s (%s)", mode, _words(error))
        _forget_service()
        if mode == "offline":
            return None
        return open_run(replace(section, mode="offline"), folder, name, config, run_id, metrics)
    log.info("wandb: run id=%s mode=%s", found.id, mode)
    run = Run(found)
    if mode == "offline" and metrics is not None and (records := read_records(metrics)):
        for record in records:
            log_record(run, record)
        # Else what is logged next, without a step, would join the last one.
        run.log(_stamp(records[-1]), commit=True)
    return run


def _open(
    section: WandbSection,
    folder: Path,
    name: str,
    config: dict[str, Any],
    run_id: str | None,
    mode: str,
) -> Any:
    """wandb.init(), which fails after OPEN_SECONDS."""
    import wandb as client

    offline = mode == "offline"
    if offline:
        for store in folder.glob(f"wandb/offline-run-*-{run_id or '*'}"):
            shutil.rmtree(store)
    limit = threading.Timer(OPEN_SECONDS, _end_service)
    limit.daemon = True
    limit.start()
    try:
        return client.init(
            project=section.project,
            entity=section.entity,
            name=name,
            id=run_id,
            resume=None if offline else "allow",
            mode=mode,
            dir=folder,
            config=config,
            settings=client.Settings(
                silent=True, console="off", x_disable_stats=True, finish_timeout=FINISH_SECONDS
            ),
        )
    finally:
        limit.cancel()


def _stamp(record: Record) -> dict[str, float]:
    """The time of a record, by W&B's own name for it."""
    return {"_timestamp": record["time"]} if "time" in record else {}


def log_record(run: Run, record: Record) -> None:
    """Log one record of metrics.jsonl as KIND/KEY at its step."""
    flat = {}
    for key, value in record.items():
        if key == "by_position":
            flat |= {f"loss at {b['start']}": b["loss"] for b in value}
        elif key not in ("kind", "step", "time") and value is not None:
            flat[key] = value
    named = {f"{record['kind']}/{key}": value for key, value in flat.items()}
    run.log(named | _stamp(record), step=record["step"])


def trained_run(finetune: Path) -> str | None:
    """The id of the run that training logged to, as its newest checkpoint says."""
    found = sorted(finetune.glob("checkpoints/*/progress.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(found[-1].read_text()).get("wandb_id") if found else None


def log_report(run: Run, sections: Sequence[Section]) -> int:
    """Log each section's picture as report/NAME and its table as report/NAME_table; how many."""
    import wandb as client

    logged: dict[str, Any] = {}
    for section in sections:
        name = section.picture.stem if section.picture else section.title.lower().replace(" ", "_")
        if section.picture is not None:
            logged[f"report/{name}"] = client.Image(str(section.picture), caption=section.text)
        if section.table is not None:
            columns = [str(cell) for cell in section.table.header] or ["name", "value"]
            rows = [list(row) for row in section.table.rows]
            logged[f"report/{name}_table"] = client.Table(columns=columns, data=rows)
    run.log(logged)
    run.finish()
    return len(logged)

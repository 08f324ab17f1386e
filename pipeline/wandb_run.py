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
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.manifest import StageError
from pipeline.records import Record, read_records
from pipeline.report_page import Section
from pipeline.schema import WandbSection

log = logging.getLogger("longgen.wandb")


def _has_key() -> bool:
    if "WANDB_API_KEY" in os.environ:
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def resolve_mode(section: WandbSection) -> str:
    """online, offline or disabled: "auto" is online where there is a key.

    Raises:
        StageError: where W&B is asked for by another mode than auto, and is not installed.
    """
    if section.mode == "disabled":
        return section.mode
    if find_spec("wandb") is None:
        if section.mode != "auto":
            raise StageError(
                f"wandb.mode={section.mode}: wandb is not installed; install it "
                "(pip install -r requirements.txt), or set wandb.mode=disabled"
            )
        log.info("wandb: not installed, nothing is logged to it")
        return "disabled"
    if section.mode != "auto":
        return section.mode
    return "online" if _has_key() else "offline"


def open_run(
    section: WandbSection,
    folder: Path,
    name: str,
    config: dict[str, Any],
    run_id: str | None,
    metrics: Path | None = None,
) -> Any:
    """The run `run_id`, or a new one where that is None; None where W&B is disabled.

    Args:
        folder: the run's, in which W&B keeps its own folder.
        metrics: the records so far, which an offline store begins with.
    """
    mode = resolve_mode(section)
    if mode == "disabled":
        return None
    import wandb as client

    offline = mode == "offline"
    if offline:
        for store in folder.glob(f"wandb/offline-run-*-{run_id or '*'}"):
            shutil.rmtree(store)
    run = client.init(
        project=section.project,
        entity=section.entity,
        name=name,
        id=run_id,
        resume=None if offline else "allow",
        mode=mode,
        dir=folder,
        config=config,
        settings=client.Settings(silent=True, console="off", x_disable_stats=True),
    )
    log.info("wandb: run id=%s mode=%s", run.id, mode)
    if offline and metrics is not None and (records := read_records(metrics)):
        for record in records:
            log_record(run, record)
        # Else what is logged next, without a step, would join the last one.
        run.log(_stamp(records[-1]), commit=True)
    return run


def _stamp(record: Record) -> dict[str, float]:
    """The time of a record, by W&B's own name for it."""
    return {"_timestamp": record["time"]} if "time" in record else {}


def log_record(run: Any, record: Record) -> None:
    """Log one record of metrics.jsonl as KIND/KEY at its step."""
    flat = {}
    for key, value in record.items():
        if key == "by_position":
            flat |= {f"loss at {b['start']}": b["loss"] for b in value}
        elif key not in ("kind", "step", "time") and value is not None:
            flat[key] = value
    named = {f"{record['kind']}/{key}": value for key, value in flat.items()}
    run.log(named | _stamp(record), step=record["step"])


def close_run(run: Any) -> None:
    """Finish the run; where it is offline, log the command that uploads it."""
    run.finish()
    if run.offline:
        store = Path(run.dir).parent
        log.info("wandb: to upload it: %s -m wandb sync %s", sys.executable, store)


def trained_run(finetune: Path) -> str | None:
    """The id of the run that training logged to, as its newest checkpoint says."""
    found = sorted(finetune.glob("checkpoints/*/progress.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(found[-1].read_text()).get("wandb_id") if found else None


def log_report(run: Any, sections: Sequence[Section]) -> int:
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
    close_run(run)
    return len(logged)

"""The W&B run of an experiment's variant: opened by training, opened again by the report."""

from __future__ import annotations

import json
import logging
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
    """online, offline or disabled: "auto" is online where there is a key."""
    if section.mode != "auto":
        return section.mode
    return "online" if _has_key() else "offline"


def open_run(
    section: WandbSection, folder: Path, name: str, config: dict[str, Any], run_id: str | None
) -> Any:
    """The run `run_id`, or a new one where that is None; None where W&B is disabled."""
    mode = resolve_mode(section)
    if mode == "disabled":
        return None
    import wandb as client

    run = client.init(
        project=section.project,
        entity=section.entity,
        name=name,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=folder,
        config=config,
        settings=client.Settings(silent=True, console="off", x_disable_stats=True),
    )
    log.info("W&B run %s, %s", run.id, mode)
    return run


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
    run.finish()
    return len(logged)

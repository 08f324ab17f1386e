"""Stage benchmark: measure one thing on this machine, benchmark=NAME, on random weights."""

from __future__ import annotations

import importlib
import json
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.manifest import StageContext, versions
from pipeline.schema import Config

INPUTS = ()
ALWAYS = True
DISTRIBUTED = True
ATTENTION_PACKAGES = ("flash-attn-4", "flash-attn")


def depends_on(config: Config) -> dict[str, Any]:
    """All that is measured."""
    sections = ("benchmark", "model", "pattern", "schedule", "parallel", "train")
    return {name: asdict(getattr(config, name)) for name in sections} | {
        "seq_length": config.data.seq_length
    }


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or None


def machine(config: Config) -> dict[str, Any]:
    """What is measured on: machine, versions (of attention's packages too), commit, date."""
    on_gpu = config.device == "cuda"
    found = versions()
    for name in ATTENTION_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if on_gpu:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else "CPU",
        "versions": found,
        "commit": config.benchmark.commit or _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(context: StageContext) -> dict[str, Any]:
    """Writes NAME.json: the figures, and what they were measured on."""
    config, name = context.config, context.config.benchmark.name
    figures, rank = importlib.import_module(f"pipeline.benchmarks.{name}").measure(context)
    if rank == 0:
        record = {
            "benchmark": name,
            **machine(config),
            "config": depends_on(config),
            "figures": figures,
        }
        (context.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    # A table has been told row by row.
    told = {key: value for key, value in figures.items() if not isinstance(value, list)}
    if rank == 0:
        for key, value in told.items():
            context.log.info("%s: %s", key, value)
    return told

"""Runs stages in order: skips what is finished, redoes what changed, says why it stops."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError

from data_prep.sources import DataError
from model.mapping import MappingError
from model.weights import WeightsError
from pipeline.manifest import (
    StageContext,
    StageError,
    StageStopped,
    changed_keys,
    digest,
    finish,
    read_manifest,
)
from pipeline.schema import Config
from pipeline.validation import CHAIN, ConfigError, parse

log = logging.getLogger("longgen")

# What a user can mend: said in one line, without a traceback.
USER_ERRORS = (ConfigError, StageError, DataError, MappingError, WeightsError)
# Stages whose results controls, seeds and ablations share.
SHARED = ("fetch", "data_prep", "convert")
PARTIAL = "partial.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def _log_to_terminal() -> None:
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def stage_module(stage: str) -> ModuleType:
    """A stage's module: INPUTS (names, or a function of the configuration), depends_on, run."""
    return importlib.import_module(f"pipeline.stages.{stage}")


def stage_inputs(stage: str, config: Config) -> tuple[str, ...]:
    """Names of the stages whose folders this one reads under this configuration."""
    inputs = stage_module(stage).INPUTS
    return inputs(config) if callable(inputs) else inputs


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk (or quota) while a stage writes into `folder` into a StageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # Of an error in safetensors' own writer, its text is all that tells.
        told = [number for number in NO_SPACE if f"os error {number})" in str(error)]
        number = getattr(error, "errno", None) or (told[0] if told else None)
        if number not in NO_SPACE:
            raise
        # A failed copy names its source first; a failed write names no file.
        path = getattr(error, "filename2", None) or getattr(error, "filename", None) or folder
        raise StageError(
            f"{path}: {os.strerror(number)}; free space there, or set outputs=OTHER_DISK, and run "
            "again"
        ) from error


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages that the configuration names, in order.

    Raises:
        ConfigError: where one of them cannot run on the configured world.
    """
    stages = CHAIN if config.stage == "chain" else (config.stage,)
    if config.export.source == "convert" and config.stage == "chain":
        stages = tuple(stage for stage in stages if stage != "finetune")
    world = config.parallel.nodes * config.parallel.gpus_per_node
    if "finetune" in stages and world > 1:
        raise ConfigError(
            f"world size={world}: finetune runs on one process in this version; set "
            "parallel=single, or run the other stages one by one with stage=NAME"
        )
    return stages


class Runner:
    """The stages of one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.outputs).absolute()
        self._wanted: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {}

    def wanted(self, stage: str) -> tuple[dict[str, Any], dict[str, str], str]:
        """(what the stage depends on, ids of its inputs, its own id)."""
        if stage not in self._wanted:
            # Through JSON and back, as the manifest holds it.
            depends_on = json.loads(
                json.dumps(stage_module(stage).depends_on(self.config), default=str)
            )
            inputs = {name: self.wanted(name)[2] for name in stage_inputs(stage, self.config)}
            self._wanted[stage] = depends_on, inputs, digest([stage, depends_on, inputs])
        return self._wanted[stage]

    def folder(self, stage: str) -> Path:
        """Where the stage's finished folder lies, or will lie."""
        if stage in SHARED:
            return self.root / "artifacts" / stage / self.wanted(stage)[2]
        return self.root / self.config.name / self.config.variant / stage

    def finished(self, stage: str) -> Path:
        """The finished folder of an input; StageError where it is absent or of another config."""
        folder = self.folder(stage)
        manifest = read_manifest(folder)
        if manifest is None or manifest["id"] != self.wanted(stage)[2]:
            state = "is missing" if manifest is None else "was made with another configuration"
            raise StageError(f"{folder}: {state}; run stage={stage} first")
        return folder

    def _partial_folder(self, stage: str, final: Path, log_: logging.Logger) -> Path:
        """The folder to write in: what a killed run left of a resumable stage, or a new one."""
        depends_on, inputs, _ = self.wanted(stage)
        out = final.with_name(final.name + ".partial")
        # A forced run that was stopped goes on by the same command; it drops only others' work.
        record = {"config": depends_on, "inputs": inputs, "forced": self.config.force}
        if out.exists():
            try:
                left = json.loads((out / PARTIAL).read_text())
            except (OSError, json.JSONDecodeError):
                left = None
            resumable = getattr(stage_module(stage), "RESUMABLE", False)
            if resumable and left == record:
                log_.info("continuing what an earlier run left")
                return out
            if resumable and left is not None and left != record and not self.config.force:
                raise StageError(
                    f"{out}: holds unfinished work of another configuration ("
                    + "; ".join(changed_keys(left, record))
                    + "); choose variant=NAME for the new one, or force=true to drop the old"
                )
            shutil.rmtree(out)
        out.mkdir(parents=True)
        (out / PARTIAL).write_text(json.dumps(record, default=str) + "\n")
        return out

    def run(self, stage: str) -> dict[str, Any]:
        """Run one stage unless its finished folder still matches; its counts.

        One process at a time: another that wants the same folder waits, and then skips.
        """
        final = self.folder(stage)
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        name = str(final.relative_to(self.root)).replace("/", "--")
        with (locks / name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: another process is at work in %s; waiting", stage, final)
                fcntl.flock(lock, fcntl.LOCK_EX)
            return self._run_alone(stage)

    def _run_alone(self, stage: str) -> dict[str, Any]:
        stage_log = logging.getLogger(f"longgen.{stage}")
        force = self.config.force or getattr(stage_module(stage), "ALWAYS", False)
        depends_on, inputs, wanted_id = self.wanted(stage)
        final = self.folder(stage)
        manifest = read_manifest(final)
        if manifest and manifest["id"] == wanted_id and not force:
            log.info("%s: up to date, skipped (%s)", stage, final)
            return manifest["counts"]
        if manifest and not force:
            old = {"config": manifest["config"], "inputs": manifest["inputs"]}
            changes = changed_keys(old, {"config": depends_on, "inputs": inputs})
            raise StageError(
                f"{final}: was made with another configuration ({'; '.join(changes)}); choose "
                "variant=NAME to keep it, or force=true to redo it"
            )
        for name in inputs:
            self.finished(name)
        log.info("%s: starts", stage)
        started = time.time()
        with _disk_errors(final):
            out = self._partial_folder(stage, final, stage_log)
            context = StageContext(self.config, out, self.finished, stage_log)
            counts = stage_module(stage).run(context)
            finish(out, final, stage, depends_on, inputs, counts, started)
        # Not before: where the manifest cannot be written, the work can still be continued.
        (final / PARTIAL).unlink()
        log.info("%s: done in %.1f s", stage, time.time() - started)
        return counts


def execute(composed: DictConfig) -> int:
    """Run what the configuration names; the process's exit code."""
    _log_to_terminal()
    try:
        config = parse(composed)
        runner = Runner(config)
        stages = stages_of(config)
        log.info("experiment %s, variant %s, device %s", config.name, config.variant, config.device)
        for stage in stages:
            counts = runner.run(stage)
    except USER_ERRORS as error:
        log.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; the same command continues")
        return 130
    except StageStopped as stopped:
        log.error("%s; the same command continues", stopped)
        return stopped.exit_code
    if "summary" in counts:
        for line in counts["summary"]:
            log.info("%s", line)
        log.info("%s", runner.folder(stages[-1]) / "index.html")
    return 0

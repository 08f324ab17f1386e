"""Where each stage's folder lies, and whether what is there is this configuration's."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep.sources import DataError
from pipeline.changes import describe_changes
from pipeline.contents import Entry, SourceFiles, look
from pipeline.longer_run import begin_longer, lengthens
from pipeline.manifest import (
    MANIFEST,
    PARTIAL,
    DamagedRecord,
    StageError,
    read_manifest,
    read_record,
    stage_id,
    write_record,
)
from pipeline.schema import CHAIN, Config
from pipeline.schema_of_eval import task_packages

log = logging.getLogger("longgen")

# Stages whose results controls, seeds and ablations share.
SHARED = ("fetch", "fetch_tasks", "data_prep", "convert")
# In a run's folder: of each stage, what its source files held when the run last looked at them.
SOURCES = "sources"


def stage_module(stage: str) -> ModuleType:
    """A stage's module: INPUTS (names, or a function of the configuration), depends_on, run, and
    perhaps check, source_files (see SourceFiles) and relink."""
    return importlib.import_module(f"pipeline.stages.{stage}")


def trait(stage: str, name: str, default: Any = None) -> Any:
    """What a stage's module says under `name`."""
    return getattr(stage_module(stage), name, default)


def stage_inputs(stage: str, config: Config) -> tuple[str, ...]:
    """Names of the stages whose folders this one reads under this configuration."""
    inputs = trait(stage, "INPUTS")
    return inputs(config) if callable(inputs) else inputs


def stage_files(stage: str, config: Config) -> dict[str, SourceFiles]:
    """The files outside the outputs that a stage reads, by the names of its own."""
    return trait(stage, "source_files", lambda config: {})(config)


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages that the configuration names, in order."""
    stages = CHAIN if config.stage == "chain" else (config.stage,)
    if config.export.source == "convert" and config.stage == "chain":
        stages = tuple(stage for stage in stages if stage != "finetune")
    if config.stage == "chain" and task_packages(config.eval):
        stages = (stages[0], "fetch_tasks", *stages[1:])
    return stages


def _another(stage: str) -> str:
    """The key that gives the stage another folder."""
    return trait(stage, "ANOTHER", "variant=NAME")


def _is_used(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


class StageFolders:
    """The folders of all stages under one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.outputs).absolute()
        self.run_folder = self.root / config.name / config.variant
        self._wanted: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {}

    def wanted(self, stage: str) -> tuple[dict[str, Any], dict[str, str], str]:
        """(what the stage depends on, ids of its inputs, its own id)."""
        if stage not in self._wanted:
            # Through JSON and back, as the manifest holds it.
            depends_on = json.loads(
                json.dumps(trait(stage, "depends_on")(self.config), default=str)
            )
            if files := stage_files(stage, self.config):
                depends_on["source_files"] = self._entries(stage, files)
            inputs = {name: self._input_id(name) for name in stage_inputs(stage, self.config)}
            self._wanted[stage] = depends_on, inputs, stage_id(stage, depends_on, inputs)
        return self._wanted[stage]

    def _entries(self, stage: str, sources: dict[str, SourceFiles]) -> dict[str, Entry]:
        """What is known of the stage's source files.

        A stage that the command names looks at them. Else, and where they are gone, what the run
        or a finished folder has recorded of the same place holds: training that goes on and an
        export need no text.
        """
        own = read_record(self._remembered(stage)) or {}
        made = list(self._recorded(stage))
        found = {}
        for name, files in sources.items():
            known = [entries[name] for entries in (own, *made) if name in entries]
            there = [entry for entry in known if entry["place"] == files.place]
            if stage not in stages_of(self.config) and own.get(name) in there:
                found[name] = own[name]
                continue
            try:
                found[name] = look(files, known)
            except (StageError, DataError) as error:
                if not there:
                    raise
                reason = str(error).partition(";")[0]
                log.info("%s: %s; going by the content that was recorded of it", stage, reason)
                found[name] = there[0]
        return found

    def _recorded(self, stage: str) -> Iterator[dict[str, Entry]]:
        """Source files in the manifests of the stage's finished folders, the newest first."""
        paths = (self.root / "artifacts" / stage).glob(f"*/{MANIFEST}")
        manifests = [read_manifest(path.parent) or {} for path in paths]
        for manifest in sorted(manifests, key=lambda m: m.get("finished", ""), reverse=True):
            yield manifest.get("config", {}).get("source_files", {})

    def _remembered(self, stage: str) -> Path:
        return self.run_folder / SOURCES / f"{stage}.json"

    def remember(self) -> None:
        """Record the source files of the stages that were looked up, for the run's next command."""
        for stage, (depends_on, _, _) in self._wanted.items():
            entries, path = depends_on.get("source_files"), self._remembered(stage)
            if entries and entries != read_record(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_record(path, entries)

    def _input_id(self, stage: str) -> str:
        """The id that an input must have: of a stage that is read AS_RECORDED, the one it has."""
        manifest = read_manifest(self.folder(stage)) if trait(stage, "AS_RECORDED") else None
        if manifest is None or not self._same_inputs(stage, manifest):
            return self.wanted(stage)[2]
        return manifest["id"]

    def _same_inputs(self, stage: str, manifest: dict[str, Any]) -> bool:
        wanted = self.wanted(stage)[1]
        both = wanted.keys() & manifest["inputs"].keys()
        return all(wanted[name] == manifest["inputs"][name] for name in both)

    def folder(self, stage: str) -> Path:
        """Where the stage's finished folder lies, or will lie."""
        if stage in SHARED:
            return self.root / "artifacts" / stage / self.wanted(stage)[2]
        named = trait(stage, "folder_name")
        return self.run_folder / (named(self.config) if named else stage)

    def partial(self, stage: str) -> Path:
        """Where the stage is written before it is finished."""
        final = self.folder(stage)
        return final.with_name(final.name + ".partial")

    def finished(self, stage: str) -> Path:
        """The finished folder of an input; StageError where it is absent or of another config."""
        folder = self.folder(stage)
        manifest = read_manifest(folder)
        if manifest is None:
            raise StageError(f"{folder}: is missing; run stage={stage} first")
        if manifest["id"] != self._input_id(stage):
            longer = lengthens(stage_module(stage), manifest, *self.wanted(stage)[:2])
            raise StageError(
                f"{folder}: was made with another configuration "
                f"({self._changes(stage, manifest)}); set that as it was, choose another "
                f"variant=NAME, or redo it first by stage={stage}{'' if longer else ' force=true'}"
            )
        if relink := trait(stage, "relink"):
            relink(self.config, folder)
        return folder

    def current(self, stage: str) -> dict[str, Any] | None:
        """The manifest of the finished folder where it is as wanted; None: the stage must run.

        Raises:
            StageError: where the folder is another configuration's or has no manifest, or an
                input is missing.
        """
        force = self.config.force or trait(stage, "ALWAYS")
        depends_on, inputs, wanted_id = self.wanted(stage)
        final = self.folder(stage)
        try:
            manifest = read_manifest(final)
        except DamagedRecord:
            if not force:
                raise
            manifest = None
        if manifest and manifest["id"] == wanted_id and not force:
            return manifest
        if manifest and lengthens(stage_module(stage), manifest, depends_on, inputs):
            force = True
        # A finished folder is replaced where force=true asks for it, and a report, which is cheap.
        if not force and not trait(stage, "REMADE"):
            if manifest:
                raise StageError(
                    f"{final}: was made with another configuration "
                    f"({self._changes(stage, manifest)}); choose {_another(stage)} to keep it, or "
                    "force=true to redo it"
                )
            if _is_used(final):
                raise StageError(
                    f"{final}: has no {MANIFEST}, which says what the folder holds; restore that "
                    "file, move the folder away, or force=true to redo it"
                )
        for name in inputs:
            self.finished(name)
        return None

    def upstream(self, stage: str) -> dict[str, Any]:
        """What every stage before this one depends on, by its name, in the order of the chain."""
        found: dict[str, Any] = {}
        for name in self.wanted(stage)[1]:
            found |= self.upstream(name) | {name: self.wanted(name)[0]}
        return found

    def _changes(self, stage: str, old: dict[str, Any]) -> str:
        """In which keys and files a folder's manifest differs from this configuration, in words."""
        depends_on, inputs, _ = self.wanted(stage)
        now = self.upstream(stage) | {stage: depends_on}
        return describe_changes(old, stage, now, inputs, self.config, stage_files)

    def partial_folder(self, stage: str, stage_log: logging.Logger) -> Path:
        """The folder to write in: what a killed run left of a resumable stage, or a new one.

        Raises:
            StageError: where unfinished work is there that is another configuration's, or of which
                it cannot be read what it is. Only force=true drops it.
        """
        depends_on, inputs, wanted_id = self.wanted(stage)
        out, force = self.partial(stage), self.config.force
        record = {"id": wanted_id, "forced": force, "config": depends_on, "inputs": inputs}
        record |= {"upstream": self.upstream(stage), "started": time.time()}
        there = stage_module(stage), self.folder(stage), out, PARTIAL
        if not force and begin_longer(*there, record):
            return out
        if _is_used(out):
            if trait(stage, "RESUMABLE"):
                try:
                    left = read_record(out / PARTIAL)
                except DamagedRecord:
                    left = {}
                # A forced run that was stopped goes on by the same command.
                if left and (left.get("id"), left.get("forced", False)) == (wanted_id, force):
                    stage_log.info("continuing what an earlier run left")
                    return out
                if not force:
                    self._refuse_to_drop(stage, left)
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        write_record(out / PARTIAL, record)
        return out

    def _refuse_to_drop(self, stage: str, left: dict[str, Any] | None) -> None:
        out, wanted_id = self.partial(stage), self.wanted(stage)[2]
        remedy = f"choose {_another(stage)} for the new one, or force=true to drop the old"
        if not left:
            state = "is missing" if left is None else "is damaged"
            record = json.dumps({"id": wanted_id})
            raise StageError(
                f"{out}: holds unfinished work, and {PARTIAL}, which says of what configuration, "
                f"{state}; if it is this one's, continue it after: echo '{record}' > "
                f"{out / PARTIAL}; else {remedy}"
            )
        changes = self._changes(stage, left) if "config" in left else f"id {left.get('id')}"
        raise StageError(
            f"{out}: holds unfinished work of another configuration "
            f"({changes or 'it was begun with force=true'}); {remedy}"
        )

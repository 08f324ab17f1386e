"""Runs stages in order: skips what is finished, redoes what changed, says why it stops.

A stage whose module says DISTRIBUTED runs on as many processes as the configuration has GPUs: this
process starts them (pipeline/workers.py), or torchrun has, and this is one (pipeline/team.py).
Rank 0 then decides, as a process alone does, and the others follow.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data_prep.sources import DataError
from model.mapping import MappingError
from model.weights import WeightsError
from pipeline.advice import advice
from pipeline.changes import describe_changes
from pipeline.console_log import NAME, console_log, log_to_terminal
from pipeline.locks import Locked, lock
from pipeline.manifest import (
    StageContext,
    StageError,
    StageStopped,
    digest,
    disk_errors,
    finish,
    read_manifest,
)
from pipeline.schema import CHAIN, Config
from pipeline.schema_of_eval import task_packages
from pipeline.team import NOTICE, RankFailed, Team, launched
from pipeline.validation import ConfigError, parse
from pipeline.workers import INTERRUPTED, USER_ERROR, WorkersEnded, run_workers

log = logging.getLogger("longgen")

# What a user can mend: said in one line, without a traceback.
USER_ERRORS = (ConfigError, StageError, DataError, MappingError, WeightsError)
# Stages whose results controls, seeds and ablations share.
SHARED = ("fetch", "fetch_tasks", "data_prep", "convert")
PARTIAL = "partial.json"


def stage_module(stage: str) -> ModuleType:
    """A stage's module: INPUTS (names, or a function of the configuration), depends_on, run, and
    perhaps check."""
    return importlib.import_module(f"pipeline.stages.{stage}")


def stage_inputs(stage: str, config: Config) -> tuple[str, ...]:
    """Names of the stages whose folders this one reads under this configuration."""
    inputs = stage_module(stage).INPUTS
    return inputs(config) if callable(inputs) else inputs


def _another(stage: str) -> str:
    """The key that gives the stage another folder."""
    return getattr(stage_module(stage), "ANOTHER", "variant=NAME")


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages that the configuration names, in order."""
    stages = CHAIN if config.stage == "chain" else (config.stage,)
    if config.export.source == "convert" and config.stage == "chain":
        stages = tuple(stage for stage in stages if stage != "finetune")
    if config.stage == "chain" and task_packages(config.eval):
        stages = (stages[0], "fetch_tasks", *stages[1:])
    return stages


def is_distributed(stage: str) -> bool:
    """Whether the stage runs on every process of the configured world, and not on one."""
    return getattr(stage_module(stage), "DISTRIBUTED", False)


def processes(stage: str, config: Config) -> int:
    """How many processes the stage runs on: the configured world, unless its module says another
    number."""
    own = getattr(stage_module(stage), "processes", None)
    if own is not None:
        return own(config)
    return config.parallel.nodes * config.parallel.gpus_per_node if is_distributed(stage) else 1


def refuse_processes(config: Config, stages: Sequence[str], team: Team) -> None:
    """Raise ConfigError where the stages cannot run on these processes, before any work."""
    together = [stage for stage in stages if is_distributed(stage)]
    alone = [stage for stage in stages if stage not in together]
    if team.size > 1 and alone:
        raise ConfigError(
            f"stage={config.stage}: {team.size} processes were started, and each would do "
            f"{alone[0]} as a whole; set stage=finetune, and run other stages by python "
            "pipeline/run.py stage=NAME, without torchrun"
        )
    parallel = config.parallel
    here = parallel.gpus_per_node
    wanted = max((processes(stage, config) for stage in together), default=1)
    if launched() or wanted == 1:
        return
    if wanted != parallel.nodes * here:
        if config.device == "cuda" and wanted > torch.cuda.device_count():
            raise ConfigError(
                f"{together[0]}.tensor={wanted}: this machine shows {torch.cuda.device_count()} "
                f"CUDA GPUs; set {together[0]}.tensor to as many at most, or device=cpu"
            )
        return
    if parallel.nodes > 1:
        raise ConfigError(
            f"parallel.nodes={parallel.nodes}: this process starts workers on its own machine "
            f"only; run {together[0]} by torchrun on every node (torchrun "
            f"--nnodes={parallel.nodes} --nproc-per-node={here} ... pipeline/run.py "
            f"stage={together[0]}; under Slurm: srun torchrun ...), and other stages one by one by "
            "python pipeline/run.py stage=NAME"
        )
    if config.device == "cuda" and here > torch.cuda.device_count() and not parallel.share_gpus:
        raise ConfigError(
            f"parallel.gpus_per_node={here}: this machine shows {torch.cuda.device_count()} CUDA "
            "GPUs; set parallel.gpus_per_node to as many at most, or device=cpu; to check how a "
            "layout trains, slowly: parallel.share_gpus=true"
        )


class Runner:
    """The stages of one configuration."""

    def __init__(
        self, config: Config, team: Team | None = None, arguments: Sequence[str] = ()
    ) -> None:
        """`arguments`: what Python is given to start this run again, as one of several workers."""
        self.config = config
        self.team = team or Team()
        self.arguments = arguments
        self.root = Path(config.outputs).absolute()
        self._wanted: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {}

    def wanted(self, stage: str) -> tuple[dict[str, Any], dict[str, str], str]:
        """(what the stage depends on, ids of its inputs, its own id)."""
        if stage not in self._wanted:
            # Through JSON and back, as the manifest holds it.
            depends_on = json.loads(
                json.dumps(stage_module(stage).depends_on(self.config), default=str)
            )
            inputs = {name: self._input_id(name) for name in stage_inputs(stage, self.config)}
            self._wanted[stage] = depends_on, inputs, digest([stage, depends_on, inputs])
        return self._wanted[stage]

    def _input_id(self, stage: str) -> str:
        """The id that an input must have: of a stage that is read AS_RECORDED, the one it has."""
        recorded = getattr(stage_module(stage), "AS_RECORDED", False)
        manifest = read_manifest(self.folder(stage)) if recorded else None
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
        named = getattr(stage_module(stage), "folder_name", None)
        name = named(self.config) if named else stage
        return self.root / self.config.name / self.config.variant / name

    def partial(self, stage: str) -> Path:
        """Where the stage is written before it is finished."""
        final = self.folder(stage)
        return final.with_name(final.name + ".partial")

    def after_stop(self, stage: str) -> str:
        """What the same command does where the stage was stopped before its end."""
        module = stage_module(stage)
        if not getattr(module, "RESUMABLE", False):
            return f"{stage} saved nothing; the same command starts it again"
        if not hasattr(module, "saved_step"):
            return "the same command continues"
        step = module.saved_step(self.partial(stage))
        if step == 0:
            return "no checkpoint was saved; the same command starts again from step 0"
        return f"the same command continues from step {step}"

    def finished(self, stage: str) -> Path:
        """The finished folder of an input; StageError where it is absent or of another config."""
        folder = self.folder(stage)
        manifest = read_manifest(folder)
        if manifest is None:
            raise StageError(f"{folder}: is missing; run stage={stage} first")
        if manifest["id"] != self._input_id(stage):
            raise StageError(
                f"{folder}: was made with another configuration "
                f"({self._changes(stage, manifest)}); set that as it was, choose another "
                f"variant=NAME, or redo it first by stage={stage} force=true"
            )
        return folder

    def _upstream(self, stage: str) -> dict[str, Any]:
        """What every stage before this one depends on, by its name, in the order of the chain."""
        found: dict[str, Any] = {}
        for name in self.wanted(stage)[1]:
            found |= self._upstream(name) | {name: self.wanted(name)[0]}
        return found

    def _changes(self, stage: str, old: dict[str, Any]) -> str:
        """In which keys and files a folder's manifest differs from this configuration, in words."""
        depends_on, inputs, _ = self.wanted(stage)
        now = self._upstream(stage) | {stage: depends_on}
        return describe_changes(old, stage, now, inputs, self.config, stage_module)

    def _partial_folder(self, stage: str, log_: logging.Logger) -> Path:
        """The folder to write in: what a killed run left of a resumable stage, or a new one."""
        depends_on, inputs, _ = self.wanted(stage)
        out = self.partial(stage)
        # A forced run that was stopped goes on by the same command; it drops only others' work.
        record = {"config": depends_on, "inputs": inputs, "forced": self.config.force}
        if out.exists():
            try:
                left = json.loads((out / PARTIAL).read_text())
                same = all(left[key] == value for key, value in record.items())
            except (OSError, json.JSONDecodeError, KeyError):
                left, same = None, False
            resumable = getattr(stage_module(stage), "RESUMABLE", False)
            if resumable and same:
                log_.info("continuing what an earlier run left")
                return out
            if resumable and left is not None and not self.config.force:
                raise StageError(
                    f"{out}: holds unfinished work of another configuration "
                    f"({self._changes(stage, left) or 'it was begun with force=true'}); choose "
                    f"{_another(stage)} for the new one, or force=true to drop the old"
                )
            shutil.rmtree(out)
        out.mkdir(parents=True)
        record |= {"upstream": self._upstream(stage), "started": time.time()}
        (out / PARTIAL).write_text(json.dumps(record, default=str) + "\n")
        return out

    def run(self, stage: str) -> dict[str, Any]:
        """Run one stage unless its finished folder still matches; its counts.

        One run at a time: another that wants the same folder waits, and then skips; of a stage
        that is EXCLUSIVE it is refused.
        """
        if self.team.rank > 0:
            return self._follow(stage)
        size = processes(stage, self.config)
        with self._lock(stage):
            counts = self._current(stage)
            if counts is None and (launched() or size == 1):
                counts = self._work(stage)
        return self._employ(stage, size) if counts is None else counts

    def check(self, stage: str) -> None:
        """Let the stage refuse what it has made, or found made, where this run cannot use it."""
        if own := getattr(stage_module(stage), "check", None):
            own(self.config, self.folder(stage), logging.getLogger(f"longgen.{stage}"))

    @contextmanager
    def _lock(self, stage: str) -> Iterator[None]:
        final = self.folder(stage)
        path = self.root / ".locks" / str(final.relative_to(self.root)).replace("/", "--")
        with ExitStack() as held:
            try:
                held.enter_context(lock(path))
            except Locked:
                if getattr(stage_module(stage), "EXCLUSIVE", False):
                    raise StageError(
                        f"{final}: another process is at work there; wait until stage={stage} is "
                        "done, and run this again"
                    ) from None
                log.info("%s: another process is at work in %s; waiting", stage, final)
                held.enter_context(lock(path, wait=True))
            yield

    def _current(self, stage: str) -> dict[str, Any] | None:
        """Counts of the finished folder where it still matches; None where the stage must run.

        Raises:
            StageError: where the folder is another configuration's, or an input is missing.
        """
        force = self.config.force or getattr(stage_module(stage), "ALWAYS", False)
        _, inputs, wanted_id = self.wanted(stage)
        final = self.folder(stage)
        manifest = read_manifest(final)
        if manifest and manifest["id"] == wanted_id and not force:
            log.info("%s: up to date, skipped (%s)", stage, final)
            self.team.tell("decision", {"counts": manifest["counts"]})
            return manifest["counts"]
        if manifest and not force and not getattr(stage_module(stage), "REMADE", False):
            raise StageError(
                f"{final}: was made with another configuration "
                f"({self._changes(stage, manifest)}); choose {_another(stage)} to keep it, or "
                "force=true to redo it"
            )
        for name in inputs:
            self.finished(name)
        return None

    def _work(self, stage: str) -> dict[str, Any]:
        """Run the stage into its partial folder, and rename that once every rank is done."""
        stage_log = logging.getLogger(f"longgen.{stage}")
        depends_on, inputs, _ = self.wanted(stage)
        final = self.folder(stage)
        log.info("%s: starts", stage)
        started = time.time()
        with disk_errors(final):
            out = self._partial_folder(stage, stage_log)
            self.team.tell("decision", {"out": str(out)})
            context = self._context(out, stage_log)
            counts = stage_module(stage).run(context)
            self.team.meet("ran")
            upstream = self._upstream(stage)
            finish(out, final, stage, depends_on, inputs, upstream, counts, started)
        # Not before: where the manifest cannot be written, the work can still be continued.
        (final / PARTIAL).unlink()
        self.team.tell("counts", counts)
        log.info("%s: done in %.1f s", stage, time.time() - started)
        return counts

    def _context(self, out: Path, stage_log: logging.Logger) -> StageContext:
        team = self.team
        return StageContext(
            self.config, out, self.finished, stage_log, team.rank, team.size, team.meet
        )

    def _follow(self, stage: str) -> dict[str, Any]:
        """What a rank beside rank 0 does: what rank 0 has decided."""
        decision = self.team.hear("decision")
        if "counts" in decision:
            return decision["counts"]
        stage_log = logging.getLogger(f"longgen.{stage}")
        out = Path(decision["out"])
        with disk_errors(out):
            stage_module(stage).run(self._context(out, stage_log))
        self.team.meet("ran")
        return self.team.hear("counts")

    def _employ(self, stage: str, size: int) -> dict[str, Any]:
        """Let `size` workers run the stage, of which the first does what this process would."""
        final = self.folder(stage)
        before = read_manifest(final)
        latest = self.partial(stage) / "checkpoints" / "latest"
        log.info("%s: starting %d processes", stage, size)
        run_workers(
            [*self.arguments, f"stage={stage}"],
            size,
            self.config.parallel.restarts,
            reached=lambda: latest.read_text().strip() if latest.exists() else None,
            finished=lambda: read_manifest(final) not in (None, before),
        )
        return read_manifest(final)["counts"]


def _join() -> Team:
    """The team of this process; of several, rank 0 speaks for all."""
    team = Team.join()
    if team.size > 1:
        log.handlers[0].addFilter(team.says)
    if team.rank > 0:
        log.setLevel(logging.WARNING)
        warnings.simplefilter("ignore")
    return team


def execute(composed: DictConfig, arguments: Sequence[str] = ()) -> int:
    """Run what the configuration names; the process's exit code.

    `arguments`: what Python is given to start this same run in another process.
    """
    # What other stages log is what they print; of generate that is the answer alone.
    answers = OmegaConf.select(composed, "stage") == "generate"
    log_to_terminal("stderr" if answers else "stdout")
    with ExitStack() as files:
        return _execute(composed, arguments, files)


def _execute(composed: DictConfig, arguments: Sequence[str], files: ExitStack) -> int:
    team, stage = Team(), None
    try:
        team = _join()
        config = parse(composed)
        runner = Runner(config, team, arguments)
        stages = stages_of(config)
        refuse_processes(config, stages, team)
        of = f", {team.size} processes" if team.size > 1 else ""
        told = config.name, config.variant, config.device, of
        files.enter_context(console_log(runner.root / config.name / config.variant / NAME))
        log.info("experiment %s, variant %s, device %s%s", *told)
        for line in advice(config, stages, arguments):
            log.warning("%s", line)
        for stage in stages:
            counts = runner.run(stage)
            runner.check(stage)
    except USER_ERRORS as error:
        first = team.fail(USER_ERROR)
        team.say(str(error))
        return first.exit_code
    except WorkersEnded as ended:
        if str(ended):
            log.error("%s; %s", ended, runner.after_stop(stage))
        return ended.exit_code
    except RankFailed as failed:
        return failed.exit_code
    except KeyboardInterrupt:
        team.fail(INTERRUPTED)
        if team.rank == 0:
            log.error("interrupted; %s", runner.after_stop(stage) if stage else "nothing was begun")
        return INTERRUPTED
    except StageStopped as stopped:
        if team.rank == 0:
            log.error("%s; %s", stopped, runner.after_stop(stage))
        # A launcher would close those that are still about to leave.
        with suppress(RankFailed):
            team.meet("stopped")
        return stopped.exit_code
    except Exception as error:
        first = team.fail(1, wait=NOTICE)
        if first.rank == team.rank:
            raise
        # Mostly that the first one no longer answers: its own words are the ones to read.
        if first.exit_code != USER_ERROR:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.error("rank %d: %s (rank %d failed first)", team.rank, reason, first.rank)
        return first.exit_code
    if "summary" in counts:
        for line in counts["summary"]:
            log.info("%s", line)
        log.info("%s", runner.folder(stages[-1]) / "index.html")
    return 0

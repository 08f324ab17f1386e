"""Runs stages in order: skips what is finished, redoes what changed, says why it stops.

A stage whose module says DISTRIBUTED runs on as many processes as the configuration has GPUs: this
process starts them (pipeline/workers.py), or torchrun has, and this is one (pipeline/team.py).
Rank 0 then decides, as a process alone does, and the others follow.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data_prep.sources import DataError
from model.mapping import MappingError
from model.weights import WeightsError
from pipeline.advice import advice
from pipeline.console_log import NAME, console_log, log_to_terminal
from pipeline.locks import Locked, lock
from pipeline.manifest import (
    PARTIAL,
    StageContext,
    StageError,
    StageStopped,
    disk_errors,
    finish,
    read_manifest,
)
from pipeline.schema import Config
from pipeline.stage_folders import StageFolders, stages_of, trait
from pipeline.team import NOTICE, RankFailed, Team, launched
from pipeline.validation import ConfigError, parse
from pipeline.workers import INTERRUPTED, USER_ERROR, WorkersEnded, run_workers

log = logging.getLogger("longgen")

# What a user can mend: said in one line, without a traceback.
USER_ERRORS = (ConfigError, StageError, DataError, MappingError, WeightsError)


def is_distributed(stage: str) -> bool:
    """Whether the stage runs on every process of the configured world, and not on one."""
    return trait(stage, "DISTRIBUTED", False)


def processes(stage: str, config: Config) -> int:
    """How many processes the stage runs on: the configured world, unless its module says another
    number."""
    if own := trait(stage, "processes"):
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


class Runner(StageFolders):
    """Runs the stages of one configuration."""

    def __init__(
        self, config: Config, team: Team | None = None, arguments: Sequence[str] = ()
    ) -> None:
        """`arguments`: what Python is given to start this run again, as one of several workers."""
        super().__init__(config)
        self.team = team or Team()
        self.arguments = arguments

    def after_stop(self, stage: str) -> str:
        """What the same command does where the stage was stopped before its end."""
        if not trait(stage, "RESUMABLE"):
            return f"{stage} saved nothing; the same command starts it again"
        saved_step = trait(stage, "saved_step")
        if saved_step is None:
            return "the same command continues"
        step = saved_step(self.partial(stage))
        if step == 0:
            return "no checkpoint was saved; the same command starts again from step 0"
        return f"the same command continues from step {step}"

    def run(self, stage: str) -> dict[str, Any]:
        """Run one stage unless its finished folder still matches; its counts.

        One run at a time: another that wants the same folder waits, and then skips; of a stage
        that is EXCLUSIVE it is refused.
        """
        if self.team.rank > 0:
            return self._follow(stage)
        size = processes(stage, self.config)
        final, counts = self.folder(stage), None
        with self._lock(stage), disk_errors(final):
            if manifest := self.current(stage):
                log.info("%s: up to date, skipped (%s)", stage, final)
                counts = manifest["counts"]
                self.team.tell("decision", {"counts": counts})
            self.remember()
            if counts is None and (launched() or size == 1):
                counts = self._work(stage)
        return self._employ(stage, size) if counts is None else counts

    def check(self, stage: str) -> None:
        """Let the stage refuse what it has made, or found made, where this run cannot use it."""
        if own := trait(stage, "check"):
            own(self.config, self.folder(stage), logging.getLogger(f"longgen.{stage}"))

    @contextmanager
    def _lock(self, stage: str) -> Iterator[None]:
        final = self.folder(stage)
        path = self.root / ".locks" / str(final.relative_to(self.root)).replace("/", "--")
        with ExitStack() as held:
            try:
                held.enter_context(lock(path))
            except Locked:
                if trait(stage, "EXCLUSIVE"):
                    raise StageError(
                        f"{final}: another process is at work there; wait until stage={stage} is "
                        "done, and run this again"
                    ) from None
                log.info("%s: another process is at work in %s; waiting", stage, final)
                held.enter_context(lock(path, wait=True))
            yield

    def _work(self, stage: str) -> dict[str, Any]:
        """Run the stage into its partial folder, and rename that once every rank is done."""
        stage_log = logging.getLogger(f"longgen.{stage}")
        depends_on, inputs, _ = self.wanted(stage)
        final = self.folder(stage)
        log.info("%s: starts", stage)
        started = time.time()
        out = self.partial_folder(stage, stage_log)
        self.team.tell("decision", {"out": str(out)})
        counts = trait(stage, "run")(self._context(out, stage_log))
        self.team.meet("ran")
        finish(out, final, stage, depends_on, inputs, self.upstream(stage), counts, started)
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
            trait(stage, "run")(self._context(out, stage_log))
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
        files.enter_context(console_log(runner.run_folder / NAME))
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

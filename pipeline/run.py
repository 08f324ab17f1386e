"""The one entry: `python pipeline/run.py [experiment=NAME] [stage=NAME] [key=value ...]`."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first on sys.path, where `tasks` or `stages` would hide others.
sys.path[0] = str(ROOT)
# Before torch is imported: else tensors of 128K rows leave gaps that others do not fit into, 14% of
# an H200's memory (146 GB reserved for 128 GB).
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Before OpenMP (libgomp) is loaded. A thread that spins long at a barrier takes the core from the
# one it waits for, where others use the CPU too; one that never spins loses as much on an idle CPU.
# As many turns as this cost least: docs/results/openmp_waiting.json.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

try:
    import hydra
except ModuleNotFoundError:
    message = "hydra is not installed in this Python; run `make setup`, then .venv/bin/python"
    sys.exit(f"error: {message} {' '.join(sys.argv)}")
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from pipeline import command_line  # noqa: E402
from pipeline.command_help import show_help  # noqa: E402
from pipeline.overrides import with_experiment  # noqa: E402
from pipeline.refusals import USER_ERROR  # noqa: E402
from pipeline.schema import register_defaults  # noqa: E402

register_defaults()
# megatron-core warns on every start that apex and Transformer Engine are absent: none is used.
warnings.filterwarnings("ignore", module="megatron", category=UserWarning)
# DeepSpeed's ZeRO still calls torch's collectives by the names that torch 2.13 deprecates.
warnings.filterwarnings(
    "ignore", "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated"
)


def _same_run() -> list[str]:
    """What Python is given to start this run again, also where it is one of a --multirun."""
    run = HydraConfig.get()
    places = {"main": "--config-path", "command-line": "--config-dir"}
    folders = [
        text
        for source in run.runtime.config_sources
        if source.provider in places
        for text in (places[source.provider], source.path)
    ]
    # As they were written: what is quoted in them is quoted again.
    overrides = OmegaConf.to_container(run.overrides.task, resolve=False)
    return [__file__, "--config-name", run.job.config_name, *folders, *overrides]


def _run(composed: DictConfig) -> int:
    """Run what the configuration names; the exit code."""
    # Brings torch: seconds that --help and a command line with a mistake are not to take.
    from pipeline.runner import execute

    try:
        return execute(composed, _same_run())
    except Exception:
        traceback.print_exc()
        return 1


def _run_swept(typed: list[str]) -> int:
    """Run one job of a --multirun, in a variant of its own; the exit code."""
    job = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    variant = command_line.sweep_variant(typed, job)
    own = [f"variant={variant}"] if variant else []
    print(f"sweep: {' '.join([*job, *own])}", file=sys.stderr, flush=True)
    return command_line.run_job([*_same_run(), *own])


def main() -> None:
    """Run the stage, or the chain of stages, that the command line names.

    The exit code is that of the first job that failed; other jobs of a --multirun still run, unless
    one was asked to stop.
    """
    arguments = with_experiment(sys.argv[1:])
    shows_help = not {"-h", "--help"}.isdisjoint(arguments)
    sweeps = not {"-m", "--multirun"}.isdisjoint(arguments)
    # Hydra takes no override after a flag that stands between them.
    arguments = [text for text in arguments if text not in ("-m", "--multirun")]
    if shows_help:
        arguments = [text for text in arguments if text not in ("-h", "--help")]
    elif sweeps:
        arguments = ["--multirun", *arguments]
    else:
        arguments = command_line.with_plain_prompt(arguments)
    typed = [text for text in arguments if not text.startswith("-") and "=" in text]
    codes: list[int] = []
    if sweeps and "RANK" in os.environ:
        message = "--multirun starts the jobs one after another itself; run it without torchrun"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)

    def job(composed: DictConfig) -> None:
        if shows_help:
            show_help(composed)
        elif HydraConfig.get().mode == RunMode.MULTIRUN:
            codes.append(_run_swept(typed))
            if codes[-1] in command_line.STOPPED:
                sys.exit(codes[-1])
        else:
            codes.append(_run(composed))

    sys.argv[1:] = arguments
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra then raises what it cannot compose, and does not print it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(job)()
    except Exception as error:
        if traced:
            raise
        print(f"error: {command_line.explain(error, typed)}", file=sys.stderr)
        sys.exit(USER_ERROR)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = str(int(traced))
    failed = [code for code in codes if code]
    if sweeps and failed:
        print(f"sweep: {len(failed)} of {len(codes)} jobs failed", file=sys.stderr)
    if failed:
        sys.exit(failed[0])


if __name__ == "__main__":
    main()

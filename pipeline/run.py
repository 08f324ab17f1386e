"""The one entry: `python pipeline/run.py [experiment=NAME] [stage=NAME] [key=value ...]`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first on sys.path, where `tasks` or `stages` would hide others.
sys.path[0] = str(ROOT)
# Before torch is imported: else tensors of 128K rows leave gaps that others do not fit into, 14% of
# an H200's memory (146 GB reserved for 128 GB).
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Before OpenMP is loaded: a thread that spins at a barrier takes the core from the one that it
# waits for, and on a CPU that others use too, two threads are then slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from pipeline.runner import execute  # noqa: E402
from pipeline.schema import register_defaults  # noqa: E402

register_defaults()
# megatron-core warns on every start that apex and Transformer Engine are absent: none is used.
warnings.filterwarnings("ignore", module="megatron", category=UserWarning)


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
    return [__file__, "--config-name", run.job.config_name, *folders, *run.overrides.task]


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def main(composed: DictConfig) -> None:
    """Run the stage, or the chain of stages, that the configuration names."""
    code = execute(composed, _same_run())
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()

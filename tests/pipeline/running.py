"""What the tests of whole runs share: composed configurations and the lines that a run prints."""

import logging
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.runner import execute
from pipeline.schema import register_defaults

ROOT = Path(__file__).resolve().parents[2]
# What a launcher sets, or a process alone for itself.
WORLD = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)

register_defaults()


def alone() -> dict[str, str]:
    """The environment for a process of its own, without what another test's world has left."""
    return {key: value for key, value in os.environ.items() if key not in WORLD}


@cache
def defaults():
    """conf/config.yaml as composed; some tenths of a second, so done once."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=["experiment=tiny", "device=cpu", "wandb.mode=disabled"])


def composed(*overrides):
    """experiment=tiny on the CPU, without W&B, and with these keys set."""
    return OmegaConf.merge(defaults(), OmegaConf.from_dotlist(list(overrides)))


@contextmanager
def fresh_logger():
    """The runner's logger as a new process has it: its handler holds the stdout of that moment."""
    log = logging.getLogger("longgen")
    before = log.handlers[:], log.level, log.propagate
    log.handlers[:] = []
    try:
        yield
    finally:
        log.handlers[:] = before[0]
        log.setLevel(before[1])
        log.propagate = before[2]


def run(capsys, *overrides) -> tuple[int, list[str]]:
    """(exit code, printed lines without the time) of one command; errors reach no traceback."""
    capsys.readouterr()
    with fresh_logger():
        code = execute(composed(*overrides))
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    # stage=generate logs to standard error.
    return code, [line.partition(" ")[2] for line in (printed.out or printed.err).splitlines()]


def refused(capsys, *overrides) -> str:
    """The one line of a command that must be refused with exit code 2."""
    code, lines = run(capsys, *overrides)
    assert code == 2, lines
    assert [line.startswith("error: ") for line in lines].index(True) == len(lines) - 1, lines
    return lines[-1].removeprefix("error: ")

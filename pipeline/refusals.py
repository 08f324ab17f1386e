"""How a configuration is refused: with the value, what is legal, and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from pipeline.schema import Config

# The exit code of a command that its user can correct.
USER_ERROR = 2
MEANINGFUL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ConfigError(ValueError):
    """A configuration that is refused; the message names value, legal values and remedy."""


def refuse(key: str, value: Any, legal: str, remedy: str) -> None:
    """Raise ConfigError."""
    raise ConfigError(f"{key}={value!r}: {legal}; {remedy}")


def choice(config: Config, key: str, legal: tuple) -> None:
    """Refuse a value that is not one of `legal`."""
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    if value not in legal:
        refuse(key, value, f"must be one of {', '.join(map(str, legal))}", f"set {key}")


def at_least(config: Config, key: str, least: float, above: bool = False) -> None:
    """Refuse a value below `least` or, with `above`, not above it; null passes."""
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    if value is not None and not (value > least if above else value >= least):
        refuse(key, value, f"must be {'above' if above else 'at least'} {least}", f"set {key}")


def known(key: str, names: Sequence[str], legal: Sequence[str], remedy: str) -> None:
    """Refuse names that are not among the legal ones, and say the nearest of those."""
    for name in names:
        if name not in legal:
            refuse(key, name, f"{nearest(name, legal)}must be of {', '.join(legal)}", remedy)


def nearest(name: str, legal: Sequence[str]) -> str:
    """ "nearest: A, B; " with the legal names most like `name`; empty where none is like it."""
    near = difflib.get_close_matches(str(name), legal, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near)}; " if near else ""


def no_such_key(key: str, others: Sequence[str] = ()) -> str:
    """The message for an unknown key, with the known ones that may be meant.

    `others`: names that a command line takes besides keys.
    """
    values = OmegaConf.to_container(OmegaConf.structured(Config))
    keys = [*flat(values), *values, *others]
    last = key.rpartition(".")[2]
    meant = [known for known in keys if known.rpartition(".")[2] == last]
    meant = meant or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    hint = f"did you mean {' or '.join(dict.fromkeys(meant))}? " if meant else ""
    return f"{key}: no such configuration key; {hint}--help lists the keys"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys; an empty mapping is a value."""
    found = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found

"""How a configuration is refused: with the value, what is legal, and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pipeline.schema import Config

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
            near = difflib.get_close_matches(str(name), legal, n=3, cutoff=0.4)
            meant = f"nearest: {', '.join(near)}; " if near else ""
            refuse(key, name, f"{meant}must be of {', '.join(legal)}", remedy)

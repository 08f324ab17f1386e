"""What the command line itself says: whose model and text a run is about."""

from __future__ import annotations

from collections.abc import Sequence

# Who overrides one of these has a model or text of his own.
OWN_KEYS = ("model", "model.source", "data", "data.sources")
OWN = "experiment=own"


def keys_of(arguments: Sequence[str]) -> list[str]:
    """Keys of the arguments that are overrides, without Hydra's signs before them."""
    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    return [word.split("=")[0].lstrip("+~").split("@")[0] for word in words]


def with_experiment(arguments: Sequence[str]) -> list[str]:
    """The arguments, and `experiment=own` where a model or data are named without an experiment.

    The default recipe's schedule, pattern and RoPE base are made for its own tiny model.
    """
    keys = keys_of(arguments)
    named = "experiment" in keys or not set(keys) & set(OWN_KEYS)
    return [*arguments] if named else [*arguments, OWN]


def replaced(arguments: Sequence[str]) -> list[str]:
    """The keys of OWN_KEYS that replace those of an experiment named beside them."""
    keys = keys_of(arguments)
    return [key for key in OWN_KEYS if key in keys] if OWN not in arguments else []

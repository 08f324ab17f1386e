"""The experiment that a command line runs, where it names a model or text and no experiment."""

from __future__ import annotations

from collections.abc import Sequence

# A command that sets one of these brings its own model or text.
OWN_KEYS = ("model", "model.source", "data", "data.sources")
OWN = "experiment=own"


def keys_of(arguments: Sequence[str]) -> list[str]:
    """Return the keys of the arguments that are overrides, without Hydra's `+` and `~`."""
    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    return [word.split("=")[0].lstrip("+~").split("@")[0] for word in words]


def with_experiment(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with `experiment=own` where they name a model or data alone.

    The default recipe's schedule, pattern and RoPE base are made for its own tiny model.
    """
    keys = keys_of(arguments)
    named = "experiment" in keys or not set(keys) & set(OWN_KEYS)
    return [*arguments] if named else [*arguments, OWN]


def replaced(arguments: Sequence[str]) -> list[str]:
    """Return the keys of OWN_KEYS that replace values of the experiment that is named too."""
    keys = keys_of(arguments)
    return [key for key in OWN_KEYS if key in keys] if OWN not in arguments else []

"""Values that others decide: ~ in paths, the model's shape, the run's name, lengths in tokens."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pipeline.manifest import StageError
from pipeline.model_source import fill_shape
from pipeline.schema import Config
from pipeline.schema_of_eval import EvalSection

# Loss and perplexity are averaged over so many buckets of a row's positions.
BUCKETS = 16
# Needles are tried at a row's whole length and these parts of it, down to so many tokens.
PARTS = (8, 4, 2, 1)
SHORTEST_NEEDLE = 256
HOME = re.compile(r"~[\w.-]*(/|$)")
# Text, in which ~ is a character.
TEXT = ("prompt", "where")


def expand_home(config: Config) -> None:
    """Replace ~ and ~USER at the start of every path; shells leave most of them as they are.

    Raises:
        StageError: where there is no such user.
    """
    _expanded(config, "")


def _expanded(value: Any, key: str) -> Any:
    """The value, changed in place where it holds others."""
    if is_dataclass(value):
        for field in fields(value):
            if field.name not in TEXT:
                new = _expanded(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
                setattr(value, field.name, new)
    elif isinstance(value, dict):
        value |= {name: _expanded(item, f"{key}.{name}") for name, item in value.items()}
    elif isinstance(value, list):
        value[:] = [_expanded(item, f"{key}[{index}]") for index, item in enumerate(value)]
    elif isinstance(value, str) and HOME.match(value):
        try:
            return str(Path(value).expanduser())
        except RuntimeError as error:
            raise StageError(f"{key}={value!r}: {error}; set it to an absolute path") from error
    return value


def fill_open_values(config: Config) -> None:
    """Fill the values that are null because others decide them.

    Raises:
        StageError: where rows have no length, or a folder no config.json.
        MappingError: on another architecture than Llama.
    """
    fill_shape(config.model)
    if config.name is None:
        config.name = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.model.name).lstrip("-._") or "own"
    length = config.data.seq_length
    if length is None:
        raise StageError(
            "data.seq_length: has no value; set it to the new context in tokens, such as "
            "data.seq_length=8192"
        )
    if config.train.position_bucket is None:
        config.train.position_bucket = _bucket(length)
    fill_lengths(config.eval, length)


def fill_lengths(section: EvalSection, seq_length: int) -> None:
    """Let the lengths that the section leaves null follow the rows' length."""
    perplexity = section.perplexity
    if perplexity.max_length is None:
        perplexity.max_length = seq_length
    if perplexity.min_length is None:
        perplexity.min_length = perplexity.max_length
    if perplexity.bucket is None:
        perplexity.bucket = _bucket(seq_length)
    if section.niah.lengths is None:
        parts = [seq_length // part for part in PARTS]
        section.niah.lengths = [n for n in parts if n >= SHORTEST_NEEDLE] or [seq_length]
    for task in (section.ruler, section.babilong):
        if task.lengths is None:
            task.lengths = [seq_length]


def _bucket(seq_length: int) -> int:
    return max(1, seq_length // BUCKETS)

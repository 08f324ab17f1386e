"""The KV cache's bytes after a prefill, measured on the cache, beside an all-full model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluated_model import Evaluated
from pipeline.schema_of_eval import EvalSection
from pipeline.tasks.material import Material


@dataclass(frozen=True)
class LengthSample:
    """A prompt of which only the length counts: the cache's bytes do not depend on the text."""

    key: str
    tokens: np.ndarray


def build(section: EvalSection, material: Material) -> list[LengthSample]:
    """The greatest length that the section's tasks use, and a half, a quarter and an eighth."""
    used = {"perplexity": [section.perplexity.max_length]}
    for name in ("niah", "ruler", "babilong"):
        used[name] = getattr(section, name).lengths
    longest = max(length for task in section.tasks for length in used.get(task, [1]))
    lengths = sorted({max(1, longest // part) for part in (8, 4, 2, 1)})
    return [LengthSample(str(length), np.zeros(length, np.int64)) for length in lengths]


def measure(sample: LengthSample, model: Evaluated, section: EvalSection) -> list[dict[str, Any]]:
    """One record: bytes held, bytes of their storage, and bytes if every layer were full."""
    live, allocated = model.cache_bytes(sample.tokens)
    shape, length = model.config, len(sample.tokens)
    values = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * length
    return [
        {
            "length": length,
            "live_bytes": live,
            "allocated_bytes": allocated,
            "full_bytes": values * model.dtype.itemsize,
        }
    ]

"""The KV cache's bytes after a prefill, measured on the cache, beside an all-full model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.schema import EvalSection


@dataclass(frozen=True)
class LengthSample:
    """A prompt of which only the length counts: the cache's bytes do not depend on the text."""

    key: str
    tokens: np.ndarray


def build(
    section: EvalSection, tokenizer: Any, documents: Sequence[np.ndarray]
) -> list[LengthSample]:
    """The greatest length that the section's tasks use, and a half, a quarter and an eighth."""
    used = {"perplexity": [section.perplexity.max_length], "niah": section.niah.lengths}
    longest = max(length for task in section.tasks or used for length in used[task])
    lengths = sorted({max(1, longest // part) for part in (8, 4, 2, 1)})
    return [LengthSample(str(length), np.zeros(length, np.int64)) for length in lengths]


@torch.no_grad()
def score(
    sample: LengthSample, model: Any, tokenizer: Any, section: EvalSection
) -> list[dict[str, Any]]:
    """One record: bytes held, bytes of their storage, and bytes if every layer were full."""
    ids = torch.from_numpy(sample.tokens)[None].to(model.device)
    cache, _ = model.prefill(ids, section.prefill_chunk)
    shape, length = model.config, len(sample.tokens)
    values = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * length
    return [
        {
            "length": length,
            "live_bytes": cache.live_bytes(),
            "allocated_bytes": cache.allocated_bytes(),
            "full_bytes": values * model.dtype.itemsize,
        }
    ]

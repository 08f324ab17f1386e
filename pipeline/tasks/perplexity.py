"""Perplexity by position: whole held-out documents, losses summed per bucket of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.advice import shortage
from pipeline.evaluated_model import Evaluated
from pipeline.manifest import StageError
from pipeline.schema_of_eval import EvalSection
from pipeline.tasks.material import Material


@dataclass(frozen=True)
class DocumentSample:
    """The first tokens of one held-out document, int64, <bos> first."""

    key: str
    document: int
    tokens: np.ndarray


def build(section: EvalSection, material: Material) -> list[DocumentSample]:
    """The documents of at least min_length tokens, evenly spread, each cut to max_length.

    Raises:
        StageError: where no document is long enough.
    """
    wanted, documents = section.perplexity, material.documents
    lengths = [len(document) for document in documents]
    if lacking := shortage(section, lengths):
        raise StageError(lacking)
    least = max(2, wanted.min_length)
    enough = [index for index, length in enumerate(lengths) if length >= least]
    count = min(wanted.documents, len(enough))
    chosen = [enough[i * len(enough) // count] for i in range(count)]
    return [
        DocumentSample(str(index), index, np.asarray(documents[index][: wanted.max_length]))
        for index in chosen
    ]


def measure(sample: DocumentSample, model: Evaluated, section: EvalSection) -> list[dict[str, Any]]:
    """One record per bucket of absolute positions [start, stop) of the predicted token.

    "nll" is the sum in nats over the bucket's "tokens"; the token at position 0, <bos>, is not
    predicted. "nll_of_context" is that sum for each of `contexts` (see `limited_losses`), in the
    buckets that begin at it or later.
    """
    # losses[i] belongs to the token at position i + 1.
    losses = model.token_losses(sample.tokens)
    length, bucket = len(sample.tokens), section.perplexity.bucket
    limited = {
        context: limited_losses(sample.tokens, model, context)
        for context in section.perplexity.contexts
    }
    records = []
    for start in range(0, length, bucket):
        stop = min(start + bucket, length)
        part = losses[max(start, 1) - 1 : stop - 1]
        if len(part):
            record = {
                "document": sample.document,
                "length": length,
                "start": start,
                "stop": stop,
                "nll": part.sum().item(),
                "tokens": len(part),
            }
            sums = {
                str(context): values[start - context : stop - context].sum().item()
                for context, values in limited.items()
                if start >= context
            }
            records.append(record | ({"nll_of_context": sums} if sums else {}))
    return records


def limited_losses(tokens: np.ndarray, model: Evaluated, context: int) -> torch.Tensor:
    """Loss of each token from position `context` on, given the `context` to 2 * `context` - 1
    tokens before it.

    Each row of 2 * `context` tokens begins with <bos> and predicts its second half.

    Returns:
        nats, float64 [len(tokens) - context].
    """
    parts = [torch.empty(0, dtype=torch.float64)]
    for start in range(context, len(tokens), context):
        row = np.concatenate([tokens[:1], tokens[start - context + 1 : start + context]])
        parts.append(model.token_losses(row)[context - 1 :])
    return torch.cat(parts)

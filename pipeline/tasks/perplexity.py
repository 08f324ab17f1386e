"""Perplexity by position: whole held-out documents, losses summed per bucket of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.manifest import StageError
from pipeline.schema import EvalSection


@dataclass(frozen=True)
class DocumentSample:
    """The first tokens of one held-out document, int64, <bos> first."""

    key: str
    document: int
    tokens: np.ndarray


def build(
    section: EvalSection, tokenizer: Any, documents: Sequence[np.ndarray]
) -> list[DocumentSample]:
    """The documents of at least min_length tokens, evenly spread, each cut to max_length.

    Raises:
        StageError: where no document is long enough.
    """
    wanted = section.perplexity
    lengths = [len(document) for document in documents]
    least = max(2, wanted.min_length)
    enough = [index for index, length in enumerate(lengths) if length >= least]
    if not enough:
        raise StageError(
            f"eval.perplexity.min_length={wanted.min_length}: the longest of {len(lengths)} "
            f"held-out documents has {max(lengths, default=0)} tokens; lower "
            "eval.perplexity.min_length, or hold out more or longer documents (data.held_out, "
            "data.held_out_tokens)"
        )
    count = min(wanted.documents, len(enough))
    chosen = [enough[i * len(enough) // count] for i in range(count)]
    return [
        DocumentSample(str(index), index, np.asarray(documents[index][: wanted.max_length]))
        for index in chosen
    ]


@torch.no_grad()
def score(
    sample: DocumentSample, model: Any, tokenizer: Any, section: EvalSection
) -> list[dict[str, Any]]:
    """One record per bucket of absolute positions [start, stop) of the predicted token.

    "nll" is the sum in nats over the bucket's "tokens"; the token at position 0, <bos>, is not
    predicted. The logits of few positions exist at a time (the model's token_losses).
    """
    ids = torch.from_numpy(sample.tokens)[None].to(model.device)
    # losses[i] belongs to the token at position i + 1.
    losses = model.token_losses(ids)[0].double().cpu()
    length, bucket = len(sample.tokens), section.perplexity.bucket
    records = []
    for start in range(0, length, bucket):
        stop = min(start + bucket, length)
        part = losses[max(start, 1) - 1 : stop - 1]
        if len(part):
            records.append(
                {
                    "document": sample.document,
                    "length": length,
                    "start": start,
                    "stop": stop,
                    "nll": part.sum().item(),
                    "tokens": len(part),
                }
            )
    return records

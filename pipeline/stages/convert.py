"""Hugging Face Llama folder -> Megatron tensors in TP=1 form, checked before and proven after.

Tensor by tensor: in memory are what is not yet written of one shard, one tensor and its sources.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.mapping import megatron_to_hf_names, merge, split
from model.weights import WeightFolder, write_weights
from pipeline.hf_folder import compare_logits, read_model, same_bits
from pipeline.manifest import StageContext, StageError
from pipeline.model_source import SHAPE_FIELDS, check_shape, read_config, with_weights
from pipeline.progress import track_tensors
from pipeline.schema import Config

INPUTS = ("fetch",)


def depends_on(config: Config) -> dict[str, Any]:
    """The shape that the checkpoint must have, and whether pickles may be read."""
    fields = (*SHAPE_FIELDS, "allow_pickle")
    return {"model": {field: getattr(config.model, field) for field in fields}}


def run(context: StageContext) -> dict[str, Any]:
    """Write model.json and the converted weights; counts include the tensors proven bit-exact.

    Raises:
        StageError: on a checkpoint of another shape, missing or unexpected tensors.
        MappingError, WeightsError: on a model or a file that cannot be converted.
    """
    source = with_weights(context.folder("fetch") / "model")
    check_shape(read_config(source), context.config.model, source, context.log)
    allow_pickle = context.config.model.allow_pickle
    model, weights, ignored = read_model(source, allow_pickle)
    for name in ignored:
        context.log.info("convert: %s is not part of the mapping: ignored", name)

    model.save(context.out / "model.json")
    names = megatron_to_hf_names(model)
    size = sum(weights.nbytes(source) for sources in names.values() for source in sources)
    tensors = converted(weights, model)
    tensors = track_tensors(tensors, "convert: written", len(names), size, context.log)
    counts = write_weights(context.out, tensors)
    counts["bit_exact"] = verify(context.out, weights, model, context.log)
    written = WeightFolder(context.out)
    compared = compare_logits(source, model, written, allow_pickle, context.log)
    context.log.info(
        "convert: %d tensors, %.2f GB; Hugging Face -> Megatron -> Hugging Face is bit-exact%s",
        counts["bit_exact"],
        counts["bytes"] / 1e9,
        "; logits of the first layer are transformers'" if compared else "",
    )
    return {**counts, "compared_logits": compared, "ignored": ignored}


def converted(weights: WeightFolder, model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(Megatron name, tensor) one at a time."""
    for name, sources in megatron_to_hf_names(model).items():
        yield name, merge(name, [weights.read(source) for source in sources], model)


def verify(folder: Path, weights: WeightFolder, model: ModelConfig, log: logging.Logger) -> int:
    """Read the written folder back and compare every tensor with its source, bit by bit."""
    written = WeightFolder(folder)
    names = megatron_to_hf_names(model)
    stored = ((name, written.read(name)) for name in names)
    size = sum(map(written.nbytes, names))
    count = 0
    for name, tensor in track_tensors(stored, "convert: compared", len(names), size, log):
        parts = split(name, tensor, model)
        del tensor
        while parts:
            source, part = parts.popitem()
            expected = weights.read(source)
            # Parts of several dtypes are kept in one that holds them all.
            if not same_bits(part.to(expected.dtype), expected):
                raise StageError(
                    f"{written.file_of(name)}: {name} read back differs from {source} in "
                    f"{weights.file_of(source)}; check the disk, then run stage=convert again"
                )
            count += 1
    return count

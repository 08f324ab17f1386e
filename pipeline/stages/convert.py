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
from model.mapping import (
    hf_shapes,
    megatron_to_hf_names,
    merge,
    split,
)
from model.weights import DTYPES, WeightFolder, write_weights
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
    model = read_config(source)
    check_shape(model, context.config.model, source, context.log)
    weights = WeightFolder(source, context.config.model.allow_pickle)
    ignored = check_tensors(weights, model)
    for name in ignored:
        context.log.info("convert: %s is not part of the mapping: ignored", name)

    model.save(context.out / "model.json")
    names = megatron_to_hf_names(model)
    size = sum(weights.nbytes(source) for sources in names.values() for source in sources)
    tensors = converted(weights, model)
    tensors = track_tensors(tensors, "convert: written", len(names), size, context.log)
    counts = write_weights(context.out, tensors)
    counts["bit_exact"] = verify(context.out, weights, model, context.log)
    context.log.info(
        "convert: %d tensors, %.2f GB; Hugging Face -> Megatron -> Hugging Face is bit-exact",
        counts["bit_exact"],
        counts["bytes"] / 1e9,
    )
    return {**counts, "ignored": ignored}


def check_tensors(weights: WeightFolder, model: ModelConfig) -> list[str]:
    """Refuse missing, unexpected, misshapen or quantised tensors; returns the harmless extra ones.

    Harmless are RoPE's inverse frequencies, which the configuration gives, and a stored copy of
    tied embeddings.
    """
    shapes = hf_shapes(model)
    missing = [name for name in shapes if name not in weights]
    ignored = []
    for name in sorted(set(weights) - set(shapes)):
        copy = name == "lm_head.weight" and model.tie_embeddings and not missing
        if name.endswith("rotary_emb.inv_freq") or (
            copy and _same_bits(weights.read(name), weights.read("model.embed_tokens.weight"))
        ):
            ignored.append(name)
    unexpected = sorted(set(weights) - set(shapes) - set(ignored))
    if missing or unexpected:
        raise StageError(
            f"{weights.folder}: {_few('missing', missing)}{_few('unexpected', unexpected)}"
            f"expected {len(shapes)} tensors of a Llama of {model.num_layers} layers with "
            f"tie_word_embeddings={str(model.tie_embeddings).lower()}; fetch the model again or "
            "mend its config.json"
        )
    for name in weights:
        if name in shapes and weights.shape(name) != shapes[name]:
            raise StageError(
                f"{weights.file_of(name)}: a checkpoint of another shape: {name}: found "
                f"{weights.shape(name)}, expected {shapes[name]}; config.json and weights "
                "disagree: fetch the model again"
            )
    for name in weights:
        if name in shapes and weights.dtype(name) not in DTYPES.values():
            raise StageError(
                f"{weights.file_of(name)}: {name} is stored as {weights.dtype(name)}; must be one "
                f"of {', '.join(DTYPES.values())}; fetch the model's weights without quantisation"
            )
    return ignored


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
            if not _same_bits(part, weights.read(source)):
                raise StageError(
                    f"{written.file_of(name)}: {name} read back differs from {source} in "
                    f"{weights.file_of(source)}; check the disk, then run stage=convert again"
                )
            count += 1
    return count


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and bits: NaN equals itself, and 0 differs from -0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _few(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {what} ({shown}); "

"""What a row of the table of training steps is: its configuration, documents, FLOPs and ratio."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.cost import peak_flops, training_flops
from pipeline.schema import BenchmarkSection, Config, TrainCase, section_shape
from pipeline.stages.finetune import hybrid_config

ARMS = ("hybrid", "full")
DOCUMENTS = ("one", "packed")
# What a case may set in the place of the configuration's train and parallel sections.
TRAIN_KEYS = ("recompute", "offload_activations", "mlp_tile")
PARALLEL_KEYS = ("optimizer_offload",)
# Of each step: the clock around all of it, and its parts.
TIMES = ("step", "forward", "backward", "optimizer")
PEAKS = (
    "device_peak_allocated_bytes",
    "device_peak_reserved_bytes",
    "host_peak_bytes",
    "pinned_peak_bytes",
)
COLUMNS = (
    "group",
    "arm",
    "length",
    "documents",
    "document_mask",
    "document_count",
    "document_median",
    "document_longest",
    "layers",
    "full_layers",
    "world",
    "tensor",
    "ulysses",
    "zero_stage",
    "recompute",
    "offload_activations",
    "mlp_tile",
    "optimizer_offload",
    "precision",
    "steps",
    "step_seconds",
    "step_seconds_least",
    "step_seconds_most",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "tokens_per_second_per_gpu",
    "hybrid_over_full",
    "mfu",
    "model_flops",
    "pairs",
    *PEAKS,
    "first_loss",
    "losses",
    "dense_backend",
    "sparse_backend",
    "reason",
)
Row = dict[str, Any]


def case_config(config: Config, case: TrainCase) -> Config:
    """The configuration of a case: its row length, mask and memory keys; a step is one row of each
    data-parallel group."""
    parallel = config.parallel
    replicas = parallel.nodes * parallel.gpus_per_node // (parallel.tensor * parallel.ulysses)
    own = {
        section: {key: getattr(case, key) for key in keys if getattr(case, key) is not None}
        for section, keys in (("train", TRAIN_KEYS), ("parallel", PARALLEL_KEYS))
    }
    return replace(
        config,
        data=replace(config.data, seq_length=case.length),
        train=replace(
            config.train,
            rows_per_step=replicas,
            micro_batch_rows=1,
            document_mask=case.document_mask,
            # Every step is taken, or the row says why it was not.
            non_finite="stop",
            spike_sigmas=None,
            **own["train"],
        ),
        parallel=replace(parallel, **own["parallel"]),
    )


def arm_shape(config: Config, arm: str) -> ModelConfig:
    """The model of an arm: with the configuration's schedule, or every layer full."""
    shape = hybrid_config(section_shape(config.model), config)
    return shape if arm == "hybrid" else replace(shape, is_full=(True,) * shape.num_layers)


def document_lengths(case: TrainCase, bench: BenchmarkSection) -> np.ndarray:
    """Tokens of each document of a row, the same for every row; the last is cut to fill it.

    Those of packed documents are log-normal: exp(N(log(mean) - sigma^2 / 2, sigma)), by the seed.
    """
    random = np.random.default_rng(bench.seed)
    sigma = bench.document_sigma
    centre = math.log(bench.document_mean) - sigma**2 / 2
    lengths, left = [], case.length
    while left:
        if case.documents == "one":
            wanted = left
        elif case.documents == "packed":
            wanted = max(1, round(random.lognormal(centre, sigma)))
        else:
            wanted = case.documents
        lengths.append(min(wanted, left))
        left -= lengths[-1]
    return np.array(lengths)


class RandomRows:
    """Rows of tokens drawn uniformly from the vocabulary, by seed and index, and these documents.

    Of the same lengths in every row, lest some backend compiles while the clock runs.
    """

    def __init__(self, lengths: np.ndarray, vocab: int, seed: int) -> None:
        self.lengths, self.vocab, self.seed = lengths, vocab, seed

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        random = np.random.default_rng([self.seed, index])
        return random.integers(0, self.vocab, self.lengths.sum()), self.lengths, 0


def case_columns(config: Config, case: TrainCase, arm: str) -> Row:
    """What of a row is known before it is measured.

    model_flops and pairs, over all layers and query heads, are of one row, forward and backward,
    as model/cost.py counts them.
    """
    own, shape = case_config(config, case), arm_shape(config, arm)
    lengths = document_lengths(case, config.benchmark)
    seen = lengths if case.document_mask else [case.length]
    group_size = shape.num_heads // shape.num_kv_heads
    pairs = {
        kind: shape.pattern_of(layer).pairs(seen, shape.num_kv_heads) * group_size
        for kind, layer in {kind: layer for layer, kind in enumerate(shape.is_full)}.items()
    }
    parallel = own.parallel
    return {
        "group": case.group,
        "arm": arm,
        "length": case.length,
        "documents": case.documents,
        "document_mask": case.document_mask,
        "document_count": len(lengths),
        "document_median": float(np.median(lengths)),
        "document_longest": int(lengths.max()),
        "layers": shape.num_layers,
        "full_layers": sum(shape.is_full),
        "world": parallel.nodes * parallel.gpus_per_node,
        "tensor": parallel.tensor,
        "ulysses": parallel.ulysses,
        "zero_stage": parallel.zero_stage,
        **{key: getattr(own.train, key) for key in TRAIN_KEYS},
        **{key: getattr(parallel, key) for key in PARALLEL_KEYS},
        "precision": own.train.precision,
        "model_flops": training_flops(shape, seen),
        "pairs": sum(pairs[kind] for kind in shape.is_full),
    }


def measured_columns(
    row: Row, times: Sequence[Sequence[float]], losses: Sequence[float], gpu: str
) -> Row:
    """What follows from the times of the steps, seconds in the order of TIMES, and their losses."""
    by_part = dict(zip(TIMES, zip(*times, strict=True), strict=True))
    seconds = statistics.median(by_part["step"])
    # A row is shared by so many GPUs.
    sharing = row["tensor"] * row["ulysses"]
    peak = peak_flops(gpu)
    return {
        "steps": len(times),
        **{f"{part}_seconds": round(statistics.median(by_part[part]), 4) for part in TIMES},
        "step_seconds_least": round(min(by_part["step"]), 4),
        "step_seconds_most": round(max(by_part["step"]), 4),
        "tokens_per_second_per_gpu": float(f"{row['length'] / seconds / sharing:.6g}"),
        "mfu": peak and float(f"{row['model_flops'] / seconds / sharing / peak:.4g}"),
        "losses": " ".join(f"{loss:.6f}" for loss in losses),
    }


def compare_arms(rows: Sequence[Row]) -> list[str]:
    """Gives hybrid rows their ratio to the fastest full row of the same length, documents and mask;
    a line for each."""
    lines = []
    for row in rows:
        same = [
            other["tokens_per_second_per_gpu"]
            for other in rows
            if other["arm"] == "full"
            and other.get("tokens_per_second_per_gpu")
            and all(other[key] == row[key] for key in ("length", "documents", "document_mask"))
        ]
        if row["arm"] == "hybrid" and row.get("tokens_per_second_per_gpu") and same:
            ratio = row["tokens_per_second_per_gpu"] / max(same)
            row["hybrid_over_full"] = round(ratio, 4)
            lines.append(f"{case_in_words(row)}: hybrid {ratio:.2f}x full")
    return lines


def case_in_words(row: Row) -> str:
    """The case without its arm."""
    documents = row["documents"]
    if type(documents) is int:
        documents = f"{documents:,} tokens each"
    kind = {"one": "one document", "packed": f"{row['document_count']} documents"}
    mask = "" if row["document_mask"] else ", no document mask"
    return f"{row['length']:,} tokens, {kind.get(documents, documents)}{mask}"


def in_words(row: Row) -> str:
    """A line for the log."""
    case = f"{row['arm']}, {case_in_words(row)}"
    if "step_seconds" not in row:
        return f"{case}: not measured: {row['reason']}"
    parts = ", ".join(f"{part} {row[f'{part}_seconds']:.3f}" for part in TIMES[1:])
    told = f"{row['step_seconds']:.3f} s a step ({parts})"
    told += f", {row['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU"
    if row["mfu"] is not None:
        told += f", MFU {row['mfu']:.1%}"
    if row[PEAKS[0]] is not None:
        told += f", {row[PEAKS[0]] / 1e9:.1f} GB of the GPU"
    told += f", {row['host_peak_bytes'] / 1e9:.1f} GB of host memory, losses {row['losses']}"
    return f"{case}: {told}"


def save_table(rows: Sequence[Row], path: Path, columns: dict[str, Any]) -> None:
    """The rows as CSV; `columns` are the same in each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *columns))
        writer.writeheader()
        writer.writerows(row | columns for row in rows)

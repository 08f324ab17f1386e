"""The shape of a LongGen model: a Llama's dimensions, which layers are full, and the pattern."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from kernels.pattern import Pattern

PLACEMENTS = ("middle", "top", "bottom", "interleaved", "all", "none")


def default_full_layers(num_layers: int) -> int:
    """ceil(3/8 of the layers): the 12 of 32 that LongGen's own figures used for its "third"."""
    return -(-3 * num_layers // 8)


def resolve_schedule(full: str | list[int], count: int | None, num_layers: int) -> tuple[bool, ...]:
    """For each layer, whether it is full.

    Args:
        full: "middle", "top" (the last layers, next to the output), "bottom" (the first),
            "interleaved" (evenly spread), "all", "none", or the indices from 0.
        count: number of full layers; None takes `default_full_layers`.

    Raises:
        ValueError: on an unknown placement, an index or a count outside the layers.
    """
    if not isinstance(full, str):
        if not isinstance(full, list) or not all(type(i) is int for i in full):
            raise ValueError(
                f"schedule.full={full!r}: must be one of {', '.join(PLACEMENTS)} or a list of "
                "layer indices; set schedule.full"
            )
        wrong = sorted({i for i in full if not 0 <= i < num_layers})
        if wrong or len(set(full)) != len(full):
            raise ValueError(
                f"schedule.full={list(full)}: {wrong or 'repeated layers'}; must be distinct "
                f"indices from 0 to {num_layers - 1}; set schedule.full"
            )
        if count is not None and count != len(full):
            raise ValueError(
                f"schedule.count={count}: schedule.full lists {len(full)} layers; set "
                "schedule.count=null"
            )
        return tuple(i in set(full) for i in range(num_layers))
    if full not in PLACEMENTS:
        raise ValueError(
            f"schedule.full={full!r}: must be one of {', '.join(PLACEMENTS)} or a list of layer "
            "indices; set schedule.full"
        )
    if full in ("all", "none"):
        return (full == "all",) * num_layers
    count = default_full_layers(num_layers) if count is None else count
    if not 0 <= count <= num_layers:
        raise ValueError(
            f"schedule.count={count}: must be from 0 to the model's {num_layers} layers; set "
            "schedule.count"
        )
    if full == "interleaved":
        chosen = {(2 * i + 1) * num_layers // (2 * count) for i in range(count)}
        return tuple(i in chosen for i in range(num_layers))
    first = {"middle": (num_layers - count) // 2, "top": num_layers - count, "bottom": 0}[full]
    return tuple(first <= i < first + count for i in range(num_layers))


def describe_schedule(is_full: tuple[bool, ...]) -> str:
    """One line such as "S10 F12 S10"."""
    return " ".join(f"{'F' if kind else 'S'}{len(list(run))}" for kind, run in groupby(is_full))


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a Llama, as Hugging Face's config.json has them, and the hybrid's pattern.

    `rope` and `sparse_rope` are rope parameters as transformers 5 writes them, such as
    {"rope_type": "default", "rope_theta": 1e4}: of full layers and of sparse ones.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tie_embeddings: bool
    rope: Mapping[str, Any]
    sparse_rope: Mapping[str, Any]
    is_full: tuple[bool, ...]
    pattern: Pattern = field(default_factory=Pattern)

    def __post_init__(self) -> None:
        if len(self.is_full) != self.num_layers:
            raise ValueError(
                f"schedule of {len(self.is_full)} layers: the model has {self.num_layers}; give "
                "one entry per layer"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}; check the model's config.json"
            )

    def __hash__(self) -> int:
        # Of all but the mappings, which have none.
        sizes = (self.num_layers, self.hidden_size, self.ffn_hidden_size, self.vocab_size)
        return hash((sizes, self.num_heads, self.num_kv_heads, self.is_full, self.pattern))

    def pattern_of(self, layer: int) -> Pattern:
        """The pattern of layer `layer`, counted from 0."""
        return Pattern.full() if self.is_full[layer] else self.pattern

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        values["is_full"] = tuple(values["is_full"])
        values["pattern"] = Pattern(**values["pattern"])
        return cls(**values)

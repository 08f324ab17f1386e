"""A LongGen model whose weights several ranks share, as tasks use it; its ranks ask it alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from model.engine import Engine
from model.engine_weights import Shard
from pipeline.evaluated_model import (
    Evaluated,
    describe,
    dtype_of,
    model_config,
    model_folder,
)
from pipeline.manifest import StageContext
from pipeline.prompts import end_tokens
from pipeline.serving import load_engine


@dataclass
class SharedModel(Evaluated):
    """This rank's part of a model, behind an Engine."""

    engine: Engine
    eos: frozenset[int]
    described: dict[str, Any]

    @property
    def config(self) -> Any:
        return self.engine.config

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.decoder.dtype

    def answers(self, prompts: Sequence[np.ndarray], new_tokens: int) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in prompts]
        asked = [prompt.tolist() for prompt in prompts]
        # Lengths beyond the context are told, and marked, by the stage.
        options = {"stop_ids": sorted(self.eos), "checked": True}
        for step in self.engine.generate(asked, new_tokens, **options):
            for row, token in zip(rows, step, strict=True):
                row += [] if token is None else [token]
        return [self.to_eos(row) for row in rows]

    def last_logits(self, rows: Sequence[np.ndarray], counts: Sequence[int]) -> list[torch.Tensor]:
        return [
            torch.cat(list(self.engine.score(torch.from_numpy(row), count)))
            for row, count in zip(rows, counts, strict=True)
        ]

    def token_losses(self, tokens: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        target, parts, start = ids[1:].to(self.engine.device), [], 0
        for logits in self.engine.score(ids, len(ids)):
            own = target[start : start + len(logits)]
            # The last token has no successor.
            parts.append(cross_entropy(logits[: len(own)].float(), own, reduction="none"))
            start += len(logits)
        return torch.cat(parts).double().cpu()

    def cache_bytes(self, tokens: np.ndarray) -> tuple[int, int]:
        self.engine.reserve(1, len(tokens))
        self.engine.prefill([torch.from_numpy(tokens)])
        cache = self.engine.cache
        found = torch.tensor([cache.live_bytes(), cache.allocated_bytes()])
        if self.engine.group is not None:
            found = found.to(self.engine.device)
            dist.all_reduce(found, group=self.engine.group)
        live, allocated = found.tolist()
        return live, allocated


def open_shared(
    name: str, context: StageContext, tokenizer: Any, shard: Shard, group: dist.ProcessGroup | None
) -> SharedModel:
    """This rank's part of a model of eval.models; it reads no other.

    Raises:
        StageError: where a folder of eval.folders holds a model that is neither ours nor a Llama.
        WeightsError, ServingError: see load_engine.
    """
    config, settings = model_config(name, context), context.config
    dtype = dtype_of(settings)
    device = torch.device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    engine = load_engine(
        model_folder(name, context),
        config,
        dtype,
        device,
        shard,
        group,
        context.log,
        chunk=settings.eval.prefill_chunk,
        allow_pickle=settings.model.allow_pickle,
    )
    eos = end_tokens(tokenizer, config, model_folder(name, context))
    told = describe(name, config, type(engine).__name__, dtype, True, context)
    return SharedModel(engine, eos, {**told, "tensor": shard.size})

"""The models that are evaluated, of our class or any that transformers knows, behind one face."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from kernels.pattern import Pattern
from model.config import describe_schedule
from model.mapping import config_from_hf
from model.modeling_longgen import LongGenConfig, LongGenForCausalLM
from pipeline.manifest import StageContext, StageError, digest, read_manifest
from pipeline.model_source import with_weights
from pipeline.schema import Config
from pipeline.stages.export import load_source, longgen_config

BASE, FINAL, REDUCED, BASE_REDUCED = "base", "final", "reduced", "base_reduced"
OWN = (BASE, FINAL, REDUCED, BASE_REDUCED)
# Columns of a stock model that take their logits together.
STOCK_CHUNK = 1024


class Evaluated(ABC):
    """How tasks use a causal language model. `described` is a file beside the records."""

    eos: frozenset[int]
    described: dict[str, Any]

    @property
    def context(self) -> int | None:
        """Tokens of the longest text that it was trained on, where its configuration says so."""
        return self.described["context"]

    @property
    def id(self) -> str:
        """16 hex digits of the description, which every record carries."""
        return digest(self.described)

    def to_eos(self, row: list[int]) -> list[int]:
        """The tokens before the first <eos>."""
        ends = [place for place, token in enumerate(row) if token in self.eos]
        return row[: ends[0]] if ends else row

    @property
    @abstractmethod
    def config(self) -> Any:
        """The model's configuration."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @abstractmethod
    def answers(self, prompts: Sequence[np.ndarray], new_tokens: int) -> list[list[int]]:
        """Greedy continuations of the prompts, each to <eos> (left out) or `new_tokens` tokens."""

    @abstractmethod
    def last_logits(self, rows: Sequence[np.ndarray], counts: Sequence[int]) -> list[torch.Tensor]:
        """Logits [count, V] at the last `count` tokens of each row, rows of any lengths."""

    @abstractmethod
    def token_losses(self, tokens: np.ndarray) -> torch.Tensor:
        """-log p(token t + 1 | ..t) in nats, float64 [tokens - 1] on the host."""

    @abstractmethod
    def cache_bytes(self, tokens: np.ndarray) -> tuple[int, int]:
        """(held, allocated) bytes of a LongGen model's whole KV cache after these tokens."""


@dataclass
class EvaluatedModel(Evaluated):
    """A model of transformers, on one device.

    ours: whether it is a LongGen model, which takes prompts in chunks of `prefill_chunk` columns
    into its own small cache; any other goes through transformers' generate.
    """

    model: Any
    eos: frozenset[int]
    ours: bool
    prefill_chunk: int
    described: dict[str, Any]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def answers(self, prompts: Sequence[np.ndarray], new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        found = (self._own if self.ours else self._stock)(ids, mask, new_tokens)
        return [self.to_eos(row) for row in found.tolist()]

    def _own(self, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
        mask = None if bool(mask.all()) else mask
        cache, logits = self.model.prefill(ids, self.prefill_chunk, mask)
        ends = torch.tensor(sorted(self.eos), device=ids.device)
        found = [logits.argmax(-1)]
        ended = torch.isin(found[-1], ends)
        while len(found) < new_tokens and not bool(ended.all()):
            # A row that has ended goes on beside the others, and is cut afterwards.
            step = self.model(found[-1][:, None], past_key_values=cache, use_cache=True)
            found.append(step.logits[:, -1].argmax(-1))
            ended |= torch.isin(found[-1], ends)
        return torch.stack(found, dim=1)

    def _stock(self, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
        found = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=min(self.eos, default=0),
        )
        return found[:, ids.shape[1] :]

    @torch.no_grad()
    def last_logits(self, rows: Sequence[np.ndarray], counts: Sequence[int]) -> list[torch.Tensor]:
        device = self.model.device
        if self.ours:
            lengths = torch.tensor([len(row) for row in rows])
            ends = lengths.cumsum(0)
            kept = [torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
            ids = torch.from_numpy(np.concatenate(rows))[None].to(device)
            bounds = torch.cat([torch.zeros(1, dtype=ends.dtype), ends])
            columns = torch.cat(kept).to(device)
            logits = self.model(ids, cu_seqlens=bounds, logits_to_keep=columns).logits[0]
            return list(logits.split(list(counts)))
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for place, row in enumerate(rows):
            # Padding stands behind, where no token of the row sees it.
            ids[place, : len(row)] = torch.from_numpy(row)
        logits = self.model(ids.to(device)).logits
        return [
            logits[place, len(row) - count : len(row)]
            for place, (row, count) in enumerate(zip(rows, counts, strict=True))
        ]

    @torch.no_grad()
    def token_losses(self, tokens: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None].to(self.model.device)
        if self.ours:
            return self.model.token_losses(ids)[0].double().cpu()
        parts, cache = [], None
        for start in range(0, ids.shape[1] - 1, STOCK_CHUNK):
            given = ids[:, start : min(start + STOCK_CHUNK, ids.shape[1] - 1)]
            out = self.model(given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            target = ids[0, start + 1 : start + 1 + given.shape[1]]
            parts.append(cross_entropy(out.logits[0].float(), target, reduction="none"))
        return torch.cat(parts).double().cpu()

    @torch.no_grad()
    def cache_bytes(self, tokens: np.ndarray) -> tuple[int, int]:
        ids = torch.from_numpy(tokens)[None].to(self.model.device)
        cache = self.model.prefill(ids, self.prefill_chunk)[0]
        return cache.live_bytes(), cache.allocated_bytes()


def reduced(config: LongGenConfig, pattern: Pattern) -> LongGenConfig:
    """The same weights with no full layer: sink tokens and window alone, at the full layers' RoPE.

    Raises:
        StageError: where full and sparse layers have RoPE bases of their own.
    """
    if config.sparse_rope != config.rope and not all(config.is_full):
        raise StageError(
            f"eval.models: reduced: layers have different RoPE ({config.rope} and "
            f"{config.sparse_rope}); the weights must have one; leave reduced out of eval.models"
        )
    config.is_full = [False] * config.num_hidden_layers
    config.pattern, config.sparse_rope = asdict(replace(pattern, stride=None)), dict(config.rope)
    return config


def dtype_of(config: Config) -> torch.dtype:
    """On a GPU bfloat16, on a CPU float32, in which a CPU is faster."""
    on_cpu = config.device == "cpu" or config.export.dtype == "fp32"
    return torch.float32 if on_cpu else torch.bfloat16


def load_model(name: str, context: StageContext) -> Any:
    """The model of a name in eval.models, on the device.

    "base" as fetched, every layer full; "final" as exported; those and "reduced" with their name's
    schedule.

    Raises:
        StageError: where a folder of eval.folders holds no model, or one of remote code.
    """
    config = context.config
    dtype = dtype_of(config)
    transformers_logging.disable_progress_bar()
    if name == BASE:
        folder = model_folder(name, context)
        return load_source(folder, dtype, config.device, config.model.allow_pickle)
    if name == FINAL:
        model = AutoModelForCausalLM.from_pretrained(
            context.folder("export"), trust_remote_code=True, dtype=dtype
        )
        return model.to(config.device).eval()
    pattern = Pattern(**asdict(config.pattern))
    if name == BASE_REDUCED:
        folder = model_folder(name, context)
        model = load_source(folder, dtype, "cpu", config.model.allow_pickle)
        weights = model.state_dict()
        model = LongGenForCausalLM(reduced(model.config, pattern)).to(dtype)
        model.load_state_dict(weights)
    elif name == REDUCED:
        folder = context.folder("export")
        model = LongGenForCausalLM.from_pretrained(
            folder, config=reduced(LongGenConfig.from_pretrained(folder), pattern), dtype=dtype
        )
    else:
        model = _foreign(name, Path(config.eval.folders[name]), dtype, context.log)
    return model.to(config.device).eval()


def _foreign(name: str, folder: Path, dtype: torch.dtype, log: logging.Logger) -> Any:
    """A folder's model by transformers' or our own class; the folder's own code never runs."""
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind == LongGenConfig.model_type:
            return LongGenForCausalLM.from_pretrained(folder, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise StageError(
            f"eval.folders.{name}={str(folder)!r}: holds no model that transformers can load "
            f"without code of its own ({str(error).splitlines()[0]}); set it to a Hugging Face "
            "folder with config.json and safetensors"
        ) from error
    log.warning(
        "%s: %s is no LongGen export: evaluated as a plain transformers model (%s), on its own "
        "attention and cache",
        *(name, folder, type(model).__name__),
    )
    return model


def model_folder(name: str, context: StageContext) -> Path:
    """Where the weights of a name in eval.models lie."""
    if name in (BASE, BASE_REDUCED):
        return with_weights(context.folder("fetch") / "model")
    if name in (FINAL, REDUCED):
        return context.folder("export")
    return Path(context.config.eval.folders[name])


def model_config(name: str, context: StageContext) -> LongGenConfig:
    """The configuration of a name in eval.models, as one of our class.

    Raises:
        StageError: where a folder of eval.folders holds a model that is neither ours nor a Llama.
    """
    folder = model_folder(name, context)
    try:
        values = json.loads((folder / "config.json").read_text())
        if values.get("model_type") == LongGenConfig.model_type:
            config = LongGenConfig.from_pretrained(folder)
        else:
            config = longgen_config(config_from_hf(values), folder)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{folder}: holds no model that several processes can share "
            f"({str(error).splitlines()[0]}); must be a LongGen export or a Llama; leave {name} "
            "out of eval.models, or set eval.tensor=1"
        ) from error
    if name in (REDUCED, BASE_REDUCED):
        return reduced(config, Pattern(**asdict(context.config.pattern)))
    return config


def describe(
    name: str, config: Any, kind: str, dtype: torch.dtype, ours: bool, context: StageContext
) -> dict[str, Any]:
    """What a record's model is: its source, shape, schedule, RoPE, dtype and trained context."""
    folder = model_folder(name, context)
    manifest = read_manifest(folder) or read_manifest(folder.parent) or {}
    found = {
        "name": name,
        "source": manifest.get("id") or str(folder),
        "class": kind,
        "longgen": ours,
        "dtype": str(dtype).removeprefix("torch."),
        "context": getattr(config, "max_position_embeddings", None),
        "layers": getattr(config, "num_hidden_layers", None),
    }
    if ours:
        found |= {
            "schedule": describe_schedule(tuple(config.is_full)),
            "pattern": None if all(config.is_full) else config.pattern,
            "rope": config.rope,
            "sparse_rope": config.sparse_rope,
        }
    return found


def open_model(name: str, context: StageContext, tokenizer: Any) -> EvaluatedModel:
    """Load a model of eval.models; <eos> is what its tokenizer and its configurations call so.

    Raises:
        StageError: see load_model.
    """
    model = load_model(name, context)
    eos = end_tokens(tokenizer, model.config, getattr(model, "generation_config", None))
    ours = hasattr(model, "new_cache")
    told = describe(name, model.config, type(model).__name__, model.dtype, ours, context)
    return EvaluatedModel(model, eos, ours, context.config.eval.prefill_chunk, told)


def generation_config(folder: Path) -> GenerationConfig | None:
    """A model folder's generation_config.json, where it has one."""
    present = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder) if present else None


def end_tokens(tokenizer: Any, config: Any, generation: Any) -> frozenset[int]:
    """What a tokenizer and a model's two configurations call <eos>."""
    ends: set[int] = set()
    for place in (tokenizer, config, generation):
        value = getattr(place, "eos_token_id", None)
        ends |= set(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ends)


def needs_export(config: Config) -> bool:
    """Whether any of eval.models is made of the exported folder."""
    return bool({FINAL, REDUCED} & set(config.eval.models))

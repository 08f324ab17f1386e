"""A Hugging Face Llama's folder: the one way that its config.json and weights are read.

convert, the evaluated base and the export read a model folder through this module. Of contradicting
keys and of several sets of weights it takes the ones that transformers takes; `compare_logits`
tries that on the model itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from model.config import ModelConfig
from model.mapping import hf_shapes, megatron_to_hf_names, split
from model.modeling_longgen import LongGenConfig, LongGenForCausalLM
from model.weights import DTYPES, WeightFolder
from pipeline.manifest import StageError
from pipeline.model_source import read_config

# Of compare_logits: the tokens, the memory of a model of one layer in float32 (70B: 5.5 GB), and
# the largest difference, relative to the largest logit.
COMPARED_TOKENS = 128
MAX_COMPARED_BYTES = 8 * 1024**3
MAX_DIFFERENCE = 1e-3


def read_model(
    folder: Path, allow_pickle: bool = False
) -> tuple[ModelConfig, WeightFolder, list[str]]:
    """(shape, weights, names of tensors that are not part of the model) of a Llama's folder.

    Raises:
        StageError: on missing, unexpected, misshapen or quantised tensors, or no config.json.
        MappingError, WeightsError: on a model or a file that cannot be read.
    """
    model = read_config(folder)
    weights = WeightFolder(folder, allow_pickle)
    return model, weights, _check_tensors(weights, model)


def longgen_config(model_config: ModelConfig, hf_folder: Path | None = None) -> LongGenConfig:
    """The exported class's configuration; token ids and the like from the source's config.json."""
    kept = {}
    if hf_folder is not None:
        source = json.loads((hf_folder / "config.json").read_text())
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
        kept = {name: source[name] for name in names if name in source}
    return LongGenConfig(
        vocab_size=model_config.vocab_size,
        hidden_size=model_config.hidden_size,
        intermediate_size=model_config.ffn_hidden_size,
        num_hidden_layers=model_config.num_layers,
        num_attention_heads=model_config.num_heads,
        num_key_value_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        max_position_embeddings=model_config.max_positions,
        rms_norm_eps=model_config.norm_eps,
        tie_word_embeddings=model_config.tie_embeddings,
        pattern=asdict(model_config.pattern),
        is_full=list(model_config.is_full),
        rope=dict(model_config.rope),
        sparse_rope=dict(model_config.sparse_rope),
        **kept,
    )


def load_source(
    hf_folder: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> LongGenForCausalLM:
    """A stock Llama folder in our class with every layer full: the base that runs are held against.

    Raises:
        StageError, MappingError, WeightsError: see read_model.
    """
    model, weights, _ = read_model(hf_folder, allow_pickle)
    tensors = ((name, weights.read(name)) for name in hf_shapes(model))
    return _in_memory(longgen_config(model, hf_folder), tensors, dtype, device)


def compare_logits(
    source: Path,
    model: ModelConfig,
    converted: WeightFolder,
    allow_pickle: bool,
    log: logging.Logger,
) -> bool:
    """Compare the logits of converted weights with those of transformers, as it reads the source.

    Of a model of embedding, first layer, last norm and head, in float32 on the CPU, one after the
    other; skipped where that needs more than MAX_COMPARED_BYTES, or where transformers finds no
    weights under the names that it looks for.

    Returns:
        Whether they were compared.

    Raises:
        StageError: when they differ.
    """
    one = replace(model, num_layers=1, is_full=model.is_full[:1])
    size = 4 * sum(map(prod, hf_shapes(one).values()))
    if size > MAX_COMPARED_BYTES:
        log.info("convert: logits not compared with transformers': %.1f GB of memory", size / 1e9)
        return False
    ids = (torch.arange(COMPARED_TOKENS)[None] * 7919 + 1) % model.vocab_size
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        theirs = LlamaForCausalLM.from_pretrained(
            source,
            num_hidden_layers=1,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            local_files_only=True,
        )
    except OSError as error:
        log.warning("convert: logits not compared with transformers': %s", error)
        return False
    finally:
        transformers_logging.set_verbosity(verbosity)
    with torch.no_grad():
        expected = theirs.eval()(ids, use_cache=False).logits
        del theirs
        parts = (split(name, converted.read(name), one) for name in megatron_to_hf_names(one))
        tensors = (item for part in parts for item in part.items())
        found = _in_memory(longgen_config(one), tensors)(ids).logits
    limit = MAX_DIFFERENCE * float(expected.nan_to_num().abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=limit, equal_nan=True):
        raise StageError(
            f"{source}: logits of its first layer differ from transformers' by "
            f"{float((found - expected).abs().max()):.3g}, more than {limit:.3g}: its settings or "
            "weights are read otherwise; report this with the model's config.json"
        )
    return True


def _in_memory(
    config: LongGenConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LongGenForCausalLM:
    """The model of these tensors by Hugging Face's names, of which each is there once."""
    with torch.device("meta"):
        loaded = LongGenForCausalLM(config)
    state = {name: tensor.to(device, dtype) for name, tensor in tensors}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    loaded.load_state_dict(state, assign=True)
    loaded.tie_weights()
    loaded.config.dtype = dtype
    return loaded.eval()


def _check_tensors(weights: WeightFolder, model: ModelConfig) -> list[str]:
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
            copy and same_bits(weights.read(name), weights.read("model.embed_tokens.weight"))
        ):
            ignored.append(name)
    unexpected = sorted(set(weights) - set(shapes) - set(ignored))
    if missing or unexpected:
        raise StageError(
            f"{weights.folder}: {_few('missing', missing)}{_few('unexpected', unexpected)}"
            f"expected {len(shapes)} tensors of a Llama of {model.num_layers} layers with "
            f"tie_word_embeddings={str(model.tie_embeddings).lower()}; fetch the model again or "
            "correct its config.json"
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


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and bits: NaN equals itself, and 0 differs from -0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _few(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {what} ({shown}); "

"""A Llama in a GGUF file -> a Hugging Face folder in bfloat16, with its tokenizer.

GGUF files keep the rows of q and k in pairs for interleaved RoPE; Hugging Face and Megatron rotate
halves, so that these rows move back here. Quantised tensors are dequantised by the gguf package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from model.weights import WeightsError

PROBE = (
    "Hello world, in 2024 it was 12345 x 3.\n\tdef f(x): return x  # caf\u00e9 \u4f60\u597d\n    28"
)
# Name in transformers and in the file.
SPECIAL = (
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("pad_token", "padding"),
)
# Vocabularies whose splitting of text transformers' import loses or knows; None: it is kept.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": None,
    "gpt-2": None,
    "default": None,
}


class GGUFError(WeightsError):
    """A GGUF file that cannot be imported; the message names the file and the remedy."""


def import_gguf(path: Path, out: Path) -> dict[str, Any]:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, and prove it.

    The saved folder is loaded again: its token ids and logits on a probe text must equal those of
    the model in memory. Needs memory for the model twice.

    Returns:
        {"tensors", "parameters", "quantisation": {type: tensors}}

    Raises:
        GGUFError: on a damaged file, another architecture, features that a Llama lacks, a tokenizer
            that cannot be rebuilt, or a folder that differs from what was saved.
    """
    reader = _read(path)
    config = _config(reader, path)
    model = LlamaForCausalLM(config).eval()
    state, kinds = _state(reader, model, path)
    # Assigned, not cast by model.to(): that would round RoPE's frequencies to bfloat16 as well.
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    tokenizer = _tokenizer(reader, path)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _prove(model, tokenizer, out, path)
    return {
        "tensors": len(reader.tensors),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "quantisation": kinds,
    }


def _read(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    # A damaged file fails anywhere in the reader: in numpy, in an enum, in the file's own checks.
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise GGUFError(f"{path}: truncated or no GGUF file ({error}); fetch it again") from error


def _field(reader: GGUFReader, key: str) -> Any:
    """Value of a key, None where it is absent; float32 values as their shortest decimals."""
    field = reader.get_field(key)
    if field is None:
        return None
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(reader: GGUFReader, path: Path) -> LlamaConfig:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise GGUFError(
            f"{path}: general.architecture={architecture!r}; must be 'llama'; choose a Llama"
        )
    keys = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    values = {name: _field(reader, f"llama.{key}") for name, key in keys.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    missing = [keys[name] for name, value in values.items() if value is None]
    if missing or "token_embd.weight" not in tensors:
        raise GGUFError(
            f"{path}: lacks {', '.join(f'llama.{key}' for key in missing) or 'token_embd.weight'}; "
            "fetch a complete GGUF file of the model"
        )
    heads = values["num_attention_heads"]
    head_dim = _field(reader, "llama.attention.key_length") or values["hidden_size"] // heads
    rotated = _field(reader, "llama.rope.dimension_count") or head_dim
    scaling = _field(reader, "llama.rope.scaling.type") or "none"
    if rotated != head_dim or scaling not in ("none", "linear"):
        raise GGUFError(
            f"{path}: rope of {rotated} of {head_dim} dimensions, scaling {scaling!r}; must be all "
            "dimensions and 'none' or 'linear'; set model.source to the model's Hugging Face folder"
        )
    rope = {"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base") or 1e4}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": _field(reader, "llama.rope.scaling.factor")}
    special = {
        f"{name}_id": _field(reader, f"tokenizer.ggml.{key}_token_id")
        for name, key in SPECIAL
        if name != "unk_token"
    }
    return LlamaConfig(
        **values,
        **special,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv") or heads,
        head_dim=head_dim,
        # The reader's shapes run from the innermost dimension.
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        rope_parameters=rope,
        tie_word_embeddings="output.weight" not in tensors,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )


def _state(
    reader: GGUFReader, model: LlamaForCausalLM, path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The model's state in bfloat16, and how many tensors the file holds of each kind."""
    config = model.config
    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    hf_name = {name_map.get_name(name, (".weight",)): name for name in shapes}
    if config.tie_word_embeddings:
        hf_name[name_map.get_name("model.embed_tokens.weight", (".weight",))] = (
            "model.embed_tokens.weight"
        )
        hf_name.pop(name_map.get_name("lm_head.weight", (".weight",)), None)
    names = [tensor.name for tensor in reader.tensors]
    unexpected, missing = sorted(set(names) - set(hf_name)), sorted(set(hf_name) - set(names))
    if unexpected or missing:
        raise GGUFError(
            f"{path}: tensors missing: {missing[:5]}, unexpected: {unexpected[:5]}; must be a "
            "plain Llama's; set model.source to the model's Hugging Face folder"
        )
    state, kinds = {}, {}
    for tensor in reader.tensors:
        name, kind = hf_name[tensor.name], tensor.tensor_type.name
        kinds[kind] = kinds.get(kind, 0) + 1
        try:
            weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        except NotImplementedError as error:
            raise GGUFError(
                f"{path}: {tensor.name} is stored as {kind}, which the gguf package cannot "
                "dequantise; choose a file in F16, Q8_0 or Q4_K"
            ) from error
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if name.endswith(f"self_attn.{part}_proj.weight"):
                weight = _halves(weight, heads)
        if weight.shape != shapes[name]:
            raise GGUFError(
                f"{path}: {tensor.name}: shape {tuple(weight.shape)}; must be "
                f"{tuple(shapes[name])}; fetch the file again"
            )
        state[name] = weight.to(torch.bfloat16)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state, kinds


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * (pairs, 2)] of interleaved RoPE as rows [heads * (2, pairs)] of halves."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _tokenizer(reader: GGUFReader, path: Path) -> PreTrainedTokenizerBase:
    kind, pre = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    pre = pre or "default"
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and pre not in PRE_TOKENIZERS):
        raise GGUFError(
            f"{path}: tokenizer {kind!r} that splits text as {pre!r}; must be 'llama', or 'gpt2' "
            f"with one of {', '.join(PRE_TOKENIZERS)}; set model.source to the model's Hugging "
            "Face folder"
        )
    special = {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL}
    if special["bos_token"] is None:
        raise GGUFError(
            f"{path}: its tokenizer has no bos token, which starts every document; must have "
            "tokenizer.ggml.bos_token_id; set model.source to the model's Hugging Face folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    # Some versions of transformers take bos for eos and leave out the others.
    for name, token_id in special.items():
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    if kind == "gpt2":
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        if PRE_TOKENIZERS[pre] is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = _field(reader, "llama.context_length")
    return tokenizer


def _prove(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path, path: Path
) -> None:
    """Refuse a saved folder whose token ids, weights or logits differ from those in memory."""
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    saved_tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    saved_ids = saved_tokenizer(PROBE, add_special_tokens=False).input_ids
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    weights, stored = model.state_dict(), saved.state_dict()
    changed = [name for name in weights if not torch.equal(weights[name], stored[name])]
    # Both compute on the same memory: the order of a BLAS kernel's sums may follow a tensor's
    # alignment, and those of a file are aligned to 8 bytes only.
    saved.load_state_dict(weights, assign=True)
    with torch.no_grad():
        logits, saved_logits = (m(torch.tensor([ids])).logits for m in (model, saved))
    same_ids, same_logits = ids == saved_ids, torch.equal(logits, saved_logits)
    if changed or not (same_ids and same_logits):
        raise GGUFError(
            f"{path}: the saved folder {out} differs from the imported model (token ids equal: "
            f"{same_ids}, tensors that differ: {changed[:3]}, logits of the same weights equal: "
            f"{same_logits}); set model.source to the model's Hugging Face folder"
        )

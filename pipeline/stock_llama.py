"""An export whose layers are all full, as a plain Llama folder: any tool reads it, and model.source
takes it. `python -m pipeline.stock_llama EXPORT OUT`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from transformers import LlamaConfig

from model.modeling_longgen import LongGenConfig

COPIED = ("*.safetensors", "*.safetensors.index.json", "tokenizer*", "generation_config.json")


def save_stock_llama(export: Path, out: Path) -> None:
    """Write config.json of transformers' Llama beside the export's weights and tokenizer.

    Raises:
        ValueError: where a layer is sparse, or the folder is no export.
    """
    config = export / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != "longgen":
        raise ValueError(f"{export}: is no export; must be a run's folder export; name that")
    ours = LongGenConfig.from_pretrained(export)
    if not all(ours.is_full):
        sparse = ours.is_full.count(False)
        raise ValueError(
            f"{export}: {sparse} of {len(ours.is_full)} layers are sparse, which a plain Llama "
            "cannot be; must have none; train with schedule.full=all"
        )
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    values = {name: getattr(ours, name) for name in names}
    llama = LlamaConfig(
        **values, rope_parameters=dict(ours.rope), architectures=["LlamaForCausalLM"]
    )
    llama.dtype = ours.dtype
    out.mkdir(parents=True, exist_ok=True)
    llama.save_pretrained(out)
    for path in sorted({path for pattern in COPIED for path in export.glob(pattern)}):
        shutil.copyfile(path, out / path.name)


if __name__ == "__main__":
    try:
        save_stock_llama(*map(Path, sys.argv[1:3]))
    except ValueError as error:
        sys.exit(f"error: {error}")

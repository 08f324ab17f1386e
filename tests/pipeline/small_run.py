"""The smallest real run: a Llama folder, a folder of text, and the keys that fit them."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.data_prep.helpers import save_model_folder

VOCAB = 420
SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_positions": 64,
}
TRAINING = (
    "schedule.full=[1]",
    "train.steps=4",
    "train.rows_per_step=2",
    "train.micro_batch_rows=1",
    "train.lr=0.01",
    "train.precision=fp32",
    "train.validate_every=2",
    "train.validation_rows=2",
    "train.position_bucket=32",
    "train.save_every=2",
    "export.dtype=fp32",
    "eval.perplexity={documents: 2, min_length: 160, max_length: 160, bucket: 40}",
    "eval.niah={lengths: [256], depths: [50], samples: 1, seed: 1}",
)
TEXT = "a llama eats grass and hay in the mountains 12 times ; def f ( x ) return x + 1"


def save_llama(folder: Path, **changes) -> Path:
    """A random Llama of SHAPE with a tokenizer; `changes` are of LlamaConfig."""
    save_model_folder(folder)
    values = {
        "hidden_size": SHAPE["hidden_size"],
        "intermediate_size": SHAPE["ffn_hidden_size"],
        "num_hidden_layers": SHAPE["num_layers"],
        "num_attention_heads": SHAPE["num_heads"],
        "num_key_value_heads": SHAPE["num_kv_heads"],
        "vocab_size": VOCAB,
        "max_position_embeddings": SHAPE["max_positions"],
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**values, **changes})).save_pretrained(folder)
    return folder


def texts(count: int, words: int = 300) -> list[str]:
    """Documents of random words, each another one."""
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(TEXT.split(), 10)) for _ in range(count * words // 10)]
    each = words // 10
    return ["\n".join(lines[i * each : (i + 1) * each]) + "\n" for i in range(count)]


def save_text(folder: Path, count: int = 12) -> Path:
    """A folder of text files."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts(count)):
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def source(path: Path, **keys) -> str:
    """data.sources of one source called "notes"."""
    return f"data.sources={json.dumps([{'name': 'notes', 'path': str(path), **keys}])}"


def small(root: Path, model: Path, *more: str) -> list[str]:
    """The keys of a whole run over `model`; texts and outputs lie under `root`."""
    return [
        "name=small",
        f"outputs={root / 'outputs'}",
        f"model.source={model}",
        *(f"model.{key}={value}" for key, value in SHAPE.items()),
        source(root / "text"),
        "data.seq_length=64",
        "data.tokens=null",
        "data.held_out=0.25",
        "data.workers=1",
        *TRAINING,
        *more,
    ]

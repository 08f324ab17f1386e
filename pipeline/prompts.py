"""How a text becomes a prompt and where an answer ends, for every way to generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.manifest import StageError


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Ids of a text, int64, without what the tokenizer adds (before it or, as </s>, after it)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        # The same ids in half the time: without offsets, and without the lists around them.
        ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return np.array(ids, np.int64)


def with_bos(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """The ids after one <bos>, where the tokenizer has one.

    Training starts every document with it, whether the tokenizer adds it or not.
    """
    bos = tokenizer.bos_token_id
    # A chat template's text may begin with it.
    return ids if bos is None or ids[:1].tolist() == [bos] else np.concatenate([[bos], ids])


def encode_prompt(tokenizer: Any, text: str) -> np.ndarray:
    """Ids of a text after one <bos>, int64."""
    return with_bos(tokenizer, encode(tokenizer, text))


def end_tokens(tokenizer: Any, config: Any, folder: Path) -> frozenset[int]:
    """What ends an answer: <eos> of the tokenizer, of config.json and of generation_config.json.

    Args:
        config: the model's configuration.
        folder: the model's, which may hold a generation_config.json.

    Raises:
        StageError: where that file cannot be read.
    """
    path = folder / "generation_config.json"
    try:
        generation = json.loads(path.read_text()) if path.is_file() else {}
        places = (tokenizer.eos_token_id, config.eos_token_id, generation.get("eos_token_id"))
    except (OSError, ValueError, AttributeError) as error:
        raise StageError(
            f"{path}: cannot be read as JSON ({error}); correct it or remove it"
        ) from error
    ends: set[int] = set()
    for value in places:
        ends |= set(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ends)

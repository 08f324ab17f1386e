"""The model's own tokenizer over a stream of documents, in processes, in order."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers

from data_prep.sources import DataError, Document

# A worker gets documents together until they reach this; also the most one piece holds.
BATCH_CHARACTERS = 1 << 18
PIECE_CHARACTERS = 1 << 16
# Tokenized here before processes are started, which import the program anew: as long as that takes.
ALONE_CHARACTERS = 1 << 22
_BATCH_DOCUMENTS = 256
# Before a plain space and after a letter or digit: see Encoder.
_CUT = re.compile(r"(?<=[^\W_]) ")


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's token ids, <bos> first (int32 [tokens]), and a digest of its text."""

    id: str
    source: str
    tokens: np.ndarray
    digest: int


class Encoder:
    """A tokenizers.Tokenizer that adds no special token and reads none out of the text.

    "<s>" in a text is three characters, not the start of a document. A long document is encoded
    in pieces of about PIECE_CHARACTERS where that provably gives the ids of the whole, because
    the memory and time of one call grow with its text; otherwise whole. A cut before a plain space
    that follows a letter or digit is proven for BPE without a normalizer, where no added token can
    match over the cut, in two cases:
    - byte-level with GPT-2's regular expression (with or without Digits before it): no alternative
      goes on from a letter or digit into a space, and none before the cut looks ahead over it;
    - Metaspace, when no token of the vocabulary holds a space after another character: then no
      merge joins the two sides. A piece that begins with a space gets no further prefix.
    """

    def __init__(self, serialized: str) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.can_cut = _can_cut(json.loads(serialized))

    def encode(self, text: str, piece_characters: int = PIECE_CHARACTERS) -> np.ndarray:
        """Token ids of a text, int32 [tokens], without <bos>."""
        pieces = self.pieces(text, piece_characters) if self.can_cut else iter([text])
        ids = [self.tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
        return np.fromiter(chain.from_iterable(ids), np.int32, sum(map(len, ids)))

    @staticmethod
    def pieces(text: str, piece_characters: int) -> Iterator[str]:
        """The text cut before spaces, each piece at least `piece_characters` but the last."""
        start = 0
        while start < len(text):
            cut = _CUT.search(text, start + piece_characters)
            stop = cut.start() if cut else len(text)
            yield text[start:stop]
            start = stop


@dataclass(frozen=True)
class ModelTokenizer:
    """What data_prep needs of a model's tokenizer; `serialized` is tokenizers' JSON."""

    serialized: str
    bos_id: int
    vocab_size: int


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """The tokenizer of a Hugging Face folder, as transformers' AutoTokenizer reads it.

    Raises:
        DataError: when there is none, it has no fast form, or it has no <bos> token.
    """
    from transformers import AutoTokenizer

    remedy = "give a model folder with tokenizer.json or tokenizer.model (stage=fetch)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, ... by kind of file that is missing
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0].strip()}"
        raise DataError(f"no tokenizer can be loaded from {folder}: {reason}; {remedy}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {folder} is a {type(tokenizer).__name__} without the form of the "
            f"tokenizers library; {remedy}"
        )
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"the tokenizer in {folder} has no bos_token, which starts each document; set "
            'bos_token in its tokenizer_config.json, such as "<s>"'
        )
    backend = tokenizer.backend_tokenizer
    return ModelTokenizer(
        serialized=backend.to_str(),
        bos_id=tokenizer.bos_token_id,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
    )


def tokenize_documents(
    documents: Iterator[Document], tokenizer: ModelTokenizer, workers: int = 1
) -> Iterator[TokenizedDocument]:
    """Documents in their order as token ids; the same for every number of workers.

    At most two batches per worker are read ahead, so memory does not grow with the source.

    Raises:
        DataError: on workers below 1, and when a worker process dies.
    """
    if workers < 1:
        raise DataError(f"data.workers={workers}: must be 1 or more; set data.workers")
    batches = _batches(documents)
    encoder = Encoder(tokenizer.serialized)
    alone = 0
    for batch in batches:
        yield from _tokenize(batch, encoder, tokenizer.bos_id)
        alone += sum(len(document.text) for document in batch)
        if workers > 1 and alone >= ALONE_CHARACTERS:
            break
    else:
        return
    # spawn: a forked copy of a process with threads (torch, tokenizers) may hang
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.serialized, tokenizer.bos_id),
    )
    waiting: deque[Future] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_tokenize_in_worker, batch))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a tokenizer process of {workers} died, as when memory runs out; set data.workers "
            "lower"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(batch: list[Document], encoder: Encoder, bos_id: int) -> list[TokenizedDocument]:
    done = []
    for document in batch:
        tokens = np.concatenate([np.array([bos_id], np.int32), encoder.encode(document.text)])
        digest = hashlib.blake2b(document.text.encode("utf-8"), digest_size=8).digest()
        done.append(
            TokenizedDocument(
                document.id, document.source, tokens, int.from_bytes(digest, "little")
            )
        )
    return done


_worker: tuple[Encoder, int] | None = None


def _start_worker(serialized: str, bos_id: int) -> None:
    global _worker
    _worker = Encoder(serialized), bos_id


def _tokenize_in_worker(batch: list[Document]) -> list[TokenizedDocument]:
    return _tokenize(batch, *_worker)


def _can_cut(config: dict) -> bool:
    """Whether Encoder's proof holds for a tokenizer.json."""
    model = config["model"]
    plain = (
        model.get("type") == "BPE"
        and config.get("normalizer") is None
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(token["special"] for token in config.get("added_tokens", []))
    )
    steps = config.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds in (["ByteLevel"], ["Digits", "ByteLevel"]):
        return plain and steps[-1]["use_regex"] and not steps[-1]["add_prefix_space"]
    if kinds == ["Metaspace"]:
        space = steps[0]["replacement"]
        crosses = any(space in token.lstrip(space) for token in model["vocab"])
        # a space outside the vocabulary could join its unknown neighbours into one token, and
        # ignore_merges takes a last piece that is a token of the vocabulary without its merges
        return plain and not crosses and space in model["vocab"] and not model["ignore_merges"]
    return False

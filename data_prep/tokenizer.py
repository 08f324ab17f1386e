"""The model's own tokenizer: its ids of texts of any length, by the fastest way that gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from data_prep.cuts import cut_of, pieces
from data_prep.merges import MergeEngine, Unsupported
from data_prep.parity import parity_sample
from data_prep.sources import DataError
from data_prep.tokenizer_folder import file_tokenizer, open_tokenizer

ENGINES = ("auto", "tiktoken", "tokenizers")
# The most characters of one call, as far as the text can be cut.
PIECE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class ModelTokenizer:
    """What data_prep needs of a model's tokenizer; `serialized` is tokenizers' JSON.

    engine: "tiktoken" or "tokenizers", which of the two makes the ids.
    """

    serialized: str
    bos_id: int
    vocab_size: int
    engine: str = "tokenizers"


class Encoder:
    """Ids of a tokenizers.Tokenizer that adds no special token and reads none out of the text.

    "<s>" in a text is three characters, not the start of a document. A long document is encoded
    in pieces of about PIECE_CHARACTERS where that provably gives the ids of the whole (cuts.py),
    because the memory and time of one call grow with its text; otherwise whole.
    """

    def __init__(self, serialized: str, engine: str = "tokenizers") -> None:
        """`serialized`: a tokenizer.json; `engine`: "tiktoken" or "tokenizers".

        Raises:
            Unsupported: when tiktoken's engine does not do this tokenizer.
        """
        self._serialized = serialized
        config = json.loads(serialized)
        self.merges = MergeEngine(config) if engine == "tiktoken" else None
        self.cut = cut_of(config, own_prefix=self.merges is not None)
        self._tokenizer: tokenizers.Tokenizer | None = None

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """tokenizers' own, made when it is first needed."""
        if self._tokenizer is None:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._serialized)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True
        return self._tokenizer

    def reference(self, text: str) -> np.ndarray:
        """tokenizers' own ids of a text as a whole, int32 [tokens]."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [tokens], without <bos>."""
        return np.concatenate([np.empty(0, np.int32), *self.encode_stream([text])])

    def encode_stream(
        self, texts: Iterable[str], piece_characters: int = PIECE_CHARACTERS
    ) -> Iterator[np.ndarray]:
        """Token ids of one document that comes in pieces, in pieces of their own."""
        first = True
        for piece in pieces(texts, self.cut, piece_characters):
            ids = self.merges.encode(piece, first) if self.merges else None
            yield self.reference(piece) if ids is None else ids
            first = False

    def check(self, text: str) -> None:
        """Hold tiktoken's ids of a text against tokenizers'.

        Raises:
            DataError: when they differ.
        """
        if self.merges and not np.array_equal(self.encode(text), self.reference(text)):
            raise DataError(
                f"the text that begins {text[:60]!r}: tiktoken's engine gives other ids than "
                "tokenizers; set data.engine=tokenizers"
            )


def mismatch(encoder: Encoder) -> str | None:
    """The first of parity_sample's texts of which the engine's ids are not tokenizers' own."""
    for text in parity_sample(json.loads(encoder.tokenizer.to_str())):
        if not np.array_equal(encoder.encode(text), encoder.reference(text)):
            return text
    return None


def choose_engine(serialized: str, wanted: str = "auto") -> tuple[str, str]:
    """(engine, why): tiktoken's where it does the tokenizer and gives the same ids.

    Raises:
        DataError: on an unknown engine, or when tiktoken's is asked for and will not do.
    """
    if wanted not in ENGINES:
        raise DataError(
            f"data.engine={wanted!r}: must be one of {', '.join(ENGINES)}; set data.engine"
        )
    if wanted == "tokenizers":
        return "tokenizers", "as data.engine says"
    try:
        text = mismatch(Encoder(serialized, "tiktoken"))
        reason = None if text is None else f"it gives other ids for {text[:40]!r}"
    except (Unsupported, KeyError, ValueError) as error:
        # tiktoken raises ValueError on an expression that it cannot read
        reason = str(error)
    if reason is None:
        return "tiktoken", "its ids are those of tokenizers on every text of the check"
    if wanted == "tiktoken":
        raise DataError(
            f"data.engine=tiktoken: cannot be used for this tokenizer: {reason}; set "
            "data.engine=auto"
        )
    return "tokenizers", f"tiktoken's engine cannot be used: {reason}"


def load_tokenizer(folder: Path, engine: str = "auto") -> tuple[ModelTokenizer, str]:
    """The tokenizer of a Hugging Face folder: what its own file says.

    Returns:
        The tokenizer, and why its engine was chosen.

    Raises:
        DataError: when there is none, or it has no <bos> token; and what choose_engine and
            open_tokenizer raise.
    """
    bos_id = open_tokenizer(folder).bos_token_id
    own = file_tokenizer(folder)
    if bos_id is None:
        raise DataError(
            f"the tokenizer in {folder} has no bos_token, which starts each document; set "
            'bos_token in its tokenizer_config.json, such as "<s>"'
        )
    serialized = own.to_str()
    chosen, why = choose_engine(serialized, engine)
    made = ModelTokenizer(
        serialized=serialized,
        bos_id=bos_id,
        vocab_size=max(bos_id, *own.get_vocab(with_added_tokens=True).values()) + 1,
        engine=chosen,
    )
    return made, why

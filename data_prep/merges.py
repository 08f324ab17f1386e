"""BPE through tiktoken's merge engine: the ids of a tokenizers.Tokenizer, several times faster.

tiktoken merges the pair of lowest rank, leftmost first, as tokenizers does; it works on bytes and
cuts the text first by one regular expression. Two kinds of tokenizer.json are carried over:

- byte-level (GPT-2's expression, with or without Digits before it, or one Split of its own);
- BPE over the whole text with "▁" for a space and bytes for unknown characters, as Llama-2's
  SentencePiece model. It has no expression, but a text may be cut between characters that stand
  side by side in no token, since no merge then joins the sides. Characters of several bytes are
  merged first, by way of prefixes that are no tokens; a prefix that is left over is of a character
  outside the vocabulary, and becomes the tokens of its bytes.

That the ids are those of tokenizers is not assumed: data_prep/parity.py's texts tell at start.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import tiktoken

SPACE = "▁"
# GPT-2's expression, and the same after Digits has cut out single digits.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# Looking ahead doubles a match's time. These need not: a NUL stands before the last whitespace of
# a run where the expressions above would end a match there.
_MARKED = {
    GPT2: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x00]+|\s+|\x00",
    DIGITS: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\x00]+|\s+|\x00",
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASCII_SPACES = b"\t\n\v\f\r "
_OTHER_SPACES = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Runs of whitespace of which ASCII alone does not tell where they end, and what comes then.
_ODD_RUN = re.compile(
    rf"[{_OTHER_SPACES}][\t-\r {_OTHER_SPACES}]|[\t-\r ][{_OTHER_SPACES}]|[\t-\r ]{{2}}[^\x00-\x7f]"
)
_IS_SPACE = np.isin(np.arange(256), list(_ASCII_SPACES))
# Never a byte of UTF-8.
_NO_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
# As long as tiktoken merges a piece without a heap.
_LONGEST_RUN = 16


class Unsupported(ValueError):
    """A tokenizer.json that tiktoken's engine does not do; the message says why."""


def byte_characters() -> dict[int, str]:
    """The character that byte-level BPE shows for each byte (GPT-2's bytes_to_unicode)."""
    shown = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    hidden = [byte for byte in range(256) if byte not in shown]
    return shown | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _steps(config: dict) -> list[dict]:
    steps = config.get("pre_tokenizer")
    if not steps:
        return []
    return steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]


def is_plain_bpe(config: dict) -> bool:
    """BPE without what changes ids by chance or by place, whose added tokens are all special."""
    model = config["model"]
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(token["special"] for token in config.get("added_tokens", []))
    )


def expression(config: dict) -> str | None:
    """The one expression that cuts a text for byte-level BPE; None for any other kind."""
    steps = _steps(config)
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if config.get("normalizer") is not None or last.get("type") != "ByteLevel":
        return None
    if last["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"] and last["use_regex"]:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and last["use_regex"] and steps[0]["individual_digits"]:
        return DIGITS
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"]:
            return split["pattern"].get("Regex")
    return None


def prefix_rule(config: dict) -> str | None:
    """Where BPE over the whole text puts a space before it: "always", "unless_space", "never".

    None for any other kind of tokenizer.
    """
    steps, normalizer = _steps(config), config.get("normalizer")
    if normalizer is None and [step["type"] for step in steps] == ["Metaspace"]:
        metaspace = steps[0]
        if metaspace["replacement"] != SPACE or metaspace["split"]:
            return None
        return "never" if metaspace["prepend_scheme"] == "never" else "unless_space"
    parts = (normalizer or {}).get("normalizers", [])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    if not steps and replaces in (normalizer, *parts[:1]) and len(parts) < 2:
        return "never"
    return "always" if not steps and parts == [prepends, replaces] else None


def crosses_spaces(config: dict) -> bool:
    """Whether a token holds a space after another character."""
    return any(SPACE in token.lstrip(SPACE) for token in config["model"]["vocab"])


def _merged(model: dict) -> dict[str, int]:
    """Each token that a merge makes, by rank, and its place in the merges."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        token = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        if token in last and last[token] != place - 1:
            raise Unsupported(f"the merges that make {token!r} have others between them")
        first.setdefault(token, place)
        last[token] = place
    return first


class MergeEngine:
    """Token ids of texts and pieces of texts, without special tokens."""

    def __init__(self, config: dict) -> None:
        """`config`: a parsed tokenizer.json.

        Raises:
            Unsupported: when it is of another kind.
        """
        if not is_plain_bpe(config):
            raise Unsupported("no plain BPE, or added tokens that are not special")
        self._ranks: dict[bytes, int] = {}
        self._ids: list[int] = []
        self._marks: np.ndarray | None = None
        self._marked = None
        self._unknown: list[bytes] = []
        self._fallback: list[int] = []
        pattern = expression(config)
        if pattern is not None:
            self._byte_level(config["model"])
            self._engine = self._core(pattern)
            if pattern in _MARKED:
                self._marked = self._core(_MARKED[pattern])
                ends = _ASCII_SPACES + (b"0123456789" if pattern == DIGITS else b"")
                self._marks = np.isin(np.arange(256), list(ends))
        else:
            rule = prefix_rule(config)
            if rule is None:
                raise Unsupported("neither byte-level nor BPE over the whole text")
            self._prefix = rule
            self._engine = self._core(self._whole_text(config))
        self._table = np.array(self._ids, np.int32)

    def encode(self, text: str, first: bool = True) -> np.ndarray | None:
        """Token ids, int32 [tokens]; None where the vocabulary lacks a byte of the text.

        Args:
            first: whether the text begins a document.
        """
        if self._fallback:
            return self._encode_whole(text, first)
        raw = text.encode()
        if any(byte in raw for byte in self._unknown):
            return None
        engine, dropped = self._engine, False
        simple = self._marked and b"\0" not in raw
        if simple and (text.isascii() or not _ODD_RUN.search(text)):
            text, dropped = _mark(raw, self._marks, text)
            engine = self._marked
        ranks = np.array(engine.encode_ordinary(text), np.intp)
        # a byte's rank is the byte, so 0 is a mark
        return self._table[ranks[ranks != 0] if dropped else ranks]

    def _encode_whole(self, text: str, first: bool) -> np.ndarray:
        text = text.replace(SPACE, " ")
        prefixed = self._prefix == "always" or not text.startswith(" ")
        if first and text and prefixed and self._prefix != "never":
            text = " " + text
        ranks = np.array(self._engine.encode_ordinary(text), np.intp)
        ids = self._table[ranks]
        if ids.size and ids.min() < 0:
            bytes_of = self._engine.decode_single_token_bytes
            parts = [
                [self._ids[rank]]
                if self._ids[rank] >= 0
                else [self._fallback[byte] for byte in bytes_of(rank)]
                for rank in ranks.tolist()
            ]
            ids = np.array([token for part in parts for token in part], np.int32)
        return ids

    def _core(self, pattern: str) -> Any:
        encoding = tiktoken.Encoding(
            "longgen", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={}
        )
        # The public method repairs texts that are not UTF-8; readers leave those out.
        return encoding._core_bpe

    def _add(self, token: bytes, token_id: int) -> None:
        if token not in self._ranks:
            self._ranks[token] = len(self._ranks)
            self._ids.append(token_id)

    def _byte_level(self, model: dict) -> None:
        vocab = model["vocab"]
        shown = byte_characters()
        byte_of = {character: byte for byte, character in shown.items()}
        for byte in range(256):
            self._add(bytes([byte]), vocab.get(shown[byte], -1))
            if shown[byte] not in vocab and byte not in _NO_UTF8:
                self._unknown.append(bytes([byte]))
        for token in _merged(model):
            self._add(bytes(byte_of[character] for character in token), vocab[token])

    def _whole_text(self, config: dict) -> str:
        """Add the ranks; returns the expression that cuts a text."""
        model = config["model"]
        vocab = model["vocab"]
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        if not model.get("byte_fallback") or any(name not in vocab for name in names):
            raise Unsupported("no byte_fallback to tokens of all bytes")
        if crosses_spaces(config) or SPACE not in vocab or model.get("ignore_merges"):
            raise Unsupported("tokens with a space after another character, or ignore_merges")
        self._fallback = [vocab[name] for name in names]
        characters = [token for token in vocab if len(token) == 1]
        for byte in range(256):
            shown = SPACE if byte == 0x20 else chr(byte)
            token = vocab.get(shown) if byte < 0x80 else None
            self._add(bytes([byte]), self._fallback[byte] if token is None else token)
        long = [(c.encode(), vocab[c]) for c in characters if c != SPACE and not c.isascii()]
        for raw, _ in long:
            for stop in range(2, len(raw)):
                self._add(raw[:stop], -1)
        for raw, token in long:
            self._add(raw, token)
        merged = _merged(model)
        for token in merged:
            self._add(token.replace(SPACE, " ").encode(), vocab[token])
        joined = sorted(set().union(*map(set, merged)) - {SPACE}) if merged else []
        inside = "".join(re.escape(c) if c.isascii() else c for c in joined)
        alone = rf"[^ {inside}]{{1,{_LONGEST_RUN}}}| +"
        return rf" *[{inside}]+|{alone}" if inside else alone


def _mark(raw: bytes, ends: np.ndarray, text: str) -> tuple[str, bool]:
    """A text with a NUL before each last whitespace where a run's match ends, and whether any is.

    Args:
        ends: bool [256], the bytes before which a run is not divided.
    """
    values = np.frombuffer(raw, np.uint8)
    is_space = _IS_SPACE[values]
    last = is_space[:-2] & is_space[1:-1] & ~ends[values[2:]]
    places = np.flatnonzero(last) + 1
    if not len(places):
        return text, False
    return np.insert(values, places, 0).tobytes().decode(), True

"""Where a text may be cut into pieces whose token ids, joined, are those of the whole.

A cut is proven for plain BPE, where no added token can match over it, in two cases:

- byte-level after a known regular expression, at a place where one match ends and the next begins
  whatever stands further left or right: no alternative goes on over it or looks ahead over it;
- BPE over the whole text, between two characters that stand side by side in no token of the
  vocabulary: then no merge joins the sides.

What offers no such place (one long run of blanks, or of letters without a mark or digit between) is
one piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from data_prep.merges import (
    DIGITS,
    GPT2,
    LLAMA3,
    SPACE,
    expression,
    is_plain_bpe,
    prefix_rule,
)

# (text, start): the first place from `start` on where the text may be cut; None: nowhere.
Cut = Callable[[str, int], "int | None"]

# Letters and marks alike in every version of Unicode that a tokenizer may follow.
_LETTERS = "0-9A-Za-z\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_MARKS = (
    "!-/:-@\\[-^`{-~\u060c\u061b\u061f\u0964\u0965\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011"
    "\u3014-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_AFTER_LETTER = rf"(?<=[{_LETTERS}])[{_MARKS}]|(?<=[A-Za-z])[0-9]|(?<=[0-9])[A-Za-z]"
_PLACES = {
    GPT2: rf"(?<=[^\W_]|[{_MARKS}])[ \n]|{_AFTER_LETTER}",
    DIGITS: rf"(?<=[^\W_]|[{_MARKS}])[ \n]|{_AFTER_LETTER}",
    # a match goes on from marks into line ends here
    LLAMA3: rf"(?<=[^\W_])[ \n]|{_AFTER_LETTER}",
}


def cut_of(config: dict, own_prefix: bool) -> Cut | None:
    """Where a text may be cut by a tokenizer.json, parsed; None: nowhere that is proven.

    Args:
        own_prefix: whether the caller puts the first piece's space itself, so that later pieces
            get none.
    """
    if not is_plain_bpe(config):
        return None
    found = expression(config)
    if found is not None:
        return _at_matches(re.compile(_PLACES[found])) if found in _PLACES else None
    rule, model = prefix_rule(config), config["model"]
    # ignore_merges takes a piece that is a token of the vocabulary without its merges
    if rule is None or model.get("ignore_merges") or (rule == "always" and not own_prefix):
        return None
    return _between_tokens(model, before_space=rule != "never" and not own_prefix)


def pieces(texts: Iterable[str], cut: Cut | None, piece_characters: int) -> Iterator[str]:
    """A text that comes in pieces, cut anew: at least `piece_characters` each but the last.

    Args:
        cut: where it may be cut; None: nowhere.
    """
    rest, seen = "", 0
    for text in texts:
        rest += text
        start = 0
        while cut and len(rest) - start > piece_characters:
            place = cut(rest, max(start + piece_characters, seen))
            if place is None:
                # what has been searched is not searched again
                seen = len(rest)
                break
            yield rest[start:place]
            start = place
        rest = rest[start:]
        seen = max(0, seen - start)
    if rest:
        yield rest


def _at_matches(places: re.Pattern) -> Cut:
    def cut(text: str, start: int) -> int | None:
        found = places.search(text, start)
        return found.start() if found else None

    return cut


def _between_tokens(model: dict, before_space: bool) -> Cut:
    """Between characters that no token joins; `before_space`: only where a space comes next."""
    vocab = model["vocab"]
    joined = {pair for token in vocab for pair in zip(token, token[1:], strict=False)}
    whole_fallback = model.get("byte_fallback") and all(
        f"<0x{byte:02X}>" in vocab for byte in range(256)
    )

    def cut(text: str, start: int) -> int | None:
        left = text[start - 1]
        left = SPACE if left == " " else left
        for place in range(start, len(text)):
            right = SPACE if text[place] == " " else text[place]
            # unknown characters without tokens of their bytes become one token
            alone = whole_fallback or right in vocab
            if alone and (left, right) not in joined and not (before_space and right != SPACE):
                return place
            left = right
        return None

    return cut

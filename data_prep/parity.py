"""Texts on which two ways to the same token ids would differ, if they do."""

from __future__ import annotations

from collections.abc import Iterable

from data_prep.merges import SPACE, byte_characters, expression

_MOST_OF_VOCABULARY = 4000
_MOST_TIES = 1000
_MOST_ADDED = 64


def parity_sample(config: dict) -> list[str]:
    """Short documents for a tokenizer.json, parsed.

    Those of edge_texts; odd whitespace; every block of characters to U+3000; what the vocabulary
    says (every so many tokens); and texts in which two merges to one token overlap.
    """
    shown = {character: byte for byte, character in byte_characters().items()}
    byte_level = expression(config) is not None
    spoken = []
    vocab = config["model"]["vocab"]
    for token in list(vocab)[:: max(1, len(vocab) // _MOST_OF_VOCABULARY)]:
        if byte_level and all(character in shown for character in token):
            raw = bytes(shown[character] for character in token)
            spoken.append(raw.decode("utf-8", "ignore"))
        else:
            spoken.append(token.replace(SPACE, " "))
    spaces = "\t\n\v\f\r \x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b\ufeff"
    return [
        *edge_texts(config),
        *(f"a{one}{two}b {two}{one}1{one}" for one in spaces for two in spaces),
        *("".join(map(chr, range(start, start + 64))) for start in range(0, 0x3000, 64)),
        *spoken,
        *_ties(config["model"]),
    ]


def edge_texts(config: dict, added: Iterable[str] = ()) -> list[str]:
    """What ways to read one tokenizer.json have differed in, few enough to try at every start.

    Beginnings, ends, runs of spaces, characters that NFKC changes, digits, control bytes, emoji,
    CJK; the tokenizer's added tokens and those of `added` inside a text.
    """
    tokens = [*(token["content"] for token in config.get("added_tokens", [])), *added]
    tokens = list(dict.fromkeys(tokens))[:_MOST_ADDED]
    return [
        *_HARD,
        *(f"{space * count}a" for space in " \n\t\u00a0\u3000▁" for count in (1, 2, 3)),
        *(f"a{space * count}" for space in " \n\t\u00a0\u3000▁" for count in (1, 2, 3)),
        *(f"def f(x):\n{' ' * count}return  x" for count in range(1, 18)),
        *(form.format(token) for token in tokens for form in ("{0}", "a{0}b", " {0} {0}{0} a")),
    ]


_HARD = [
    "12345 3.14159 1,000,000 0x1F 2⁸ ½ Ⅷ ٣٤ １２ a1b2 1st 22nd",
    "".join(map(chr, range(128))),
    "\x00a\x00\x00 b\x04\x06\x13\x14\x16\x1d\x7f",
    "😀👩‍👩‍👧‍👦🇩🇪👍🏽 ☃️ \U0001f9ff\U000e0041 \U00100000",
    "中文字符，没有空格。日本語のテキスト、カタカナ。한국어 텍스트입니다. 𠮷野家",
    "مرحبا بالعالم नमस्ते שלום ไทย Привет, мир! Ελληνικά",
    "x" + " " * 300 + "y\n\n\n" + "\t" * 70 + "z " + "\n" * 90 + " \n \n1  2   3",
    "it's we'll I'd you're I've I'm can't 's 'S ''' don't'll 1's 2'd",
    "  leading", "trailing  ", " ", "\n", "a", "▁a▁▁b ▁ c", "<s></s><unk><0x0A><|endoftext|>",
    "e\u0301 a\u0308\u0323 \u0130 ß ﬁ ǅ", "a" * 200 + "=" * 200 + "-_" * 90, "lllllll ooooo eeee",
    "ﬁve ﬃ ｆｕｌｌ　ｗｉｄｔｈ ２３ ① Å Å ﷺ ㎏ ﾊﾝｶｸ ™ ª²", "𝒜𝓁𝓅𝒽𝒶 Ⅳ ĳ ŀ ŉ …",
    "def f(x):\n    if x:\n\t\treturn [1,  2]\n\n\n# end\r\n\r\n",
]  # fmt: skip


def _ties(model: dict) -> list[str]:
    """Texts a+b+d where a+b and b+d are one token by two merges of which the right comes first."""
    splits: dict[str, list[tuple[str, str]]] = {}
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        splits.setdefault(left + right, []).append((left, right))
    found = [
        (left + right + ends).replace(SPACE, " ")
        for pairs in splits.values()
        for place, (left, right) in enumerate(pairs)
        for begins, ends in pairs[:place]
        if begins == right
    ]
    return found[:_MOST_TIES]

"""Small tokenizers of both kinds that Llamas use, trained here, and model folders with them."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data_prep.merges import LLAMA3

TEXTS = [
    "The quick brown fox jumps over the lazy dog, 12 times and 3456 more.\n",
    "def f(x):\n    return x + 1  # a comment\n\n\nclass A:\n    pass\n",
    "Llamas live in the mountains; they eat grass   and   hay.\tTabs too. It's theirs.",
    "中文字符，没有空格。中文字，没有。",
] * 3


def byte_level(digits: bool = False, **changes) -> Tokenizer:
    """A byte-level BPE as SmolLM2's (digits) or GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    options = {"add_prefix_space": False, "use_regex": True} | changes
    steps = [pre_tokenizers.ByteLevel(**options)]
    if digits:
        steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """A BPE over the whole text with "▁" for a space, as Llama-2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(tokenizer, ["▁"], ["<unk>", "<s>", "</s>"])
    described = json.loads(tokenizer.to_str())
    vocab = described["model"]["vocab"]
    for token in byte_tokens:
        vocab[token] = len(vocab)
    # trained word by word, as SentencePiece is, and used on the whole text, as Llama's is
    described["pre_tokenizer"]["split"] = False
    return Tokenizer.from_str(json.dumps(described))


def prefixed() -> Tokenizer:
    """The same as Llama-2's tokenizer.json on the hub has it: a normalizer puts the spaces."""
    described = json.loads(metaspace().to_str())
    described["pre_tokenizer"] = None
    described["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    return Tokenizer.from_str(json.dumps(described))


def llama3() -> Tokenizer:
    """A byte-level BPE with Llama-3's expression."""
    tokenizer = byte_level(use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), tokenizer.pre_tokenizer]
    )
    return tokenizer


def replaced() -> Tokenizer:
    """A BPE over the whole text that puts no space before it, as Yi's."""
    tokenizer = prefixed()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    return tokenizer


def _train(tokenizer: Tokenizer, alphabet: list[str], special: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)


def save_model_folder(folder: Path, bos: str | None = "<s>") -> Path:
    """A folder that AutoTokenizer loads, with a byte-level BPE."""
    folder.mkdir(parents=True)
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    if bos:
        config["bos_token"] = bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

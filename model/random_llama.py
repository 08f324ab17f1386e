"""A randomly initialised Llama with its own small byte-level BPE, for demonstrations and tests."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model.config import ModelConfig

# In the order of their ids, as Llama-2 has them.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
NOT_THE_LIBRARY = ("site-packages", "dist-packages", "test", "__pycache__")
TRAINING_BYTES = 4_000_000
LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def save_random_llama(config: ModelConfig, out: Path, seed: int = 1) -> dict[str, int]:
    """Write a Hugging Face folder: float32 weights drawn with `seed`, and a trained tokenizer.

    Returns:
        {"parameters", "vocabulary"}

    Raises:
        ValueError: on a vocabulary below the 256 bytes and the special tokens.
    """
    tokenizer = train_tokenizer(config.vocab_size, config.max_positions)
    unk, bos, eos = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    llama = LlamaConfig(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters=dict(config.rope),
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "vocabulary": len(tokenizer)}


def train_tokenizer(vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the Python standard library; it puts <s> first, as Llama-2's.

    Raises:
        ValueError: where `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < LEAST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {LEAST_VOCABULARY} (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens); set model.vocab_size"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[0]))
    # Numbers digit by digit, as Llama-2 has them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_standard_library(), trainer)
    unk, bos, eos = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def _standard_library() -> Iterator[str]:
    """Text of the standard library's modules, by path, up to TRAINING_BYTES."""
    root = Path(sysconfig.get_path("stdlib"))
    left = TRAINING_BYTES
    # Not the folders of installed packages and tests, which differ from machine to machine.
    modules = list(root.glob("*.py"))
    for folder in root.iterdir():
        if folder.name not in NOT_THE_LIBRARY:
            modules += folder.rglob("*.py")
    for path in sorted(modules):
        text = path.read_text(encoding="utf-8", errors="replace")
        left -= len(text)
        yield text
        if left <= 0:
            return

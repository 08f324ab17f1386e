"""FLOPs follow the pattern's true pairs; figures are the paper's by arithmetic."""

import dataclasses

import pytest

from kernels.pattern import Pattern
from model.config import ModelConfig
from model.cost import matrix_parameters, peak_flops, training_flops
from tests.tiny import PATTERNS, tiny_config, tiny_llama

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA2_7B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_positions=131072,
    norm_eps=1e-5,
    tie_embeddings=False,
    rope=ROPE,
    sparse_rope=ROPE,
    is_full=(False,) * 10 + (True,) * 12 + (False,) * 10,
    pattern=Pattern(sink_tokens=64, window=2048),
)


def test_7b_has_its_parameters_and_the_hybrid_its_flops():
    # 6,738,415,616 less the embedding and the norms.
    assert matrix_parameters(LLAMA2_7B) == 6_738_415_616 - 32000 * 4096 - 65 * 4096
    full = dataclasses.replace(LLAMA2_7B, is_full=(True,) * 32)
    row = [131072]
    assert training_flops(full, row) / 131072 == pytest.approx(142.7e9, rel=1e-3)
    ratio = training_flops(full, row) / training_flops(LLAMA2_7B, row)
    assert ratio == pytest.approx(1.77, abs=0.01)
    # Rows of short documents gain little: within 8K the window is a good part of all.
    short = [8192] * 16
    ratio = training_flops(full, short) / training_flops(LLAMA2_7B, short)
    assert ratio == pytest.approx(1.05, abs=0.005)


@pytest.mark.parametrize("tied", [False, True])
def test_matrix_parameters_are_those_of_the_model(tied):
    config = tiny_config(tied=tied)
    assert matrix_parameters(config) == matrices(config)


def matrices(config: ModelConfig) -> int:
    """Weights of transformers' model that tokens are multiplied with, a tied one too."""
    named = dict(tiny_llama(config).named_parameters())
    named["lm_head.weight"] = named.pop("model.embed_tokens.weight")
    return sum(p.numel() for p in named.values() if p.dim() == 2)


def counted(config: ModelConfig, lengths) -> float:
    """6 per matrix weight and token, 12 * head_dim per visible pair and query head, by counting."""
    total = 6.0 * matrices(config) * sum(lengths)
    for layer in range(config.num_layers):
        pattern = config.pattern_of(layer)
        for head in range(config.num_heads):
            kv_head = head * config.num_kv_heads // config.num_heads
            for length in lengths:
                for q in range(length):
                    live = pattern.live(q, kv_head, config.num_kv_heads)
                    total += 12.0 * config.head_dim * (len(live) + 1)
    return total


@pytest.mark.parametrize("name", PATTERNS)
def test_flops_equal_a_count_of_pairs(name):
    config = tiny_config(is_full=(False, True), pattern=PATTERNS[name])
    assert training_flops(config, [60, 7]) == pytest.approx(counted(config, [60, 7]), rel=1e-12)


@pytest.mark.parametrize("field", ["sink_tokens", "window", "stride"])
def test_an_off_by_one_changes_the_flops(field):
    config = tiny_config(is_full=(False, True), pattern=PATTERNS["per_head"])
    wrong = Pattern(**{**config.pattern.__dict__, field: getattr(config.pattern, field) + 1})
    planted = dataclasses.replace(config, pattern=wrong)
    assert training_flops(planted, [90]) != counted(config, [90])


def test_peak_flops():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("CPU") is None

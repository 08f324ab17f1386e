"""The trained model: parity with transformers, documents kept apart, loss, RoPE per layer kind."""

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import kernels.tiled
import model.mapping
from model.kept import KeptTensors
from model.loss import IGNORED
from tests.closeness import assert_close_by_norm, relative_error
from tests.tiny import PATTERNS, tiny_config, tiny_gpt, tiny_llama

# Of float32, after four layers.
TOLERANCE = 1e-5


def packed(lengths, rows=1):
    """positions [rows, S] and cu_seqlens of rows that each hold documents of these lengths."""
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    ends = torch.tensor(list(lengths) * rows).cumsum(0)
    return positions, torch.cat([torch.zeros(1), ends]).to(torch.int32)


def logits_of_both(config, tokens, llama=None):
    llama = llama or tiny_llama(config)
    positions, bounds = packed([tokens.shape[1]], rows=tokens.shape[0])
    with torch.no_grad():
        ours = tiny_gpt(config, llama)(tokens, positions, bounds)
        return ours, llama(tokens).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_equal_transformers_at_4k(layout, kv_heads, tied):
    config = tiny_config(kv_heads=kv_heads, tied=tied)
    tokens = torch.randint(97, (1, 4096), generator=torch.Generator().manual_seed(1))
    assert_close_by_norm(*logits_of_both(config, tokens), TOLERANCE)


def test_plainly_stacked_qkv_is_caught(layout, monkeypatch):
    config = tiny_config(kv_heads=2)
    honest = model.mapping.merge

    def stacked(name, parts, config):
        return torch.cat(list(parts)) if "linear_qkv" in name else honest(name, parts, config)

    monkeypatch.setattr(model.mapping, "merge", stacked)
    tokens = torch.randint(97, (1, 64))
    assert relative_error(*logits_of_both(config, tokens)) > 1e-2


def test_rows_permuted_for_interleaved_rope_are_caught(layout, monkeypatch):
    config = tiny_config(kv_heads=4)
    honest = model.mapping.merge

    def interleaved(name, parts, config):
        if "linear_qkv" in name:
            q, k, v = (p.view(-1, 2, config.head_dim // 2, config.hidden_size) for p in parts)
            parts = [x.transpose(1, 2).reshape(-1, config.hidden_size) for x in (q, k)]
            parts.append(v.reshape(-1, config.hidden_size))
        return honest(name, parts, config)

    monkeypatch.setattr(model.mapping, "merge", interleaved)
    assert relative_error(*logits_of_both(config, torch.randint(97, (1, 64)))) > 1e-2


@pytest.mark.parametrize("change", ["rope", "norm_eps"])
def test_another_rope_base_or_eps_is_caught(layout, change):
    config = tiny_config()
    value = {"rope": {"rope_type": "default", "rope_theta": 1.1e4}, "norm_eps": 1e-1}[change]
    llama = tiny_llama(config)
    other = dataclasses.replace(config, **{change: value})
    tokens = torch.randint(97, (1, 256))
    assert relative_error(*logits_of_both(other, tokens, llama)) > 100 * TOLERANCE


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_scaled_rope_equals_transformers(layout, rope_type):
    extra = {"linear": {"factor": 4.0}}.get(
        rope_type,
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    )
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **extra}
    config = tiny_config(rope=rope, sparse_rope=rope)
    assert_close_by_norm(*logits_of_both(config, torch.randint(97, (1, 512))), TOLERANCE)


def gradients_of(gpt, losses):
    gpt.zero_grad()
    losses.sum().backward()
    return [p.grad.clone() for p in gpt.parameters()]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_loss_equals_cross_entropy_of_the_logits(layout, pattern):
    config = tiny_config(is_full=(False, True, False), pattern=PATTERNS[pattern])
    gpt = tiny_gpt(config, tiny_llama(config)).train()
    tokens = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, 1)
    labels[:, 50:] = IGNORED
    positions, bounds = packed([40, 24], rows=2)
    losses = gpt(tokens, positions, bounds, labels)
    gradients = gradients_of(gpt, losses)
    logits = gpt(tokens, positions, bounds)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert_close_by_norm(losses.flatten(), wanted, TOLERANCE)
    assert (losses[:, 50:] == 0).all()
    for got, expected in zip(gradients, gradients_of(gpt, wanted), strict=True):
        assert_close_by_norm(got, expected, TOLERANCE)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mlp_tile", [None, 50, 7])
@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_what_layers_keep_changes_no_gradient(layout, recompute, mlp_tile, offload):
    """50 tokens of 2 rows are 25 positions, which 64 is no multiple of."""
    config = tiny_config(is_full=(False, True, False), pattern=PATTERNS["per_head"])
    llama = tiny_llama(config)
    tokens = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(2))
    positions, bounds = packed([40, 24], rows=2)
    found = []
    from model.hybrid_layer import LayerMemory

    for memory in (None, LayerMemory(recompute, mlp_tile, KeptTensors(offload))):
        gpt = tiny_gpt(config, llama, memory=memory).train()
        losses = gpt(tokens, positions, bounds, tokens.roll(-1, 1))
        found.append([losses.detach(), *gradients_of(gpt, losses)])
    for plain, kept in zip(*found, strict=True):
        assert_close_by_norm(kept, plain, TOLERANCE)


@pytest.mark.parametrize(("recompute", "runs"), [("none", 1), ("attention", 1), ("full", 2)])
def test_attention_is_recomputed_where_it_is_not_kept(layout, monkeypatch, recompute, runs):
    calls = []
    honest = kernels.tiled.forward
    monkeypatch.setattr(kernels.tiled, "forward", lambda *a: calls.append(1) or honest(*a))
    from model.hybrid_layer import LayerMemory

    config = tiny_config(is_full=(False,) * 3, pattern=PATTERNS["per_head"])
    gpt = tiny_gpt(config, tiny_llama(config), memory=LayerMemory(recompute)).train()
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    gradients_of(gpt, gpt(tokens, *packed([64]), tokens))
    assert len(calls) == 3 * runs


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packing_leaks_nothing(layout, pattern):
    """Perturb one document: only its own positions' logits may move."""
    config = tiny_config(is_full=(False, True, False), pattern=PATTERNS[pattern])
    gpt = tiny_gpt(config, tiny_llama(config))
    lengths = [13, 30, 21]
    tokens = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(3))
    positions, bounds = packed(lengths, rows=2)
    with torch.no_grad():
        before = gpt(tokens, positions, bounds)
        tokens[0, 13:43] = (tokens[0, 13:43] + 1) % 97
        moved = (gpt(tokens, positions, bounds) - before).abs().amax(-1) > 0
    assert moved[0, 13:43].all()
    assert not moved[0, :13].any()
    assert not moved[0, 43:].any()
    assert not moved[1].any()


def test_a_packed_document_equals_itself_alone(layout):
    config = tiny_config(is_full=(False, True, False))
    gpt = tiny_gpt(config, tiny_llama(config))
    tokens = torch.randint(97, (1, 64), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        together = gpt(tokens, *packed([20, 44]))
        alone = gpt(tokens[:, 20:], *packed([44]))
    assert_close_by_norm(together[:, 20:], alone, TOLERANCE)


def test_each_kind_of_layer_takes_its_own_rope(layout):
    """A base that only one kind of layer uses moves the logits only where such layers exist."""
    tokens = torch.randint(97, (1, 64), generator=torch.Generator().manual_seed(5))
    other = {"rope_type": "default", "rope_theta": 5e5}
    llama = tiny_llama(tiny_config())

    def logits(is_full, **ropes):
        config = tiny_config(is_full=is_full, **ropes)
        with torch.no_grad():
            return tiny_gpt(config, llama)(tokens, *packed([64]))

    full, sparse = (True,) * 4, (False,) * 4
    assert torch.equal(logits(full), logits(full, sparse_rope=other))
    assert torch.equal(logits(sparse), logits(sparse, rope=other))
    assert relative_error(logits(full, rope=other), logits(full)) > 1e-2
    assert relative_error(logits(sparse, sparse_rope=other), logits(sparse)) > 1e-2


def test_vocabulary_padding_gets_no_probability(layout):
    """Rows that only pad the vocabulary stay out of the loss."""
    config = tiny_config()
    llama = tiny_llama(config)
    gpt = tiny_gpt(config, llama)
    tokens = torch.randint(90, (1, 64))
    labels = tokens.roll(-1, 1)
    with torch.no_grad():
        gpt.output_layer.valid_vocab = 90
        losses = gpt(tokens, *packed([64]), labels)
        logits = gpt(tokens, *packed([64]))[..., :90]
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert_close_by_norm(losses.flatten(), wanted, TOLERANCE)


def test_angles_stay_float32_in_a_bf16_model(layout):
    config = tiny_config()
    gpt = tiny_gpt(config, tiny_llama(config)).bfloat16()
    gpt.rotary_pos_emb.set_positions(torch.tensor([[131071]]))
    cos, sin = gpt.rotary_pos_emb()[0]
    assert cos.dtype == sin.dtype == torch.float32
    # In bfloat16 the position would have been 131072.
    found = torch.stack((cos[0, 0, 0, 0], sin[0, 0, 0, 0]))
    assert_close_by_norm(found, [math.cos(131071), math.sin(131071)], 1e-6)


def test_megatron_warns_of_nothing_that_can_be_told_otherwise(layout):
    """What is deprecated in our arguments would be an error in its next version."""
    # Its libraries are imported, which warns of what is not installed.
    tiny_gpt(tiny_config())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="megatron")
        tiny_gpt(tiny_config())

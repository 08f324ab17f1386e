"""The exported class: equal to transformers' Llama where all is full; generate; refusals."""

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

import kernels.pattern
import kernels.sparse_attention
import model
from model.modeling_longgen import LongGenConfig, LongGenForCausalLM
from tests.closeness import assert_close_by_norm, relative_error
from tests.model.small import PATTERNS, ids, llama_and_ours, small_model

TOLERANCE = 1e-5
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", ROPES)
def test_full_layers_equal_transformers_llama(kv_heads, tied, rope):
    llama, ours = llama_and_ours(kv_heads, tied, ROPES[rope])
    tokens = ids(2, 300)
    expected = llama(tokens, labels=tokens)
    found = ours(tokens, labels=tokens)
    assert_close_by_norm(found.logits, expected.logits, TOLERANCE)
    assert_close_by_norm(found.loss, expected.loss, TOLERANCE)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_greedy_ids_equal_transformers_llama():
    llama, ours = llama_and_ours(2, False, ROPES["default"])
    tokens = ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    expected = llama.generate(tokens, **arguments)
    assert torch.equal(ours.generate(tokens, **arguments), expected)


def naive_greedy(hybrid: LongGenForCausalLM, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding by a whole forward a token."""
    for _ in range(steps):
        best = hybrid(tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, best), 1)
    return tokens


@pytest.mark.parametrize("name", PATTERNS)
def test_generate_equals_a_loop_without_cache(name):
    hybrid, tokens = small_model(PATTERNS[name]), ids(1, 21)
    expected = naive_greedy(hybrid, tokens, 20)
    for extra in ({}, {"prefill_chunk_size": 6}, {"use_cache": False}):
        found = hybrid.generate(tokens, max_new_tokens=20, do_sample=False, **extra)
        assert torch.equal(found, expected), extra


def test_generate_left_padded_equals_rows_alone():
    hybrid, tokens = small_model(PATTERNS["per_head"]), ids(2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    for extra in ({}, {"prefill_chunk_size": 8}):
        found = hybrid.generate(
            tokens, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0, **extra
        )
        for row, start in ((0, 13), (1, 0)):
            alone = naive_greedy(hybrid, tokens[row : row + 1, start:], 15)
            assert torch.equal(found[row, start:], alone[0])


def test_beam_search_equals_that_without_cache():
    hybrid, tokens = small_model(PATTERNS["shared"]), ids(2, 25)
    arguments = dict(max_new_tokens=10, num_beams=3, do_sample=False, pad_token_id=0)
    found = hybrid.generate(tokens, **arguments)
    assert torch.equal(found, hybrid.generate(tokens, use_cache=False, **arguments))


def test_generate_goes_on_from_a_prefilled_cache():
    hybrid, tokens = small_model(PATTERNS["shared"]), ids(1, 33)
    cache, logits = hybrid.prefill(tokens[:, :-1], 7)
    assert_close_by_norm(logits, hybrid(tokens[:, :-1]).logits[:, -1], TOLERANCE)
    found = hybrid.generate(tokens, past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert torch.equal(found, naive_greedy(hybrid, tokens, 9))
    assert cache.columns == 33 + 8


def test_prefill_takes_a_mask():
    hybrid, tokens = small_model(PATTERNS["window"]), ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[1, :10] = 0
    cache, logits = hybrid.prefill(tokens, 5, mask)
    assert cache.lengths.tolist() == [24, 14]
    assert_close_by_norm(logits[1:], hybrid(tokens[1:, 10:]).logits[:, -1], TOLERANCE)


def test_full_and_sparse_layers_take_their_own_rope():
    tokens = ids(1, 40)
    other = {"rope_type": "default", "rope_theta": 2e6}
    base = small_model(PATTERNS["window"])(tokens).logits
    for key in ("rope", "sparse_rope"):
        moved = small_model(PATTERNS["window"], **{key: other})(tokens).logits
        assert relative_error(moved, base) > 100 * TOLERANCE
    alone = small_model(PATTERNS["window"], is_full=[False] * 3)(tokens).logits
    moved = small_model(PATTERNS["window"], is_full=[False] * 3, rope=other)(tokens).logits
    assert torch.equal(alone, moved)


@pytest.mark.parametrize("name", PATTERNS)
def test_packed_documents_equal_documents_alone(name):
    hybrid, lengths = small_model(PATTERNS[name]), (17, 1, 30)
    tokens = ids(1, sum(lengths))
    bounds = torch.tensor([0, 17, 18, 48], dtype=torch.int32)
    packed = hybrid(tokens, cu_seqlens=bounds, labels=tokens)
    losses = hybrid.token_losses(tokens, cu_seqlens=bounds, chunk=10)
    alone = [hybrid(part).logits for part in tokens.split(lengths, 1)]
    assert_close_by_norm(packed.logits, torch.cat(alone, 1), TOLERANCE)
    expected = []
    for part in tokens.split(lengths, 1):
        expected += [hybrid.token_losses(part)[0], torch.zeros(1)]
    assert_close_by_norm(losses[0], torch.cat(expected)[:-1], TOLERANCE)
    assert_close_by_norm(packed.loss, losses.sum() / 45, TOLERANCE)


def test_token_losses_leave_padding_out():
    hybrid, tokens = small_model(PATTERNS["window"]), ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    losses = hybrid.token_losses(tokens, mask, chunk=7)
    assert losses.shape == (2, 19)
    assert (losses[0, :4] == 0).all()
    alone = hybrid.token_losses(tokens[:1, 4:])
    assert_close_by_norm(losses[0, 4:], alone[0], TOLERANCE)
    loss = hybrid(tokens, mask, labels=tokens).loss
    assert_close_by_norm(loss, losses.sum() / (19 + 15), TOLERANCE)


def test_gradients_reach_every_parameter():
    hybrid, tokens = small_model(PATTERNS["per_head"]), ids(1, 30)
    hybrid(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hybrid.parameters())


def test_logits_to_keep_and_forms_of_output():
    hybrid, tokens = small_model(PATTERNS["window"]), ids(1, 12)
    every = hybrid(tokens).logits
    assert_close_by_norm(hybrid(tokens, logits_to_keep=3).logits, every[:, -3:], TOLERANCE)
    some = hybrid(tokens, logits_to_keep=torch.tensor([2, 5])).logits
    assert_close_by_norm(some, every[:, [2, 5]], TOLERANCE)
    embedded = hybrid(inputs_embeds=hybrid.model.embed_tokens(tokens), use_cache=True)
    assert_close_by_norm(embedded.logits, every, TOLERANCE)
    assert embedded.past_key_values.get_seq_length() == 12
    assert torch.equal(hybrid(tokens, return_dict=False)[0], every)


def test_configuration_survives_saving(tmp_path):
    hybrid = small_model(PATTERNS["per_head"], tie_word_embeddings=True)
    hybrid.save_pretrained(tmp_path)
    again = LongGenForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_dict() == {**hybrid.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_close_by_norm(again(ids(1, 20)).logits, hybrid(ids(1, 20)).logits, TOLERANCE)


def test_the_kernels_are_bound_as_the_same_modules():
    assert model.pattern is kernels.pattern
    assert model.sparse_attention is kernels.sparse_attention
    code = (
        "import sys, model.modeling_longgen, model.config;"
        "heavy = {'megatron', 'deepspeed', 'hydra', 'omegaconf', 'pipeline'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def refusals() -> dict:
    """What is refused: the call and words of its message."""
    hybrid, tokens = small_model(PATTERNS["window"]), ids(1, 8)
    bounds = torch.tensor([0, 8])
    half = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    prompt = dict(max_new_tokens=2, do_sample=False)
    return {
        "schedule": (lambda: LongGenConfig(is_full=[True] * 3), "is_full has 3 entries"),
        "pattern": (lambda: LongGenConfig(pattern={"window": 0}), "at least 1"),
        "packed_end": (lambda: hybrid(tokens, cu_seqlens=bounds[:1]), "one packed row"),
        "packed_rows": (lambda: hybrid(ids(2, 8), cu_seqlens=bounds), "one packed row"),
        "packed_mask": (lambda: hybrid(tokens, half, cu_seqlens=bounds), "one packed row"),
        "packed_cache": (
            lambda: hybrid(tokens, cu_seqlens=bounds, use_cache=True),
            "without cache",
        ),
        "cache": (lambda: hybrid(tokens, past_key_values=DynamicCache()), "a LongGenCache"),
        "mask": (lambda: hybrid(tokens, half[:, 1:]), r"\(1, 7\): must be \(1, 8\)"),
        "no_token": (lambda: hybrid(tokens, half * 0), "has no token"),
        "labels": (lambda: hybrid(tokens, labels=tokens, logits_to_keep=1), "logits_to_keep=0"),
        "static": (
            lambda: hybrid.generate(tokens, cache_implementation="static", **prompt),
            "must be unset",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_refused(name):
    call, words = refusals()[name]
    with pytest.raises(ValueError, match=words):
        call()

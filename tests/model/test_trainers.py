"""What other people's trainers pass to the model and expect of it: transformers, PEFT, TRL.

peft and accelerate are optional; without them the calls are made as these make them.
"""

import pytest
import torch

from model.modeling_longgen import LongGenForCausalLM
from tests.closeness import assert_close_by_norm
from tests.model.small import PATTERNS, ids, llama_and_ours, small_model

TOLERANCE = 1e-5
LENGTHS = ([9, 11], [1, 4, 15])


def restarting():
    """position_ids [2, 20] of rows of several documents."""
    rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS]
    return torch.stack(rows)


def test_positions_that_begin_again_begin_a_document():
    """As packing collators pass them: the logits of each document alone, no pair across."""
    hybrid, tokens = small_model(PATTERNS["per_head"]), ids(2, 20)
    found = hybrid(tokens, position_ids=restarting(), labels=tokens)
    alone, losses = [], []
    for row, lengths in zip(tokens, LENGTHS, strict=True):
        parts = [part[None] for part in row.split(lengths)]
        alone.append(torch.cat([hybrid(part).logits for part in parts], 1))
        losses += [hybrid.token_losses(part).flatten() for part in parts]
    assert_close_by_norm(found.logits, torch.cat(alone), TOLERANCE)
    assert_close_by_norm(found.loss, torch.cat(losses).mean(), TOLERANCE)
    llama, ours = llama_and_ours()
    told = {"position_ids": restarting(), "use_cache": False}
    assert_close_by_norm(ours(tokens, **told).logits, llama(tokens, **told).logits, TOLERANCE)


def test_a_packed_row_by_the_names_that_collators_use():
    hybrid, tokens = small_model(PATTERNS["window"]), ids(1, 20)
    bounds = torch.tensor([0, 9, 20], dtype=torch.int32)
    expected = hybrid(tokens, cu_seqlens=bounds, labels=tokens)
    packed = {
        "position_ids": restarting()[:1],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 11,
        "max_length_k": 11,
        "seq_idx": torch.tensor([[0] * 9 + [1] * 11]),
    }
    found = hybrid(tokens, labels=tokens, **packed)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    # TRL calls the decoder below the head by itself.
    states = hybrid.base_model(input_ids=tokens, attention_mask=None, use_cache=False, **packed)
    logits = hybrid.get_output_embeddings()(states.last_hidden_state)
    assert torch.equal(logits, expected.logits)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_positions_of_ordinary_rows_change_nothing(side):
    hybrid, tokens = small_model(PATTERNS["per_head"]), ids(2, 16)
    mask = torch.ones_like(tokens)
    if side is not None:
        mask[0, slice(0, 5) if side == "left" else slice(11, None)] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected = hybrid(tokens, mask, use_cache=True)
    found = hybrid(tokens, mask, position_ids=positions, use_cache=True)
    assert torch.equal(found.logits, expected.logits)
    step = {"attention_mask": torch.cat((mask, mask[:, -1:]), 1)}
    again = hybrid(tokens[:, :1], past_key_values=expected.past_key_values, **step).logits
    next_ = mask.sum(1, keepdim=True)
    told = hybrid(
        tokens[:, :1], past_key_values=found.past_key_values, position_ids=next_, **step
    ).logits
    assert torch.equal(told, again)
    every = torch.arange(16)
    assert torch.equal(hybrid(tokens, cache_position=every).logits, hybrid(tokens).logits)


def test_generate_takes_positions_and_embeddings():
    hybrid, tokens = small_model(PATTERNS["per_head"]), ids(2, 12)
    wanted = dict(max_new_tokens=5, do_sample=False)
    expected = hybrid.generate(tokens, **wanted)
    positions = torch.arange(12).expand(2, -1)
    assert torch.equal(hybrid.generate(tokens, position_ids=positions, **wanted), expected)
    embeddings = hybrid.get_input_embeddings()(tokens)
    found = hybrid.generate(inputs_embeds=embeddings, **wanted)
    assert torch.equal(found, expected[:, 12:])


def test_hidden_states_are_those_of_transformers():
    llama, ours = llama_and_ours()
    tokens = ids(2, 20)
    expected = llama(tokens, output_hidden_states=True).hidden_states
    found = ours(tokens, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for ours_, theirs in zip(found, expected, strict=True):
        assert_close_by_norm(ours_, theirs, TOLERANCE)
    ours.config.output_hidden_states = True
    assert len(ours(tokens).hidden_states) == 4
    assert ours(tokens, output_hidden_states=False).hidden_states is None


def test_a_loss_over_several_micro_batches_is_divided_by_their_tokens():
    llama, ours = llama_and_ours()
    tokens = ids(2, 20)
    told = {"labels": tokens, "num_items_in_batch": torch.tensor(100)}
    assert_close_by_norm(ours(tokens, **told).loss, llama(tokens, **told).loss, TOLERANCE)
    assert_close_by_norm(
        ours(tokens, **told).loss * 100 / 38, ours(tokens, labels=tokens).loss, 1e-6
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    hybrid, tokens = small_model(PATTERNS["per_head"]).train(), ids(2, 20)

    def gradients():
        hybrid.zero_grad()
        output = hybrid(tokens, labels=tokens, use_cache=True)
        output.loss.backward()
        return output, [parameter.grad.clone() for parameter in hybrid.parameters()]

    output, expected = gradients()
    assert output.past_key_values is not None
    options = {"use_reentrant": reentrant}
    # By the name that a version of transformers has: the older one is deprecated.
    newer = getattr(hybrid, "activation_checkpointing_enable", None)
    (newer or hybrid.gradient_checkpointing_enable)(options)
    hybrid.enable_input_require_grads()
    output, found = gradients()
    assert output.past_key_values is None
    for one, other in zip(found, expected, strict=True):
        assert_close_by_norm(one, other, 1e-6)
    with pytest.raises(ValueError, match="past_key_values with gradient checkpointing: must be"):
        hybrid(tokens, past_key_values=hybrid.new_cache())
    assert hybrid.eval()(tokens, use_cache=True).past_key_values is not None


def refusals() -> dict:
    """What is refused: the call, the kind of error and words of its message."""
    hybrid, tokens = small_model(PATTERNS["window"]), ids(2, 20)
    bounds = torch.tensor([0, 9, 20])
    cases = {
        "offset": ({"position_ids": torch.arange(20) + 1}, "must count the tokens of each"),
        "gap": ({"position_ids": torch.arange(20) * 2}, "must count the tokens of each"),
        "documents and cache": (
            {"position_ids": restarting(), "use_cache": True},
            "position_ids of 5 documents in 2 rows: must be one for each row where there is a",
        ),
        "two bounds": (
            {"cu_seqlens": bounds, "cu_seq_lens_q": torch.tensor([0, 8, 20])},
            "cu_seqlens and cu_seq_lens_q differ: must be the same",
        ),
        "keys' bounds": (
            {"cu_seq_lens_q": bounds, "cu_seq_lens_k": torch.tensor([0, 20])},
            "cu_seq_lens_q and cu_seq_lens_k differ",
        ),
        "attentions": ({"output_attentions": True}, "output_attentions=True: must be False"),
        "two inputs": ({"inputs_embeds": torch.zeros(2, 20, 32)}, "either input_ids or inputs"),
    }
    return {
        name: (lambda given=given: hybrid(tokens, **given), words)
        for name, (given, words) in cases.items()
    }


@pytest.mark.parametrize("name", refusals())
def test_refused(name):
    call, words = refusals()[name]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["token_type_ids", "max_length_q", "cu_seq_lens_k"])
def test_arguments_that_mean_nothing_here_are_refused(name):
    with pytest.raises(TypeError, match=f"takes no {name}; leave it out"):
        small_model(PATTERNS["window"])(ids(1, 4), **{name: torch.tensor([0, 4])})


def lora(hybrid):
    """LoRA on the queries and values: PEFT's, or adapters and a call like its own."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        for layer in hybrid.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: out * 1.5)

        def call(input_ids, attention_mask=None, labels=None):
            given = dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            none = ("inputs_embeds", "output_attentions", "output_hidden_states", "return_dict")
            return hybrid(**given, **dict.fromkeys(none))

        return call
    targets = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(hybrid, targets)


def test_lora_trains():
    hybrid, tokens = small_model(PATTERNS["per_head"]).train(), ids(2, 20)
    model = lora(hybrid)
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in hybrid.parameters())


def test_transformers_trainer_trains(tmp_path):
    pytest.importorskip("accelerate", reason="optional: pip install accelerate")
    from transformers import Trainer, TrainingArguments

    hybrid = small_model(PATTERNS["per_head"])
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids(4, 20)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_steps=2,
    )
    before = hybrid.lm_head.weight.clone()
    Trainer(model=hybrid, args=arguments, train_dataset=rows).train()
    assert not torch.equal(hybrid.lm_head.weight, before)
    again = LongGenForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(again.lm_head.weight, hybrid.lm_head.weight)

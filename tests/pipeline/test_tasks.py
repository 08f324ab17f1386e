import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kernels.pattern import Pattern
from kernels.slots import Slots
from model.modeling_longgen import LongGenForCausalLM
from pipeline.evaluated_model import EvaluatedModel
from pipeline.hf_folder import longgen_config
from pipeline.manifest import StageError
from pipeline.schema_of_eval import EvalSection, NiahSection, PerplexitySection
from pipeline.tasks import kv_bytes, niah, perplexity
from pipeline.tasks.material import Material
from tests.closeness import assert_close_by_norm
from tests.data_prep.helpers import save_model_folder
from tests.pipeline.evaluation_helpers import VOCABULARY, held_out
from tests.tiny import PATTERNS, tiny_config, tiny_llama


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_model_folder(tmp_path_factory.mktemp("t") / "model"))


def hybrid(pattern="sink", **changes):
    """A random model with sparse layers at both ends."""
    shape = tiny_config(
        vocab_size=VOCABULARY,
        is_full=(False, True, True, False),
        pattern=PATTERNS[pattern],
        **changes,
    )
    torch.manual_seed(3)
    return LongGenForCausalLM(longgen_config(shape)).eval()


def perplexity_section(**changes):
    values = {"documents": 2, "min_length": 50, "max_length": 60, "bucket": 16} | changes
    return EvalSection(perplexity=PerplexitySection(**values))


def niah_section(**changes):
    values = {"lengths": [150], "depths": [0, 50, 100], "samples": 2, "seed": 7} | changes
    return EvalSection(prefill_chunk=64, niah=NiahSection(**values))


def evaluated(model, eos=(1,), chunk=64, ours=True):
    """A model as tasks use it."""
    return EvaluatedModel(model, frozenset(eos), ours, chunk, {"context": 4096})


def documents_only(documents):
    return Material(None, documents)


def test_perplexity_picks_long_documents_and_cuts_them():
    documents = held_out((40, 80, 49, 300, 50, 51))
    samples = perplexity.build(perplexity_section(documents=3), documents_only(documents))
    assert [s.document for s in samples] == [1, 3, 4]
    assert [len(s.tokens) for s in samples] == [60, 60, 50]
    assert all((s.tokens == documents[s.document][: len(s.tokens)]).all() for s in samples)
    spread = perplexity.build(perplexity_section(documents=2), documents_only(documents))
    assert [s.document for s in spread] == [1, 4]


def test_perplexity_refuses_too_short_documents():
    with pytest.raises(StageError, match=r"min_length=50: the longest of 2 .* has 40 .*held_out"):
        perplexity.build(perplexity_section(), documents_only(held_out((40, 30))))


@pytest.mark.parametrize("pattern", ["sink", "per_head"])
def test_perplexity_sums_equal_one_forward(pattern):
    model = hybrid(pattern)
    section = perplexity_section(max_length=57)
    sample = perplexity.build(section, documents_only(held_out()))[0]
    ids = torch.from_numpy(sample.tokens)[None]
    with torch.no_grad():
        logp = model(ids).logits[0].double().log_softmax(-1)
    records = perplexity.measure(sample, evaluated(model), section)
    assert [(r["start"], r["stop"]) for r in records] == [(0, 16), (16, 32), (32, 48), (48, 57)]
    # position 0 is <bos>, which nothing predicts
    assert [r["tokens"] for r in records] == [15, 16, 16, 9]
    for record in records:
        positions = range(max(1, record["start"]), record["stop"])
        expected = -sum(logp[p - 1, ids[0, p]].item() for p in positions)
        assert_close_by_norm(record["nll"], expected, 1e-5)
    assert len({round(r["nll"] / r["tokens"], 3) for r in records}) > 1


def test_perplexity_of_a_limited_context_sees_no_further_back():
    class Counts:
        """The loss of a token is the number of tokens before it in its row."""

        def token_losses(self, tokens):
            assert tokens[0] == 0
            return torch.arange(1, len(tokens), dtype=torch.float64)

    tokens = np.arange(21)
    losses = perplexity.limited_losses(tokens, Counts(), 4)
    assert losses.tolist() == [*(4, 5, 6, 7) * 4, 4]
    section = perplexity_section(bucket=6, contexts=[4, 8])
    sample = perplexity.DocumentSample("0", 0, tokens)
    records = perplexity.measure(sample, Counts(), section)
    assert [r.get("nll_of_context") for r in records] == [
        None,
        {"4": 6 + 7 + 4 + 5 + 6 + 7},
        {"4": 4 + 5 + 6 + 7 + 4 + 5, "8": 12 + 13 + 14 + 15 + 8 + 9},
        {"4": 6 + 7 + 4, "8": 10 + 11 + 12},
    ]


def test_perplexity_of_the_base_equals_transformers():
    shape = tiny_config(vocab_size=VOCABULARY)
    stock = tiny_llama(shape)
    ours = LongGenForCausalLM(longgen_config(shape)).eval()
    ours.load_state_dict(stock.state_dict())
    section = perplexity_section(bucket=1000)
    sample = perplexity.build(section, documents_only(held_out()))[0]
    ids = torch.from_numpy(sample.tokens)[None]
    with torch.no_grad():
        expected = stock(ids, labels=ids).loss.item()
    (record,) = perplexity.measure(sample, evaluated(ours), section)
    assert_close_by_norm(record["nll"] / record["tokens"], expected, 1e-5)


def test_bucket_of_one_token_has_no_record_for_bos():
    section = perplexity_section(bucket=1, documents=1)
    sample = perplexity.build(section, documents_only(held_out()))[0]
    records = perplexity.measure(sample, evaluated(hybrid()), section)
    assert [r["start"] for r in records] == list(range(1, len(sample.tokens)))


def needle_prompts(tokenizer, documents=None, **changes):
    """(sample, prompt) of every needle."""
    material = Material(tokenizer, held_out() if documents is None else documents)
    return [(s, s.make()) for s in niah.build(niah_section(**changes), material)]


@pytest.mark.parametrize("length", [150, 1000])
@pytest.mark.parametrize("needles", [1, 2])
def test_needle_prompts_have_exactly_the_length(tokenizer, length, needles):
    length *= needles
    made = needle_prompts(tokenizer, lengths=[length], needles=[needles])
    assert len(made) == 6
    for sample, prompt in made:
        assert len(prompt.tokens) == length == sample.length
        assert prompt.tokens[0] == 0 and (prompt.tokens[1:] != 0).all()
        text = tokenizer.decode(prompt.tokens)
        assert len(prompt.expected) == needles
        assert all(text.count(f"is {number}.") == 1 for number in prompt.expected)
        assert text.endswith(" is" if needles == 1 else " are")


def test_needle_lies_at_its_depth(tokenizer):
    made = needle_prompts(
        tokenizer, held_out((5000,)), lengths=[2000], depths=[0, 30, 100], samples=1
    )
    for _, prompt in made:
        needle = tokenizer("number of the", add_special_tokens=False)["input_ids"]
        windows = np.lib.stride_tricks.sliding_window_view(prompt.tokens, len(needle))
        at = (windows == needle).all(1).nonzero()[0][0]
        # at most 5% before its depth, so that it may stand after a line
        assert prompt.depth / 100 - 0.06 < at / 2000 < prompt.depth / 100 + 0.01
        before = tokenizer.decode(prompt.tokens[: -prompt.fields["distance"]])
        assert before.endswith(f"is {prompt.expected[0]}.\n")


def test_several_needles_are_spread(tokenizer):
    made = needle_prompts(
        tokenizer, held_out((9000,)), lengths=[6000], depths=[10], samples=1, needles=[4]
    )
    ((_, prompt),) = made
    text = tokenizer.decode(prompt.tokens)
    before = tokenizer.decode(prompt.tokens[: -prompt.fields["distance"]])
    assert before.endswith(f"is {prompt.expected[0]}.\n")
    places = sorted(text.index(f"is {number}.") / len(text) for number in prompt.expected)
    assert places == pytest.approx([0.1, 0.35, 0.6, 0.85], abs=0.07)


def test_needle_stands_after_a_line(tokenizer):
    line = tokenizer("The quick brown fox jumps over the lazy dog.\n")["input_ids"]
    document = np.array([0, *[i for i in line if i] * 200])
    for _, prompt in needle_prompts(tokenizer, [document], lengths=[700], depths=[40]):
        assert "lazy dog.\n\nThe secret number" in tokenizer.decode(prompt.tokens)


def test_needles_differ_by_seed_and_repeat_with_it(tokenizer):
    first, again = needle_prompts(tokenizer), needle_prompts(tokenizer)
    other = needle_prompts(tokenizer, seed=8)
    assert [p.sha256() for _, p in first] == [p.sha256() for _, p in again]
    assert len({p.expected for _, p in first}) == len(first) == len({s.key for s, _ in first})
    assert [p.expected for _, p in first] != [p.expected for _, p in other]


def test_needle_refuses_a_length_without_room(tokenizer):
    with pytest.raises(StageError, match=r"eval.niah.lengths: 30 tokens .* must be above \d+"):
        needle_prompts(tokenizer, lengths=[30])


def test_needle_refuses_documents_without_text(tokenizer):
    with pytest.raises(StageError, match=r"1 held-out documents without text.*data.held_out"):
        needle_prompts(tokenizer, [np.array([0])])


def test_needle_answers_are_graded(tokenizer):
    for _, prompt in needle_prompts(tokenizer, needles=[1, 2], lengths=[300]):
        first, last = prompt.expected[0], prompt.expected[-1]
        half = 100 / len(prompt.expected)
        for text, expected in (
            (f" {first} and {last}.", 100),
            (f" {int(first) - 1}.", 0),
            (f" {first}7", 0),
            (f" {first}, I think", half),
            ("", 0),
        ):
            assert niah.score("", prompt, text) == expected, (text, prompt.expected)


@pytest.mark.parametrize("pattern", ["sink", "strided", "per_head"])
def test_answers_of_a_batch_equal_greedy_generate(pattern):
    """Rows of different lengths together, left-padded and in chunks, as each would be alone."""
    model = hybrid(pattern)
    prompts = [np.concatenate([[0], d[1:]]) for d in held_out((40, 81, 64, 7))]
    answers = evaluated(model, chunk=24).answers(prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.from_numpy(prompt)[None]
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": 1}
        generated = model.generate(ids, max_new_tokens=6, pad_token_id=1, **options)
        expected = generated[0, ids.shape[1] :].tolist()
        assert answer == (expected[: expected.index(1)] if 1 in expected else expected)


def test_answers_stop_at_their_end():
    prompts = held_out((40, 81))
    full = evaluated(hybrid(), eos=()).answers(prompts, 5)
    cut = evaluated(hybrid(), eos=(full[0][2], full[1][0])).answers(prompts, 5)
    ends = {full[0][2], full[1][0]}
    assert cut[1] == [] and cut[0] == full[0][: next(i for i, t in enumerate(full[0]) if t in ends)]


def test_a_stock_model_answers_as_ours_with_its_weights():
    shape = tiny_config(vocab_size=VOCABULARY)
    stock = tiny_llama(shape)
    ours = LongGenForCausalLM(longgen_config(shape)).eval()
    ours.load_state_dict(stock.state_dict())
    prompts = held_out((40, 81, 7))
    plain = evaluated(stock, eos=(1,), ours=False)
    assert plain.answers(prompts, 5) == evaluated(ours).answers(prompts, 5)
    losses = plain.token_losses(prompts[1])
    assert_close_by_norm(evaluated(ours).token_losses(prompts[1]), losses, 1e-5)
    assert len(losses) == 80


def test_losses_of_a_stock_model_in_chunks(monkeypatch):
    stock, (document,) = tiny_llama(tiny_config(vocab_size=VOCABULARY)), held_out((61,))
    whole = evaluated(stock, ours=False).token_losses(document)
    monkeypatch.setattr("pipeline.evaluated_model.STOCK_CHUNK", 16)
    found = evaluated(stock, ours=False).token_losses(document)
    assert_close_by_norm(found, whole, 1e-5)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_kv_bytes_are_those_of_the_pattern(pattern):
    model = hybrid(pattern)
    section = perplexity_section(max_length=104)
    section.tasks = ["perplexity"]
    samples = kv_bytes.build(section, None)
    assert [len(s.tokens) for s in samples] == [13, 26, 52, 104]
    for sample in samples:
        (record,) = kv_bytes.measure(sample, evaluated(model), section)
        length = record["length"]
        live = [len(PATTERNS[pattern].live(length, head, 2)) for head in range(2)]
        token = 2 * 16 * 4
        assert record["full_bytes"] == 4 * 2 * length * token
        assert record["live_bytes"] == (2 * 2 * length + 2 * sum(live)) * token
        # The slot of the next token, and of keys in the window that outlast it.
        slots = Slots(PATTERNS[pattern], length, 2).count
        assert max(live) <= slots <= max(live) + 1 + PATTERNS[pattern].window
        assert record["allocated_bytes"] == (2 * 2 * length + 2 * 2 * slots) * token
    assert Pattern.full() not in PATTERNS.values()
    assert record["allocated_bytes"] < record["full_bytes"]


def test_kv_lengths_follow_the_tasks():
    section = EvalSection(tasks=["niah"], niah=NiahSection(lengths=[64, 800]))
    assert [s.key for s in kv_bytes.build(section, None)] == ["100", "200", "400", "800"]

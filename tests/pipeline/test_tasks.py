import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kernels.pattern import Pattern
from model.modeling_longgen import LongGenForCausalLM
from pipeline.manifest import StageError
from pipeline.schema import EvalSection, NiahSection, PerplexitySection
from pipeline.stages.export import longgen_config
from pipeline.tasks import kv_bytes, niah, perplexity
from tests.data_prep.helpers import save_model_folder
from tests.pipeline.evaluation_helpers import VOCABULARY, held_out, one_thread  # noqa: F401
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


class Scripted:
    """A tokenizer's decode and a model that, asked for a sample, answers with a given text."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, text):
        self.ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.ids.append(tokenizer.eos_token_id)

    def _logits(self):
        logits = torch.zeros(1, 1, VOCABULARY)
        logits[..., self.ids[self.said]] = 1
        self.said += 1
        return logits

    def prefill(self, ids, chunk):
        self.said = 0
        return None, self._logits()[:, -1]

    def __call__(self, ids, past_key_values, use_cache):
        assert ids.tolist() == [[self.ids[self.said - 1]]]
        return type("Output", (), {"logits": self._logits()})


def test_perplexity_picks_long_documents_and_cuts_them():
    documents = held_out((40, 80, 49, 300, 50, 51))
    samples = perplexity.build(perplexity_section(documents=3), None, documents)
    assert [s.document for s in samples] == [1, 3, 4]
    assert [len(s.tokens) for s in samples] == [60, 60, 50]
    assert all((s.tokens == documents[s.document][: len(s.tokens)]).all() for s in samples)
    spread = perplexity.build(perplexity_section(documents=2), None, documents)
    assert [s.document for s in spread] == [1, 4]


def test_perplexity_refuses_too_short_documents():
    with pytest.raises(StageError, match=r"min_length=50: the longest of 2 .* has 40 .*held_out"):
        perplexity.build(perplexity_section(), None, held_out((40, 30)))


@pytest.mark.parametrize("pattern", ["sink", "per_head"])
def test_perplexity_sums_equal_one_forward(pattern):
    model = hybrid(pattern)
    section = perplexity_section(max_length=57)
    sample = perplexity.build(section, None, held_out())[0]
    ids = torch.from_numpy(sample.tokens)[None]
    with torch.no_grad():
        logp = model(ids).logits[0].double().log_softmax(-1)
    records = perplexity.score(sample, model, None, section)
    assert [(r["start"], r["stop"]) for r in records] == [(0, 16), (16, 32), (32, 48), (48, 57)]
    # position 0 is <bos>, which nothing predicts
    assert [r["tokens"] for r in records] == [15, 16, 16, 9]
    for record in records:
        positions = range(max(1, record["start"]), record["stop"])
        expected = -sum(logp[p - 1, ids[0, p]].item() for p in positions)
        assert record["nll"] == pytest.approx(expected, rel=1e-5)
    assert len({round(r["nll"] / r["tokens"], 3) for r in records}) > 1


def test_perplexity_of_the_base_equals_transformers():
    shape = tiny_config(vocab_size=VOCABULARY)
    stock = tiny_llama(shape)
    ours = LongGenForCausalLM(longgen_config(shape)).eval()
    ours.load_state_dict(stock.state_dict())
    section = perplexity_section(bucket=1000)
    sample = perplexity.build(section, None, held_out())[0]
    ids = torch.from_numpy(sample.tokens)[None]
    with torch.no_grad():
        expected = stock(ids, labels=ids).loss.item()
    (record,) = perplexity.score(sample, ours, None, section)
    assert record["nll"] / record["tokens"] == pytest.approx(expected, rel=1e-5)


def test_bucket_of_one_token_has_no_record_for_bos():
    section = perplexity_section(bucket=1, documents=1)
    sample = perplexity.build(section, None, held_out())[0]
    records = perplexity.score(sample, hybrid(), None, section)
    assert [r["start"] for r in records] == list(range(1, len(sample.tokens)))


@pytest.mark.parametrize("length", [130, 150, 1000])
def test_needle_prompts_have_exactly_the_length(tokenizer, length):
    documents = held_out()
    samples = niah.build(niah_section(lengths=[length]), tokenizer, documents)
    assert len(samples) == 6
    for sample in samples:
        assert len(sample.tokens) == length
        assert sample.tokens[0] == 0 and (sample.tokens[1:] != 0).all()
        text = tokenizer.decode(sample.tokens)
        assert text.count(f"is {sample.expected}.") == 1
        assert text.endswith(" is")


def test_needle_lies_at_its_depth(tokenizer):
    documents = held_out((5000,))
    section = niah_section(lengths=[2000], depths=[0, 30, 100], samples=1)
    for sample in niah.build(section, tokenizer, documents):
        needle = tokenizer("number of the", add_special_tokens=False)["input_ids"]
        windows = np.lib.stride_tricks.sliding_window_view(sample.tokens, len(needle))
        at = (windows == needle).all(1).nonzero()[0][0]
        # at most 5% before its depth, so that it may stand after a line
        assert sample.depth / 100 - 0.06 < at / 2000 < sample.depth / 100 + 0.01


def test_needle_stands_after_a_line(tokenizer):
    line = tokenizer("The quick brown fox jumps over the lazy dog.\n")["input_ids"]
    document = np.array([0, *[i for i in line if i] * 200])
    for sample in niah.build(niah_section(lengths=[700], depths=[40]), tokenizer, [document]):
        assert "lazy dog.\n\nThe secret number" in tokenizer.decode(sample.tokens)


def test_needles_differ_by_seed_and_repeat_with_it(tokenizer):
    documents = held_out()
    first = niah.build(niah_section(), tokenizer, documents)
    again = niah.build(niah_section(), tokenizer, documents)
    other = niah.build(niah_section(seed=8), tokenizer, documents)
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    assert len({s.expected for s in first}) == len(first) == len({s.key for s in first})
    assert [s.expected for s in first] != [s.expected for s in other]


def test_needle_refuses_a_length_without_room(tokenizer):
    with pytest.raises(StageError, match=r"eval.niah.lengths: 30 tokens .* must be above \d+"):
        niah.build(niah_section(lengths=[30]), tokenizer, held_out())


def test_needle_refuses_documents_without_text(tokenizer):
    with pytest.raises(StageError, match=r"1 held-out documents without text.*data.held_out"):
        niah.build(niah_section(), tokenizer, [np.array([0])])


def test_scripted_answers_are_graded(tokenizer):
    section = niah_section()
    for sample in niah.build(section, tokenizer, held_out()):
        wrong = str(int(sample.expected) - 1)
        for text, expected in (
            (f" {sample.expected}.", 100),
            (f" {wrong}.", 0),
            (f" {sample.expected}7", 0),
            ("", 0),
        ):
            model = Scripted(tokenizer, text)
            (record,) = niah.score(sample, model, tokenizer, section)
            assert record["score"] == expected, record
            assert record["answer"] == text
            assert len(record["prompt_sha256"]) == 64


def test_answer_equals_greedy_generate(tokenizer):
    model, section = hybrid("strided"), niah_section(samples=1)
    for sample in niah.build(section, tokenizer, held_out()):
        ids = torch.from_numpy(sample.tokens)[None]
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sample.answer_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
        )
        expected = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        (record,) = niah.score(sample, model, tokenizer, section)
        assert record["answer"] == expected


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_kv_bytes_are_those_of_the_pattern(pattern):
    model = hybrid(pattern)
    section = perplexity_section(max_length=104)
    section.tasks = ["perplexity"]
    samples = kv_bytes.build(section, None, [])
    assert [len(s.tokens) for s in samples] == [13, 26, 52, 104]
    for sample in samples:
        (record,) = kv_bytes.score(sample, model, None, section)
        length = record["length"]
        live = [len(PATTERNS[pattern].live(length, head, 2)) for head in range(2)]
        token = 2 * 16 * 4
        assert record["full_bytes"] == 4 * 2 * length * token
        assert record["live_bytes"] == (2 * 2 * length + 2 * sum(live)) * token
        assert record["allocated_bytes"] == (2 * 2 * length + 2 * 2 * max(live)) * token
    assert Pattern.full() not in PATTERNS.values()
    assert record["allocated_bytes"] < record["full_bytes"]


def test_kv_lengths_follow_the_tasks():
    section = EvalSection(tasks=["niah"], niah=NiahSection(lengths=[64, 800]))
    assert [s.key for s in kv_bytes.build(section, None, [])] == ["100", "200", "400", "800"]

import json

import numpy as np
import pytest
import torch

from model.engine_weights import Shard
from model.modeling_longgen import LongGenForCausalLM
from pipeline.evaluated_model import EvaluatedModel
from pipeline.hf_folder import longgen_config
from pipeline.manifest import StageError
from pipeline.schema_of_eval import EvalSection, ShortSection
from pipeline.stages import evaluate
from pipeline.tasks import short
from pipeline.tasks.material import Material
from tests.closeness import assert_close_by_norm
from tests.pipeline.evaluation_helpers import context, held_out, small_config
from tests.pipeline.task_material import material
from tests.tiny import tiny_config, tiny_llama

VOCABULARY = 512
ROWS = [
    {"query": "The quick brown", "choices": ["fox", "lazy dog"], "gold": 0},
    {"query": "Llamas eat", "choices": ["grass and hay", "12", "the mountains"], "gold": 2},
    {"query": "def f", "choices": ["(x)", "x"], "gold": 1},
]


def both_models():
    """A stock Llama and ours with its weights."""
    shape = tiny_config(vocab_size=VOCABULARY)
    stock = tiny_llama(shape)
    ours = LongGenForCausalLM(longgen_config(shape)).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def evaluated(model, ours=True):
    return EvaluatedModel(model, frozenset({1}), ours, 64, {"context": 4096})


def write_rows(folder):
    folder.mkdir(parents=True)
    (folder / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task_prefix": "Choose. ",
        "append_choices_to_input": False,
        "examples": [
            {"input": "One?", "target_scores": {"yes": 0, "no": 1}},
            {"input": "Two right?", "target_scores": {"yes": 1, "no": 1}},
        ],
    }
    (folder / "deep" / "riddles").mkdir(parents=True)
    (folder / "deep" / "riddles" / "task.json").write_text(json.dumps(task))
    return EvalSection(short=ShortSection(["animals", "riddles"], str(folder)))


def test_files_are_read(tmp_path):
    section = write_rows(tmp_path / "tasks")
    folder = tmp_path / "tasks"
    assert short.read_rows(folder / "animals.jsonl") == ROWS
    (row,) = short.read_rows(folder / "deep/riddles/task.json")
    assert row == {"query": "Choose. \nQ: One?\nA:", "choices": ["yes", "no"], "gold": 1}
    task = json.loads((folder / "deep/riddles/task.json").read_text())
    del task["append_choices_to_input"]
    (folder / "listed.json").write_text(json.dumps(task))
    (row,) = short.read_rows(folder / "listed.json")
    assert row["query"] == "Choose. \nQ: One?\n  choice: yes\n  choice: no\nA:"
    assert section.short.tasks == ["animals", "riddles"]


@pytest.mark.parametrize(
    "text", ['{"query": "a"}', '{"query": "a", "choices": ["b"], "gold": 1}', "", "[1"]
)
def test_other_files_are_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr(short, "missing", lambda: None)
    (tmp_path / "odd.jsonl").write_text(text)
    section = EvalSection(short=ShortSection(["odd"], str(tmp_path)))
    with pytest.raises(
        StageError, match=r"odd.jsonl: is no task of one right choice.*leave it out"
    ):
        short.build(section, Material(None, []))
    section.short.folder = str(tmp_path / "none")
    with pytest.raises(StageError, match=r"eval.short.folder=.*none': is no folder"):
        short.build(section, Material(None, []))


def test_without_lm_eval_the_reason_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert short.missing() == "lm-eval is not installed; pip install lm-eval==0.4.13"
    assert short.build(EvalSection(short=ShortSection(["arc_easy"])), Material(None, [])) == []
    monkeypatch.setattr(evaluate, "Evaluation", lambda context: Nothing())
    config = small_config()
    config.eval.tasks = ["short"]
    counts = evaluate.run(context(tmp_path, config, "evaluate"))
    assert counts["skipped"] == {"short": short.missing()}
    assert "short is skipped: lm-eval is not installed" in caplog.text


class Nothing:
    shard = Shard()

    def samples(self, name):
        return []

    def run(self, name, journal):
        pass


@pytest.mark.parametrize("ours", [True, False])
def test_last_logits_are_those_of_each_row_alone(ours):
    stock, model = both_models()
    rows, counts = [d[:n] for d, n in zip(held_out(), (40, 3, 17), strict=False)], [5, 1, 17]
    found = evaluated(model if ours else stock, ours).last_logits(rows, counts)
    for row, count, logits in zip(rows, counts, found, strict=True):
        with torch.no_grad():
            expected = stock(torch.from_numpy(np.asarray(row))[None]).logits[0, -count:]
        assert_close_by_norm(logits, expected, 1e-5)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="optional: pip install lm-eval==0.4.13")
    return material(tmp_path_factory.mktemp("short"))


def requests(given, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, 0) for pair in arguments]


PAIRS = [
    *(("The quick brown", " fox"), ("", "Llamas")),
    *(("Llamas live ", "in the mountains"), ("a", "b")),
]


@pytest.mark.parametrize("ours", [True, False])
def test_log_likelihoods_equal_lm_evals_own_model(given, ours):
    """And the same words are the greedy ones, of pairs and of whole texts."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval.models.huggingface import HFLM

    from pipeline.tasks.lm_eval_adapter import EvaluatedLM

    stock, model = both_models()
    theirs = HFLM(pretrained=stock, tokenizer=given.tokenizer, batch_size=2, max_length=64)
    mine = EvaluatedLM(evaluated(model if ours else stock, ours), given.tokenizer, 40)
    mine.max_length = 64
    expected = theirs.loglikelihood(requests(given, *PAIRS), disable_tqdm=True)
    found = mine.loglikelihood(requests(given, *PAIRS), disable_tqdm=True)
    for (total, greedy), (own, also) in zip(expected, found, strict=True):
        assert_close_by_norm(own, total, 1e-5)
        assert greedy == also
    texts = [("The quick brown fox jumps over the lazy dog. " * 12,), ("Llamas",)]
    expected = theirs.loglikelihood_rolling(requests(given, *texts), disable_tqdm=True)
    assert_close_by_norm(mine.loglikelihood_rolling(requests(given, *texts)), expected, 1e-5)
    options = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    asked = [("The quick", options), ("Llamas live in the mountains", {"until": [], **options})]
    expected = theirs.generate_until(requests(given, *asked), disable_tqdm=True)
    assert mine.generate_until(requests(given, *asked)) == expected


def test_a_task_of_a_file_is_run(given, tmp_path, monkeypatch):
    """Its score is that of the greatest log-likelihood, counted here by hand."""
    section = write_rows(tmp_path / "tasks")
    _, model = both_models()
    samples = short.build(section, given)
    records = short.measure(samples[0], evaluated(model), section)
    from pipeline.tasks.lm_eval_adapter import EvaluatedLM

    adapter = EvaluatedLM(evaluated(model), given.tokenizer, 999)
    for record, row in zip(records, ROWS, strict=True):
        pairs = [(row["query"], " " + choice) for choice in row["choices"]]
        totals = [total for total, _ in adapter.loglikelihood(requests(given, *pairs), True)]
        right = totals.index(max(totals)) == row["gold"]
        assert record["score"] == 100.0 * right and record["metric"] == "acc"
        assert record["subtask"] == "animals" and len(record["prompt_sha256"]) == 64
    assert len(short.measure(samples[1], evaluated(model), section)) == 1
    quick = short._task_manager(False)
    monkeypatch.setattr(short, "_task_manager", lambda own: quick)
    section.short.tasks = ["no_such_task_of_lm_eval"]
    (unknown,) = short.build(section, given)
    with pytest.raises(StageError, match="no_such_task_of_lm_eval: lm-eval could not run it"):
        short.measure(unknown, evaluated(model), section)

import json

import pytest
import torch

from pipeline.manifest import StageError
from pipeline.records import Journal, read_records
from pipeline.stages import evaluate, generate
from tests.pipeline.evaluation_helpers import (
    context,
    held_out,
    one_thread,  # noqa: F401
    small_config,
    write_held_out,
    write_inputs,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The inputs, and the records of one undisturbed run."""
    root = tmp_path_factory.mktemp("run")
    write_inputs(root)
    counts = evaluate.run(context(root, small_config(), "evaluate"))
    return root, counts, (root / "evaluate.partial" / "records.jsonl").read_text()


def rerun(finished, tmp_path, monkeypatch, text, config=None):
    """Run again over `text`; counts, records and the (model, task) of each sample scored."""
    root, _, _ = finished
    scored = []
    for name, task in evaluate.TASKS.items():
        original = task.score

        def score(sample, model, *rest, name=name, original=original):
            scored.append((type(model).__module__.split(".")[0], name))
            return original(sample, model, *rest)

        monkeypatch.setattr(task, "score", score)
    for folder in ("fetch", "data_prep", "export"):
        (tmp_path / folder).symlink_to(root / folder)
    run = context(tmp_path, config or small_config(), "evaluate")
    if text is not None:
        (run.out / "records.jsonl").write_text(text)
    counts = evaluate.run(run)
    return counts, read_records(run.out / "records.jsonl"), scored


def by_sample(records):
    return sorted(records, key=lambda r: (r["model"], r["task"], r["key"], r.get("start", 0)))


def test_every_model_and_task_is_recorded(finished):
    _, counts, text = finished
    records = [json.loads(line) for line in text.splitlines()]
    assert counts["records"] == {
        "base perplexity": 8,
        "base niah": 4,
        "final perplexity": 8,
        "final niah": 4,
        "final kv_bytes": 4,
    }
    fields = {
        "perplexity": {"document", "length", "start", "stop", "nll", "tokens"},
        "niah": {"length", "depth", "sample", "prompt_sha256", "expected", "answer", "score"},
        "kv_bytes": {"length", "live_bytes", "allocated_bytes", "full_bytes"},
    }
    for record in records:
        assert record.keys() == {"task", "model", "key", "parts"} | fields[record["task"]]
    prompts = {
        model: [r["prompt_sha256"] for r in records if r["task"] == "niah" and r["model"] == model]
        for model in ("base", "final")
    }
    assert prompts["base"] == prompts["final"]
    losses = {
        model: [r["nll"] for r in records if r["task"] == "perplexity" and r["model"] == model]
        for model in ("base", "final")
    }
    assert losses["base"] != losses["final"]


def test_a_killed_run_goes_on(finished, tmp_path, monkeypatch):
    """Cut within the second document's records and within a line: only what misses is scored."""
    _, _, text = finished
    lines = text.splitlines(keepends=True)
    cut = "".join(lines[:6]) + lines[6][: len(lines[6]) // 2]
    counts, records, scored = rerun(finished, tmp_path, monkeypatch, cut)
    assert by_sample(records) == by_sample([json.loads(line) for line in lines])
    assert [task for _, task in scored].count("perplexity") == 3
    assert counts == finished[1]


def test_a_finished_run_scores_nothing_and_loads_no_model(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("loaded a model"))
    _, records, scored = rerun(finished, tmp_path, monkeypatch, finished[2])
    assert scored == []
    assert len(records) == 28


def test_only_the_chosen_tasks_and_models_run(finished, tmp_path, monkeypatch):
    config = small_config()
    config.eval.tasks, config.eval.models = ["perplexity"], ["base"]
    counts, records, _ = rerun(finished, tmp_path, monkeypatch, None, config)
    assert counts["records"] == {"base perplexity": 8}
    expected = [json.loads(line) for line in finished[2].splitlines()]
    assert records == [r for r in expected if r["task"] == "perplexity" and r["model"] == "base"]


def test_fewer_documents_than_wanted_are_told(finished, tmp_path, monkeypatch, caplog):
    config = small_config()
    config.eval.perplexity.documents = 9
    config.eval.tasks, config.eval.models = ["perplexity"], ["base"]
    rerun(finished, tmp_path, monkeypatch, None, config)
    assert "only 4 of 9 documents" in caplog.text


def test_too_short_documents_stop_before_a_model_is_loaded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("loaded a model"))
    (tmp_path / "fetch").symlink_to(finished[0] / "fetch")
    write_held_out(tmp_path / "data_prep", held_out((10, 20)))
    with pytest.raises(StageError, match="eval.perplexity.min_length=50"):
        evaluate.run(context(tmp_path, small_config(), "evaluate"))


def test_the_eval_section_decides_the_records():
    one, other = small_config(), small_config()
    other.device = "cuda"
    assert evaluate.depends_on(one) == evaluate.depends_on(other)
    other.eval.niah.seed = 2
    assert evaluate.depends_on(one) != evaluate.depends_on(other)


def test_journal_drops_partial_samples(tmp_path):
    path = tmp_path / "records.jsonl"
    journal = Journal(path)
    journal.append("base", "niah", "a", [{"score": 1}])
    journal.append("base", "niah", "b", [{"score": 2}, {"score": 3}])
    whole = path.read_text()
    path.write_text(whole[:-4])
    again = Journal(path)
    assert again.done == {("base", "niah", "a")}
    again.append("base", "niah", "b", [{"score": 2}, {"score": 3}])
    assert path.read_text() == whole


def test_a_broken_line_of_a_finished_file_is_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"a": 2\n')
    with pytest.raises(StageError, match=r"records.jsonl:2: .*force=true"):
        read_records(path)


def test_generate_streams_and_records(finished, tmp_path, capsys):
    root, _, _ = finished
    config = small_config()
    config.generate.prompt, config.generate.max_new_tokens = "The quick brown fox", 7
    run = context(tmp_path, config, "generate")
    object.__setattr__(run, "folder", lambda name: root / name)
    counts = generate.run(run)
    record = json.loads((run.out / "generate.json").read_text())
    assert 1 <= record["new_tokens"] <= 7
    assert counts["new_tokens"] == record["new_tokens"]
    assert capsys.readouterr().out.startswith("The quick brown fox" + record["text"])
    model = evaluate.load_model("final", run)
    tokenizer = generate.AutoTokenizer.from_pretrained(root / "fetch" / "model")
    ids = [tokenizer.bos_token_id, *tokenizer("The quick brown fox")["input_ids"]]
    assert record["prompt_tokens"] == len(ids)
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].argmax()
    assert record["text"].startswith(tokenizer.decode([first], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt", "", r"generate.prompt='': .*set generate.prompt="),
        ("model", "best", r"generate.model='best': must be one of final, base"),
        ("max_new_tokens", 0, r"generate.max_new_tokens=0: must be at least 1"),
    ],
)
def test_generate_refuses(tmp_path, key, value, message):
    config = small_config()
    config.generate.prompt = "Once"
    setattr(config.generate, key, value)
    with pytest.raises(StageError, match=message):
        generate.run(context(tmp_path, config, "generate"))

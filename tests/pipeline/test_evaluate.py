import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.tokenizer_folder import open_tokenizer
from model.weights import WeightsError
from pipeline.evaluated_model import EvaluatedModel, load_model, reduced
from pipeline.hf_folder import longgen_config
from pipeline.manifest import StageError
from pipeline.records import Journal, of_task, read_records
from pipeline.runner import Team, refuse_processes
from pipeline.schema import PatternSection
from pipeline.schema_of_eval import RulerSection
from pipeline.stages import evaluate, generate
from pipeline.tasks.perplexity import DocumentSample
from pipeline.tasks.sample import Sample
from tests.closeness import assert_close_by_norm
from tests.data_prep.helpers import save_model_folder
from tests.pipeline.evaluation_helpers import (
    context,
    held_out,
    small_config,
    write_held_out,
    write_inputs,
)
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The inputs, and the records of one undisturbed run."""
    root = tmp_path_factory.mktemp("run")
    write_inputs(root)
    counts = evaluate.run(context(root, small_config(), "evaluate"))
    return root, counts, (root / "evaluate.partial" / "records.jsonl").read_text()


def rerun(finished, tmp_path, monkeypatch, text, config=None, **where):
    """Run again over `text`; counts, records and the (model, task) of each sample scored."""
    root, _, _ = finished
    scored = []
    append = Journal.append

    def counted(self, model, task, key, records):
        scored.append((model, task))
        append(self, model, task, key, records)

    monkeypatch.setattr(Journal, "append", counted)
    for folder in ("fetch", "data_prep", "export"):
        if not (tmp_path / folder).exists():
            (tmp_path / folder).symlink_to(root / folder)
    run = replace(context(tmp_path, config or small_config(), "evaluate"), **where)
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
        "niah": {
            *("subtask", "seed", "length", "depth", "template", "prompt_tokens", "prompt_sha256"),
            *("sample", "needles", "distance", "expected", "answer", "score", "beyond_context"),
        },
        "kv_bytes": {"length", "live_bytes", "allocated_bytes", "full_bytes"},
    }
    every = {"task", "model", "key", "parts", "manifest"}
    for record in records:
        assert record.keys() == every | fields[record["task"]]
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
    monkeypatch.setattr(evaluate, "open_model", lambda *_: pytest.fail("loaded a model"))
    _, records, scored = rerun(finished, tmp_path, monkeypatch, finished[2])
    assert scored == []
    assert len(records) == 28


def test_only_the_chosen_tasks_and_models_run(finished, tmp_path, monkeypatch):
    config = small_config()
    config.eval.tasks, config.eval.models = ["perplexity"], ["base"]
    counts, records, _ = rerun(finished, tmp_path, monkeypatch, None, config)
    assert counts == {"records": {"base perplexity": 8}, "scores": {}, "skipped": {}}
    expected = [json.loads(line) for line in finished[2].splitlines()]
    assert records == [r for r in expected if r["task"] == "perplexity" and r["model"] == "base"]


def test_a_machine_evaluates_on_the_gpus_that_it_has(monkeypatch):
    config = small_config()
    config.parallel.nodes, config.parallel.gpus_per_node = 8, 8
    assert evaluate.processes(config) == 8
    config.device = "cuda"
    for found, expected in ((1, 1), (4, 4), (16, 8)):
        monkeypatch.setattr("torch.cuda.device_count", lambda found=found: found)
        assert evaluate.processes(config) == expected
        refuse_processes(config, ("evaluate",), Team())


def test_fewer_documents_than_wanted_are_told(finished, tmp_path, monkeypatch, caplog):
    config = small_config()
    config.eval.perplexity.documents = 9
    config.eval.tasks, config.eval.models = ["perplexity"], ["base"]
    rerun(finished, tmp_path, monkeypatch, None, config)
    assert "only 4 of 9 documents" in caplog.text


def test_too_short_documents_stop_before_a_model_is_loaded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_model", lambda *_: pytest.fail("loaded a model"))
    (tmp_path / "fetch").symlink_to(finished[0] / "fetch")
    write_held_out(tmp_path / "data_prep", held_out((10, 20)))
    with pytest.raises(StageError, match="eval.perplexity.min_length=50"):
        evaluate.run(context(tmp_path, small_config(), "evaluate"))


def test_what_decides_the_records_is_what_the_stage_depends_on():
    one, other = small_config(), small_config()
    other.device, other.eval.batch_tokens, other.eval.ruler.seed = "cuda", 7, 8
    assert evaluate.depends_on(one) == evaluate.depends_on(other)
    other.eval.niah.seed = 2
    assert evaluate.depends_on(one) != evaluate.depends_on(other)
    assert evaluate.inputs(one) == ("fetch", "data_prep", "export")
    one.eval.models = ["base", "base_reduced"]
    one.eval.tasks.append("ruler")
    one.eval.ruler.data = "pypi:questions==1"
    assert evaluate.inputs(one) == ("fetch", "fetch_tasks", "data_prep")


def test_processes_share_the_samples(finished, tmp_path, monkeypatch):
    """Each of two takes its own; the first gathers what the second, and one long gone, wrote."""
    whole = [json.loads(line) for line in finished[2].splitlines()]
    counts, _, second = rerun(finished, tmp_path, monkeypatch, None, rank=1, size=2)
    assert counts == {}
    out = tmp_path / "evaluate.partial"
    assert len(read_records(out / "records.1.jsonl")) < len(whole)
    (out / "records.7.jsonl").write_text(finished[2][: len(finished[2]) // 3])
    counts, records, first = rerun(finished, tmp_path, monkeypatch, None, rank=0, size=2)
    assert counts == finished[1] and by_sample(records) == by_sample(whole)
    assert 0 < len(first) < 16 and 0 < len(second) < 16
    assert not list(out.glob("records.*.jsonl"))


def test_parts_are_gathered(finished, tmp_path, monkeypatch):
    """Two parts in folders of their own; the whole takes them over and does nothing again."""
    whole = [json.loads(line) for line in finished[2].splitlines()]
    for part in ("1/2", "2/2"):
        config = small_config()
        config.eval.shard = part
        _, records, scored = rerun(finished, tmp_path, monkeypatch, None, config)
        assert 0 < len(scored) < 16 and len(records) < len(whole)
        folder = tmp_path / evaluate.folder_name(config)
        (tmp_path / "evaluate.partial").rename(folder)
        manifest = {"config": evaluate.depends_on(config), "id": part}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    # another evaluation's part does not count
    other = tmp_path / "evaluate_1of9"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps({"config": {"eval": {"tasks": []}}}))
    monkeypatch.setattr(evaluate, "open_model", lambda *_: pytest.fail("loaded a model"))
    counts, records, scored = rerun(finished, tmp_path, monkeypatch, None)
    assert scored == [] and counts == finished[1] and by_sample(records) == by_sample(whole)
    assert len(list((tmp_path / "evaluate.partial").glob("model_*.json"))) == 2


def test_models_without_full_layers(finished, tmp_path, monkeypatch):
    """The same weights at sink tokens and window: another answer, said in the model's file."""
    config = small_config()
    config.eval.tasks, config.eval.models = ["perplexity"], ["final", "reduced", "base_reduced"]
    config.pattern = PatternSection(sink_tokens=4, window=16, block=8, stride=3)
    _, records, _ = rerun(finished, tmp_path, monkeypatch, None, config)
    losses = {m: [r["nll"] for r in rows] for m, rows in of_task(records, "perplexity").items()}
    # The window holds the first 16 tokens, and no model is another.
    assert_close_by_norm(losses["final"][0], losses["reduced"][0], 1e-5)
    assert losses["final"][1:] != losses["reduced"][1:] != losses["base_reduced"][1:]
    files = (tmp_path / "evaluate.partial").glob("model_*.json")
    described = {d["name"]: d for d in (json.loads(path.read_text()) for path in files)}
    assert described["final"]["schedule"] == "S1 F2 S1"
    for name in ("reduced", "base_reduced"):
        assert described[name]["schedule"] == "S4"
        assert described[name]["pattern"]["stride"] is None
        assert described[name]["pattern"]["window"] == 16


def test_layers_of_different_rope_are_not_reduced(finished):
    config = longgen_config(tiny_config(is_full=(False, True, True, False)))
    config.sparse_rope = {"rope_type": "default", "rope_theta": 5.0}
    with pytest.raises(StageError, match=r"reduced: layers have different RoPE.*leave reduced out"):
        reduced(config, config.layer_patterns()[0])


def test_a_folder_that_is_not_ours(finished, tmp_path, monkeypatch, caplog):
    """A stock Llama is asked as transformers runs it, and said to be so."""
    folder = tmp_path / "stock"
    config = small_config()
    config.eval.models, config.eval.folders = ["base", "stock"], {"stock": str(folder)}
    folder.symlink_to(finished[0] / "fetch" / "model")
    counts, records, _ = rerun(finished, tmp_path, monkeypatch, None, config)
    assert "stock: " in caplog.text and "no LongGen export: evaluated as a plain" in caplog.text
    assert counts["records"]["stock niah"] == 4 and "stock kv_bytes" not in counts["records"]
    by_model = {
        model: [
            (r["key"], r["answer"])
            for r in by_sample(records)
            if r["model"] == model and r["task"] == "niah"
        ]
        for model in ("base", "stock")
    }
    # The same weights: through transformers' generate as through our own class.
    assert by_model["base"] == by_model["stock"]


def test_folders_without_a_model_are_said(finished, tmp_path, monkeypatch):
    config = small_config()
    config.eval.models, config.eval.folders = ["other"], {"other": str(tmp_path / "other")}
    with pytest.raises(StageError, match=r"eval.folders.other=.*holds no tokenizer"):
        rerun(finished, tmp_path, monkeypatch, None, config)
    save_model_folder(tmp_path / "other")
    with pytest.raises(StageError, match=r"eval.folders.other=.*no model that transformers can"):
        rerun(finished, tmp_path, monkeypatch, None, config)


def test_lengths_beyond_the_context_are_marked(finished, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(EvaluatedModel, "context", 160)
    config = small_config()
    config.eval.tasks, config.eval.models = ["niah"], ["base"]
    _, records, _ = rerun(finished, tmp_path, monkeypatch, None, config)
    assert "base: 170 tokens are beyond the 160" in caplog.text
    assert {r["length"]: r["beyond_context"] for r in records} == {150: False, 170: True}


def test_a_prompt_that_cannot_be_is_said_before_a_model_is_loaded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_model", lambda *_: pytest.fail("loaded a model"))
    config = small_config()
    config.eval.tasks = ["ruler"]
    config.eval.ruler = RulerSection(["vt"], [9000, 300], 1)
    with pytest.raises(StageError, match="ruler vt at 300 tokens"):
        rerun(finished, tmp_path, monkeypatch, None, config)
    config.eval.prose = str(tmp_path / "none")
    with pytest.raises(StageError, match=r"eval.prose=.*none': is no folder"):
        rerun(finished, tmp_path, monkeypatch, None, config)


def test_batches_hold_neighbours_up_to_their_tokens():
    def sample(length, answer=5):
        return Sample(f"{length}", "s", length, 1, answer, None)

    asked = [("niah", sample(n)) for n in (100, 100, 90, 40, 30, 10)]
    found = evaluate.batches([*asked, ("niah", sample(10, 6)), ("ruler", sample(10, 6))], 250)
    sizes = [[s.length for s in batch.samples] for batch in found]
    assert sizes == [[100, 100], [90], [40, 30], [10], [10], [10]]
    documents = [("perplexity", DocumentSample("a", 0, np.zeros(3)))] * 2
    assert [b.tokens for b in evaluate.batches(documents, 250)] == [3, 3]


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
    assert capsys.readouterr().out == record["text"] + "\n"
    model = load_model("final", run)
    tokenizer = open_tokenizer(root / "fetch" / "model")
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


@pytest.fixture
def asked(finished, tmp_path):
    """A maker of what stage=generate answers: (counts, record) of these keys."""
    root, _, _ = finished

    def ask(**keys):
        config = small_config()
        config.generate.prompt, config.generate.max_new_tokens = "The quick brown fox", 5
        for key, value in keys.items():
            setattr(config.generate, key, value)
        run = context(tmp_path, config, "generate")
        object.__setattr__(run, "folder", lambda name: root / name)
        counts = generate.run(run)
        return counts, json.loads((run.out / "generate.json").read_text())

    return ask


def standard_input(raw):
    return io.TextIOWrapper(io.BytesIO(raw), "utf-8", "surrogateescape")


def test_a_prompt_from_a_file_and_from_standard_input(asked, tmp_path, monkeypatch):
    _, wanted = asked(prefill_chunk=3)
    path = tmp_path / "prompt.txt"
    path.write_text("The quick brown fox")
    assert asked(prompt="", prompt_file=str(path))[1]["text"] == wanted["text"]
    monkeypatch.setattr("sys.stdin", standard_input(b"\xef\xbb\xbfThe quick brown fox"))
    assert asked(prompt="-")[1]["text"] == wanted["text"]
    drawn = [asked(temperature=5.0, seed=seed)[1]["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompts_that_generate_refuses(asked, tmp_path, monkeypatch):
    with pytest.raises(StageError, match="generate.prompt and generate.prompt_file='x': only one"):
        asked(prompt_file="x")
    with pytest.raises(StageError, match="nowhere.txt': No such file or directory; name a"):
        asked(prompt="", prompt_file=str(tmp_path / "nowhere.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(StageError, match="binary': is not UTF-8 text"):
        asked(prompt="", prompt_file=str(tmp_path / "binary"))
    # as Python opens it where the locale is C: other bytes become half surrogate pairs
    monkeypatch.setattr("sys.stdin", standard_input(b"Un caf\xe9"))
    with pytest.raises(StageError, match=r"standard input: is not UTF-8 text .*0xe9.*iconv"):
        asked(prompt="-")
    with pytest.raises(StageError, match=r"generate.prompt=.caf.udce9.: is not UTF-8.*iconv"):
        asked(prompt="caf\udce9")
    monkeypatch.setattr("sys.stdin", standard_input(b""))
    with pytest.raises(StageError, match="standard input: there is nothing to continue"):
        asked(prompt="-")
    with pytest.raises(StageError, match="generate.temperature=-1: must be 0"):
        asked(temperature=-1)
    with pytest.raises(StageError, match="generate.prefill_chunk=0: must be at least 1"):
        asked(prefill_chunk=0)
    with pytest.raises(StageError, match="of at most .*, or set generate.strict=false to go on"):
        asked(max_new_tokens=100_000, strict=True)


def test_a_broken_export_is_refused(finished, asked, monkeypatch):
    root, _, _ = finished
    (path,) = (root / "export").glob("*.safetensors")
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-50])
        with pytest.raises(WeightsError, match="truncated or unreadable"):
            asked()
        path.unlink()
        with pytest.raises(WeightsError, match="no .*safetensors|which the folder lacks"):
            asked()
    finally:
        path.write_bytes(whole)
    monkeypatch.setattr("model.engine.free_bytes", lambda device: 5)
    with pytest.raises(StageError, match="Not even one token fits"):
        asked()

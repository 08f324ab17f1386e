import base64
import json
import math
import random
import re
import shutil
import statistics
import subprocess
from html import escape

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from kernels.pattern import Pattern
from pipeline import figures
from pipeline.report_page import Pictures
from pipeline.report_summary import summarise
from pipeline.score_sections import short_section
from pipeline.speed_sections import speed_sections
from pipeline.stages import report
from tests.pipeline.evaluation_helpers import (
    context,
    exported_config,
    small_config,
    write_manifests,
)

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# Measures the page inside a frame of a chosen width, and says so in an element of the page around
# it that --dump-dom prints; and once on the console, so that silence there is heard.
PROBE = """
<script>addEventListener("load", () => {
  const images = [...document.images], found = parent.document.createElement("output");
  const shown = images.filter((image) => image.complete && image.naturalWidth > 100).length;
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  const wide = document.documentElement.scrollWidth - innerWidth;
  const page = getComputedStyle(document.body);
  found.textContent = `images ${images.length} shown ${shown} wide ${wide} `
    + `ink ${page.color} paper ${page.backgroundColor}`;
  parent.document.body.append(found);
  console.info("measured");
});</script>
"""
FIGURES = [
    "babilong",
    "comparison",
    "kv_bytes",
    "loss_by_position",
    "niah",
    "niah_4",
    "patterns",
    "perplexity_by_position",
    "ruler",
    "schedule",
    "short",
    "training_loss",
]
SECONDS = {
    "fetch": 11.25,
    "data_prep": 12.5,
    "convert": 13.75,
    "finetune": 1234.5,
    "export": 14.25,
    "evaluate": 15.75,
}
COUNTS = {
    "data_prep": {"train": {"tokens": 987654}},
    "finetune": {"tokens": 40960, "steps": 20, "device": "NVIDIA H200"},
}


def random_metrics(rng):
    """Twenty steps, and validation at three of them."""
    train = [
        {
            "kind": "train",
            "step": step,
            "loss": rng.uniform(1, 9),
            "lr": rng.uniform(1e-5, 1e-3),
            "grad_norm": rng.uniform(0.1, 3),
            "tokens_per_second": rng.uniform(100, 9000),
            "mfu": None,
        }
        for step in range(1, 21)
    ]
    validation = [
        {
            "kind": "validation",
            "step": step,
            "loss": rng.uniform(1, 9),
            "by_position": [
                {
                    "start": s,
                    "stop": s + 16,
                    "loss": rng.uniform(1, 9),
                    "tokens": rng.randint(9, 99),
                }
                for s in range(0, 64, 16)
            ],
        }
        for step in (0, 10, 20)
    ]
    return train + validation


SUBTASKS = {"ruler": ("vt", "cwe"), "babilong": ("qa1", "qa2"), "short": ("arc",)}


def asked(key, subtask, length):
    """What the record of an answer says of its prompt."""
    row = {"key": key, "subtask": subtask, "length": length, "prompt_sha256": f"{subtask}/{key}"}
    return row | {"beyond_context": length > 32}


def random_records(rng):
    """Three documents, four needle cells of two samples (and two of 4 needles), other tasks'
    scores, and three lengths of the cache."""
    records = []
    for model in ("base", "final"):
        for document in range(3):
            for start in range(0, 64, 16):
                tokens = 15 if start == 0 else 16
                nll = rng.uniform(1, 9) * tokens
                row = {"document": document, "length": 64, "start": start, "stop": start + 16}
                row |= {"key": str(document), "nll": nll, "tokens": tokens}
                records.append({"task": "perplexity", "model": model, **row})
        for length in (32, 64):
            for depth in (0, 50):
                for sample in range(4):
                    needles = 1 if sample < 2 else 4
                    row = {"length": length, "depth": depth, "sample": sample % 2}
                    row |= asked(f"{length}/{depth}/{sample}", f"{needles} needles", length)
                    score = rng.choice([0.0, 100.0])
                    row |= {"needles": needles, "score": score}
                    records.append({"task": "niah", "model": model, **row})
            for task, subtasks in SUBTASKS.items():
                for subtask in subtasks:
                    # A short task has no length: one cell over all its documents.
                    shown = 0 if task == "short" else length
                    for sample in range(3):
                        row = asked(f"{subtask}/{length}/{sample}", subtask, shown)
                        row["score"] = rng.uniform(0, 100)
                        records.append({"task": task, "model": model, **row})
    for length in (16, 32, 64):
        full = length * 2**20
        row = {"length": length, "full_bytes": full, "allocated_bytes": rng.randint(9, full)}
        row["live_bytes"] = rng.randint(1, row["allocated_bytes"])
        records.append({"task": "kv_bytes", "model": "final", **row})
    return records


def make_report(root, metrics, records, config=None, **exported):
    """Run the stage; counts, the page, and its tables as {first cell(s): the other cells}."""
    config = config or small_config()
    write_manifests(root, SECONDS, COUNTS)
    for path, lines in (("finetune/metrics", metrics), ("evaluate/records", records)):
        (root / f"{path}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (root / "export" / "config.json").write_text(json.dumps(exported_config(**exported)))
    save_file({"a": torch.zeros(7, 11), "b": torch.zeros(13)}, root / "export/model.safetensors")
    run = context(root, config, "report")
    counts = report.run(run)
    return counts, (run.out / "index.html").read_text(), run.out


def table(page, title):
    """The cells of the table in the section with this heading."""
    section = re.search(rf"<h2>{title}</h2>(.*?)</section>", page, re.S).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.S)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    return cells if cells[0] and "<th>" in rows[0] else [[], *cells]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rng = random.Random(1)
    metrics, records = random_metrics(rng), random_records(rng)
    return metrics, records, *make_report(tmp_path_factory.mktemp("report"), metrics, records)


@pytest.fixture
def undrawn(monkeypatch):
    """For what the page says: pictures are files of no picture, since drawing takes seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(b"drawn"))


def drawn(out, kind):
    """Names of the run's own figures."""
    names = sorted(path.stem for path in (out / "figures").glob(f"*.{kind}"))
    return [name for name in names if not name.startswith("speed_")]


def test_every_figure_is_saved_and_inside_the_page(made):
    _, _, counts, page, out = made
    for kind in ("png", "svg"):
        assert drawn(out, kind) == FIGURES
    figures_of_speed = [path.stem for path in (out / "figures").glob("speed_*.svg")]
    assert counts["figures"] == len(FIGURES) + len(figures_of_speed) and figures_of_speed
    assert all(path.read_text().startswith("<?xml") for path in (out / "figures").glob("*.svg"))
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    saved = {path.read_bytes() for path in (out / "figures").glob("*.png")}
    assert {base64.b64decode(data) for data in inside} == saved
    assert all(data.startswith(b"\x89PNG") for data in saved)


def browsed(folder, page, width=1200, dark=False):
    """What a browser measures of the page, and the lines on its console."""
    probed = page.replace("</body>", PROBE + "</body>")
    around = folder / "around.html"
    around.write_text(f'<iframe width="{width}" height="900" srcdoc="{escape(probed)}"></iframe>')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'browser'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", around.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(
        r"images (\d+) shown (\d+) wide (-?\d+) ink rgb\((.+?)\) paper rgb\((.+?)\)<", done.stdout
    )
    assert found, done.stderr[-2000:]
    colours = [sum(map(int, found[i].split(","))) / 3 for i in (4, 5)]
    console = re.findall(r":CONSOLE(?::\d+|\(\d+\))\] *(.*)", done.stderr)
    return [int(found[i]) for i in (1, 2, 3)], colours, console


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_every_picture_and_cuts_nothing(made, tmp_path):
    """On a wide screen and on a phone's, light and dark; tables scroll by themselves."""
    *_, page, out = made
    pictures = len(list((out / "figures").glob("*.png")))
    for width, dark in ((1200, False), (390, True)):
        (images, shown, wide), (ink, paper), console = browsed(tmp_path, page, width, dark)
        assert images == shown == pictures
        assert wide <= 0
        assert ink > 200 and paper < 50 if dark else ink < 50 and paper > 200
        assert len(console) == 1 and "measured" in console[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_would_tell_a_fault(made, tmp_path):
    """The test above can fail: an error on the console, a picture lost, a line too long."""
    faults = (
        '<img src="data:image/png;base64,AAAA"><p style="width: 60rem">a</p><script>x()</script>'
    )
    (images, shown, wide), _, console = browsed(
        tmp_path, made[3].replace("</body>", faults + "</body>"), 390
    )
    assert shown == images - 1
    assert wide > 0
    assert len(console) == 2 and any("x is not defined" in line for line in console)


def test_the_page_needs_nothing_beside_itself(made):
    page = made[3]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_facts_are_those_of_the_manifests(made):
    facts = dict(table(made[3], "What ran")[1:])
    assert facts["Experiment"] == "small, variant main"
    assert facts["Model"].startswith("tiny: 90 parameters, 4 layers, 4 heads, 2 KV heads")
    assert facts["Layers"] == "S1 F2 S1"
    assert facts["Sparse layers see"] == "4 sink tokens, a window of 16"
    assert facts["Data"] == "987,654 tokens for training"
    assert facts["Trained on"] == "40,960 tokens in 20 steps"
    assert facts["Seconds"] == ", ".join(f"{name} {s:,.1f}" for name, s in SECONDS.items())
    assert facts["Versions"] == "torch 9.8.7"


def test_training_numbers_equal_the_records(made):
    metrics, _, _, page, _ = made
    train = [r for r in metrics if r["kind"] == "train"]
    rows = table(page, "Training loss")[1:]
    assert len(rows) == len(train)
    for row, record in zip(rows, train, strict=True):
        values = [float(cell.replace(",", "")) for cell in row]
        names = ("step", "loss", "lr", "grad_norm", "tokens_per_second")
        assert values == pytest.approx([record[name] for name in names], rel=6e-3)
    validation = [r for r in metrics if r["kind"] == "validation"]
    rows = table(page, "Held-out loss by position, before and after training")
    assert rows[0] == ["Position", "Step 0", "Step 20", "Tokens"]
    for i, row in enumerate(rows[1:]):
        first, last = (validation[k]["by_position"][i] for k in (0, -1))
        place = f"{first['start']} to {first['stop']}"
        losses = [f"{first['loss']:.4f}", f"{last['loss']:.4f}"]
        assert row == [place, *losses, str(first["tokens"])]


def test_perplexities_equal_the_records(made):
    _, records, _, page, _ = made
    rows = table(page, "Perplexity by position")
    assert rows[0] == ["Position", "base", "final", "Tokens"]
    assert len(rows) == 5
    for row in rows[1:]:
        start = int(row[0].split()[0])
        for model, cell in zip(("base", "final"), row[1:3], strict=True):
            mine = [r for r in records if r["model"] == model and r.get("start") == start]
            expected = math.exp(sum(r["nll"] for r in mine) / sum(r["tokens"] for r in mine))
            assert float(cell.replace(",", "")) == pytest.approx(expected, abs=0.0051)
            assert int(row[3]) == sum(r["tokens"] for r in mine)


def test_needle_scores_equal_the_records(made):
    _, records, _, page, _ = made
    rows = table(page, "Needle in a haystack")
    assert rows[0] == ["Length", "Depth", "base", "final"]
    assert len(rows) == 5
    for length, depth, *cells in rows[1:]:
        for model, cell in zip(("base", "final"), cells, strict=True):
            scores = [
                r["score"]
                for r in records
                if (r["task"], r.get("needles")) == ("niah", 1)
                and (r["model"], r["length"], f"{r['depth']}%") == (model, int(length), depth)
            ]
            assert len(scores) == 2 and float(cell) == sum(scores) / 2


def test_cache_bytes_equal_the_records(made):
    _, records, _, page, _ = made
    mine = [r for r in records if r["task"] == "kv_bytes"]
    rows = table(page, "KV cache")[1:]
    for row, record in zip(rows, mine, strict=True):
        assert int(row[0]) == record["length"]
        names = ("full_bytes", "allocated_bytes", "live_bytes")
        assert row[1:4] == [f"{record[name] / 2**20:,.2f}" for name in names]
        saved = 100 - 100 * record["allocated_bytes"] / record["full_bytes"]
        assert row[4] == f"{saved:.1f}%"


def test_summary_says_the_result(made):
    metrics, records, counts, page, _ = made
    trained, losses, beyond, ratios, needles, cache = counts["summary"]
    assert trained == (
        "context 32 -> 4,096 tokens, layers S1 F2 S1: trained on 40,960 tokens in 20 steps"
    )
    validation = [r for r in metrics if r["kind"] == "validation"]
    assert f"{validation[0]['loss']:.4f} -> {validation[-1]['loss']:.4f}" in losses
    assert "beyond the old context of 32 tokens" in beyond
    for model in ("base", "final"):
        mine = [r for r in records if r["model"] == model and r.get("start", 0) >= 32]
        value = math.exp(sum(r["nll"] for r in mine) / sum(r["tokens"] for r in mine))
        assert f"{value:,.2f} ({model})" in beyond
        mine = [r for r in records if r["model"] == model and r.get("stop", 64) <= 32]
        within = math.exp(sum(r["nll"] for r in mine) / sum(r["tokens"] for r in mine))
        assert f"{value / within:,.2f} ({model})" in ratios
        scores = [
            r["score"]
            for r in records
            if (r["task"], r["model"], r.get("needles")) == ("niah", model, 1)
        ]
        assert f"{sum(scores) / len(scores):.1f} ({model})" in needles
    last = [r for r in records if r["task"] == "kv_bytes"][-1]
    saved = 100 - 100 * last["allocated_bytes"] / last["full_bytes"]
    assert f"at 64 tokens: {saved:.1f}% of the bytes saved" in cache
    for line in counts["summary"]:
        assert f"<li>{line.replace('>', '&gt;')}</li>" in page


def test_summary_tells_of_needles_beyond_the_window_and_of_runs_beside():
    def asked(model, distance, score):
        row = {"task": "niah", "model": model, "length": 64, "depth": 0, "distance": distance}
        return row | {"needles": 1, "score": score}

    records = [asked("base", 40, 0.0), asked("final", 40, 100.0), asked("final", 9, 0.0)]
    records.append(asked("base", 9, 100.0))
    beside = {"window": [asked("final", 40, 25.0), asked("final", 9, 100.0)], "gone": []}
    (line,) = summarise([], records, 32, window=16, beside=beside)
    assert line.endswith(
        "further back than the window of 16: 0.0 (base) -> 100.0 (final), 25.0 (window) of 100"
    )
    (line,) = summarise([], records, 32, beside=beside)
    assert line.endswith("tokens: 50.0 (base) -> 50.0 (final), 62.5 (window) of 100")


def test_summary_tells_of_texts_eight_times_as_long():
    def measured(start, loss):
        row = {"task": "perplexity", "model": "final", "start": start, "stop": start + 16}
        return row | {"nll": 16 * loss, "tokens": 16}

    losses = {0: 1.0, 16: 9.0, 48: 9.0, 64: 2.0, 112: 2.0}
    value, ratio = summarise([], [measured(*pair) for pair in losses.items()], 16)
    assert value == f"perplexity at 4 to 8 times the old context of 16: {math.exp(2):.2f} (final)"
    assert ratio.endswith(f"perplexity within the old context: {math.e:.2f} (final)")


def test_missing_records_are_said_not_fatal(undrawn, tmp_path):
    records = [r for r in random_records(random.Random(3)) if r["task"] == "perplexity"]
    counts, page, out = make_report(tmp_path, [], records)
    for text in (
        "No training records",
        "No validation records",
        "No needle records: eval.tasks does not name niah",
        "No kv_bytes records: eval.models does not name final",
    ):
        assert text in page
    assert drawn(out, "png") == ["patterns", "perplexity_by_position", "schedule"]
    assert "eval.tasks does not name ruler" in page and "one model alone, or no score" in page
    assert [line.split()[0] for line in counts["summary"]] == ["context", "perplexity", "that,"]
    counts, page, _ = make_report(tmp_path, [], [])
    assert "No perplexity records: eval.tasks does not name perplexity" in page
    assert len(counts["summary"]) == 1


def test_a_context_that_nothing_exceeds_is_said(undrawn, tmp_path):
    config = small_config()
    config.model.max_positions = 4096
    counts, _, _ = make_report(tmp_path, [], random_records(random.Random(4)), config)
    assert "over all positions (none beyond the old context)" in counts["summary"][1]


def test_an_untrained_export_reads_no_finetune(undrawn, tmp_path):
    config = small_config()
    assert "finetune" in report.INPUTS(config)
    config.export.source = "convert"
    assert "finetune" not in report.INPUTS(config)
    metrics = random_metrics(random.Random(5))
    _, page, _ = make_report(tmp_path, metrics, random_records(random.Random(5)), config)
    assert "No training records" in page


def test_a_model_without_sparse_layers_is_reported(undrawn, tmp_path):
    _, page, out = make_report(tmp_path, [], [], is_full=(True,) * 4)
    facts = dict(table(page, "What ran")[1:])
    assert facts["Layers"] == "F4" and "Sparse layers see" not in facts
    assert (out / "figures" / "patterns.png").exists()


def test_names_are_escaped(undrawn, tmp_path):
    config = small_config()
    config.variant = "<b>&"
    page = make_report(tmp_path, [], [], config)[1]
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page


def scores_of(records, **wanted):
    return [r["score"] for r in records if wanted.items() <= r.items()]


@pytest.mark.parametrize(("task", "title"), [("ruler", "RULER"), ("babilong", "BABILong")])
def test_scores_by_length_and_task_equal_the_records(made, task, title):
    _, records, _, page, _ = made
    rows = table(page, title)
    assert rows[0] == ["Length", "Task", "base", "final"] and len(rows) == 1 + 2 * 3
    for length, subtask, *cells in rows[1:]:
        for model, cell in zip(("base", "final"), cells, strict=True):
            wanted = {"task": task, "model": model, "length": int(length)}
            wanted |= {} if subtask == "mean" else {"subtask": subtask}
            scores = scores_of(records, **wanted)
            assert len(scores) == (6 if subtask == "mean" else 3)
            mean, error = map(float, cell.split(" ± "))
            assert mean == pytest.approx(sum(scores) / len(scores), abs=0.051)
            if subtask != "mean":
                assert error == pytest.approx(statistics.stdev(scores) / 3**0.5, abs=0.051)
    assert "A star marks a length above the context" in page


def test_short_tasks_equal_the_records(made):
    _, records, _, page, _ = made
    ((name, *cells),) = table(page, "Short tasks")[1:]
    assert name == "arc"
    for model, cell in zip(("base", "final"), cells, strict=True):
        scores = scores_of(records, task="short", model=model)
        assert float(cell.split(" ± ")[0]) == pytest.approx(sum(scores) / len(scores), abs=0.051)


def test_models_are_compared_on_the_same_prompts(made):
    _, records, _, page, _ = made
    rows = {(row[0], row[1]): row[2:] for row in table(page, "Models side by side")[1:]}
    assert len(rows) == 5 * 2 and rows["ruler", "final"][1:] == ["", ""]
    for task in ("niah", "ruler", "babilong", "short"):
        one, other = (scores_of(records, task=task, model=m) for m in ("base", "final"))
        mean, difference, pairs = rows[task, "base"]
        assert float(mean.split(" ± ")[0]) == pytest.approx(sum(one) / len(one), abs=0.051)
        changes = [a - b for a, b in zip(one, other, strict=True)]
        value, error = map(float, difference.split(" ± "))
        assert int(pairs) == len(changes)
        assert value == pytest.approx(sum(changes) / len(changes), abs=0.051)
        spread = statistics.stdev(changes) / len(changes) ** 0.5
        assert error == pytest.approx(spread, abs=0.051)
    assert "nats per token" in rows["perplexity", "base"][0]


def test_other_runs_stand_beside(undrawn, tmp_path):
    """Their records where they are finished; a missing one is said, and the page follows them."""
    config, records = small_config(), random_records(random.Random(6))
    config.outputs, config.report.beside = str(tmp_path / "out"), ["full", "window/two"]
    assert report.depends_on(config)["beside"] == {"full": None, "window/two": None}
    folder = tmp_path / "out" / "full" / "main" / "evaluate"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"id": "a", "finished": "today"}')
    other = [{**r, "score": 1.0} for r in records if r["task"] == "ruler" and r["model"] == "final"]
    other += [{**r, "model": "reduced"} for r in other]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in other))
    page = make_report(tmp_path / "here", [], records, config)[1]
    rows = {(row[0], row[1]): row[2:] for row in table(page, "Models side by side")[1:]}
    assert rows["ruler", "full"][0] == rows["ruler", "full reduced"][0] == "1.0 ± 0.0"
    assert rows["ruler", "full"][2] == "12"
    assert "Without window/two: no finished evaluation there" in page
    assert report.depends_on(config)["beside"]["full"] is not None


def test_skipped_short_tasks_say_why(tmp_path):
    pictures = Pictures(tmp_path)
    section = short_section([], "lm-eval is not installed", pictures)
    assert "skipped, since lm-eval is not installed" in section.text


def test_tables_of_speed_are_those_of_the_runs_own_gpu(made, undrawn, tmp_path):
    """The run of `made` trained on an H200."""
    shown = re.findall(r"docs/results/(\w+)\.csv", made[3])
    assert set(shown) == {"train_step_h200", "serving_h200"}
    assert speed_sections(Pictures(tmp_path / "figures"), "CPU") == []
    (tmp_path / "kernels_x.csv").write_text(
        "pattern,documents,length,heads,kv_heads,head_dim,deterministic,backend,pass,ms,tflops,gpu,date\n"
        "full,1,1024,4,4,64,False,a,forward,1.5,100,H,2026-01-02\n"
        "full,1,2048,4,4,64,False,a,backward,2.5,,H,2026-01-01\n"
        "full,1,2048,4,4,64,False,a,backward,9.5,,H too,2026-01-03\n"
    )
    (tmp_path / "serving_y.csv").write_text("what,seconds,gpu\nprefill,3.25,H\n")
    kernels, serving = speed_sections(Pictures(tmp_path / "figures"), "H", tmp_path)
    assert "on H, 2026-01-01 to 2026-01-02" in kernels.text and len(kernels.table.rows) == 2
    assert kernels.table.rows[0][-2:] == ("1.5", "100") and kernels.table.rows[1][-1] == ""
    assert serving.table.header == ("what", "seconds", "gpu")
    assert serving.table.rows == [("prefill", "3.25", "H")] and serving.picture is None


def brute_kinds(pattern, length, head, heads):
    """The kinds of `visible_kinds` by the words of the definition."""
    kinds = np.zeros((length, length), int)
    for q in range(length):
        for k in range(q + 1):
            if q - k < pattern.window:
                kinds[q, k] = 2
            elif k < pattern.sink_tokens:
                kinds[q, k] = 3
            elif pattern.stride is not None:
                phase = head * pattern.stride // heads if pattern.phase == "per_head" else 0
                kinds[q, k] = int(k // pattern.block % pattern.stride == phase)
    return kinds


@pytest.mark.parametrize("example", figures.EXAMPLES[1:], ids=lambda e: e[0])
def test_drawn_patterns_are_the_definition(example):
    _, pattern, head, heads = example
    drawn = figures.visible_kinds(pattern, 48, 48, head, heads)
    assert (drawn == brute_kinds(pattern, 48, head, heads)).all()


def test_full_pattern_is_drawn_full():
    drawn = figures.visible_kinds(Pattern.full(), 32, 32)
    assert (drawn == 2 * np.tril(np.ones((32, 32)))).all()


def test_long_documents_miss_no_block():
    pattern = Pattern(sink_tokens=16, window=64, block=16, stride=16, phase="per_head")
    drawn = figures.visible_kinds(pattern, 8192, 64, kv_head=3, total_kv_heads=4)
    # the last row sees 16 of every 256 tokens, which lie in one of two cells of 128
    assert (drawn[-1, 2:60] == np.tile([0, 1], 29)).all() and drawn[-1, 0] == 3
    assert drawn[-1, -1] == 2


def curves(figure):
    """The y values of each labelled line of a figure's first axes."""
    axes = figure.axes[0]
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_figures_hold_the_records_values(made):
    metrics, records, *_ = made
    validation = [r for r in metrics if r["kind"] == "validation"]
    drawn = curves(figures.loss_by_position(validation, 32))
    assert drawn["step 0 (before training)"] == [b["loss"] for b in validation[0]["by_position"]]
    assert drawn["step 20"] == [b["loss"] for b in validation[2]["by_position"]]
    train = [r for r in metrics if r["kind"] == "train"]
    drawn = curves(figures.training_loss(train, validation))
    assert drawn["training batch"] == [r["loss"] for r in train]
    rows = [r for r in records if r["task"] == "kv_bytes"]
    heights = [bar.get_height() * 2**20 for bar in figures.kv_bytes(rows).axes[0].patches]
    expected = [r["full_bytes"] for r in rows] + [r["allocated_bytes"] for r in rows]
    assert heights == pytest.approx(expected)


def test_perplexities_of_different_orders_get_a_log_axis():
    bucket = report.perplexity_by_position(
        [
            {"task": "perplexity", "model": m, "start": 0, "stop": 9, "nll": 9 * loss, "tokens": 9}
            for m, loss in (("base", 8.0), ("final", 3.0))
        ]
    )
    assert figures.perplexity_by_position(bucket).axes[0].get_yscale() == "log"
    same = {"base": bucket["final"], "final": bucket["final"]}
    assert figures.perplexity_by_position(same).axes[0].get_yscale() == "linear"


def test_needle_maps_share_a_scale_and_show_each_cell():
    cells = {"base": {(8, 0): 0.0, (16, 0): 50.0}, "final": {(8, 0): 100.0, (16, 0): 25.0}}
    figure = figures.niah_map(cells)
    maps = [axes for axes in figure.axes if axes.images]
    assert [[t.get_text() for t in axes.texts] for axes in maps] == [["0", "50"], ["100", "25"]]
    assert {axes.images[0].get_clim() for axes in maps} == {(0, 100)}


def test_pictures_of_the_readme(tmp_path):
    figures.save_pattern_pictures(tmp_path / "docs")
    assert sorted(p.name for p in (tmp_path / "docs").iterdir()) == ["patterns.png", "schedule.png"]


def test_speeds_of_training_by_length_are_the_fastest_rows():
    def row(arm, length, speed, documents="one", mask=True):
        case = {"arm": arm, "length": length, "documents": documents, "document_mask": mask}
        return case | {"tokens_per_second_per_gpu": speed}

    rows = [
        *(row("hybrid", 2048, 90.0), row("full", 1024, 70.0), row("hybrid", 1024, 80.0)),
        *(row("hybrid", 1024, 60.0), row("full", 2048, None), row("hybrid", 2048, 50.0, 512)),
        row("full", 2048, 40.0, "packed", False),
    ]
    figure = figures.training_speed_by_length(rows)
    assert curves(figure) == {
        "hybrid, one document": [80.0, 90.0],
        "full, one document": [70.0],
        "hybrid, documents of 512": [50.0],
        "full, packed documents, no mask": [40.0],
    }
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1K", "2K"]
    assert figures.several_lengths(rows) and not figures.several_lengths(rows[1:2] + rows[2:5:2])

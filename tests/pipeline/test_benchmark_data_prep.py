"""benchmark=data_prep measures whole runs, and refuses to compare unlike work."""

import csv
import json
import sys

import pytest

from pipeline.benchmarks import data_prep
from pipeline.benchmarks.data_prep import OURS, Runs, table
from pipeline.manifest import StageError
from tests.pipeline.running import refused, run
from tests.pipeline.small_run import save_llama, texts


def test_ratios_are_of_medians_and_the_least_of_extremes():
    runs = {
        OURS: Runs(1000, "tiktoken 0", [10.0, 12.0, 11.0]),
        "datatrove": Runs(1001, "1", [40.0, 44.0, 60.0]),
    }
    ours, peer = table("bpe", runs)
    assert (ours["ours_over_it"], ours["tokens_per_cpu_second"]) == ("", 91)
    assert (peer["ours_over_it"], peer["cpu_seconds"]) == (4.0, 44.0)
    assert peer["ours_over_it_least"] == round((1000 / 12) / (1001 / 40), 2)
    assert peer["cpu_seconds_all"] == "40.0 44.0 60.0"
    runs["datatrove"].tokens = 1100
    with pytest.raises(StageError, match="datatrove made 1,100 tokens .*the same within 0.5%"):
        table("bpe", runs)


def test_cpu_seconds_and_peak_are_of_the_program_and_its_own():
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    code = f"{busy}import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    printed, seconds, peak = data_prep._spend([sys.executable, "-c", code + "\nprint('end')"])
    assert printed == "end\n"
    assert 0.6 <= seconds < 5 and peak > 5
    with pytest.raises(StageError, match="ended with 3: .*benchmark.peer_python"):
        data_prep._spend([sys.executable, "-c", "raise SystemExit(3)"])


def test_without_a_corpus_it_says_what_to_set(tmp_path, capsys):
    message = refused(capsys, "stage=benchmark", "benchmark.name=data_prep", f"outputs={tmp_path}")
    assert "must name a folder of .jsonl files, and model folders by name" in message


@pytest.mark.slow
def test_our_own_run_is_measured_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_prep, "PEERS", {})
    model = save_llama(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"text": text}) for text in texts(30)]
    (tmp_path / "texts/a.jsonl").write_text("\n".join(lines))
    keys = (
        "stage=benchmark",
        "benchmark.name=data_prep",
        "benchmark.repeats=2",
        "data.seq_length=256",
        f"outputs={tmp_path / 'out'}",
        f"benchmark.corpus={tmp_path / 'texts'}",
        f"benchmark.tokenizers=[{{name: small, path: {model}}}]",
    )
    code, printed = run(capsys, *keys)
    assert code == 0, printed
    (folder,) = (tmp_path / "out").glob("*/main/benchmark")
    with (folder / "data_prep.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["engine"] == OURS and row["version"].startswith("tiktoken ")
    assert len(row["cpu_seconds_all"].split()) == 2 and int(row["tokens"]) > 30 * 300

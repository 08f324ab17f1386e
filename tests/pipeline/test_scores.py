import csv
import math
import statistics

import pytest

from pipeline.scores import averages, cells, mean_of, mean_of_means, paired, write_csv


def record(model, score, subtask="vt", length=4096, key="a", prompt="p", **more):
    row = {"model": model, "task": "ruler", "subtask": subtask, "length": length, "key": key}
    return row | {"score": score, "prompt_sha256": prompt} | more


def test_means_and_their_errors():
    values = [0.0, 100.0, 50.0, 100.0, 20.0]
    mean = mean_of(values)
    assert mean.mean == statistics.fmean(values)
    assert mean.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert str(mean) == f"54.0 ± {mean.error:.1f}" and mean_of([7.0]).error == 0
    # Two tasks count alike, however many samples each has.
    both = mean_of_means([mean_of([0.0, 100.0]), mean_of([10.0] * 50)])
    assert both.mean == 30 and both.samples == 52 and both.error == pytest.approx(50 / 2)


def test_cells_and_averages(tmp_path):
    records = [
        *(record("base", score) for score in (0, 100)),
        *(record("base", score, "cwe", beyond_context=True) for score in (10, 30)),
        record("base", 60, length=8192),
        record("final", 90),
        {"model": "base", "task": "perplexity", "nll": 3},
    ]
    table = cells(records)
    assert [(c.model, c.subtask, c.length, c.mean, c.beyond) for c in table] == [
        ("base", "vt", 4096, 50, False),
        ("base", "cwe", 4096, 20, True),
        ("base", "vt", 8192, 60, False),
        ("final", "vt", 4096, 90, False),
    ]
    means = averages(table, "base", "ruler")
    assert {length: mean.mean for length, mean in means.items()} == {4096: 35, 8192: 60}
    write_csv(tmp_path / "scores.csv", table)
    with (tmp_path / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows[1] == {
        **{"model": "base", "task": "ruler", "subtask": "cwe", "length": "4096", "samples": "2"},
        **{"mean": "20.0", "standard_error": "10.0", "beyond": "True"},
    }


def test_pairs_are_the_same_prompts():
    one = [record("a", 100, key="1"), record("a", 50, key="2"), record("a", 0, key="3")]
    two = [record("b", 50, key="1"), record("b", 70, key="2"), record("b", 9, key="3", prompt="q")]
    mean = paired(one, two, "ruler")
    assert (mean.samples, mean.mean) == (2, 15) and mean.error == pytest.approx(35)
    assert paired(one, two, "niah") is None
    assert paired(one, [], "ruler") is None


def test_losses_are_paired_by_document():
    def part(key, nll, tokens):
        return {"task": "perplexity", "key": key, "length": 9, "nll": nll, "tokens": tokens}

    one = [part("1", 8.0, 4), part("1", 4.0, 2), part("2", 3.0, 1)]
    two = [part("1", 6.0, 6), part("2", 2.0, 1)]
    mean = paired(one, two, "perplexity")
    assert (mean.samples, mean.mean, mean.error) == (2, 1.0, 0.0)

"""Means of scores, their standard errors, and differences between models on the same prompts."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.records import Record

COLUMNS = ("model", "task", "subtask", "length", "samples", "mean", "standard_error", "beyond")


@dataclass(frozen=True)
class Mean:
    """Of `samples` values; the error is their standard deviation / sqrt(samples), 0 for one."""

    samples: int
    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} \N{PLUS-MINUS SIGN} {self.error:.1f}"


@dataclass(frozen=True)
class Cell:
    """A model's scores on one subtask at one length, percent."""

    model: str
    task: str
    subtask: str
    length: int
    samples: int
    mean: float
    standard_error: float
    beyond: bool


def mean_of(values: Sequence[float]) -> Mean:
    """Of at least one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(1, mean, 0.0)
    spread = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(count, mean, math.sqrt(spread / count))


def mean_of_means(parts: Sequence[Mean]) -> Mean:
    """The mean of several tasks' means, each counting alike, as RULER's and BABILong's averages."""
    count = len(parts)
    error = math.sqrt(math.fsum(part.error**2 for part in parts)) / count
    total = sum(part.samples for part in parts)
    return Mean(total, math.fsum(part.mean for part in parts) / count, error)


def cells(records: Iterable[Record]) -> list[Cell]:
    """One per model, task, subtask and length, in the order in which they come."""
    scores: dict[tuple, list[float]] = defaultdict(list)
    beyond: dict[tuple, bool] = {}
    for record in records:
        if "score" in record:
            key = tuple(record.get(name) for name in COLUMNS[:4])
            scores[key].append(record["score"])
            beyond[key] = bool(record.get("beyond_context"))
    found = []
    for key, values in scores.items():
        mean = mean_of(values)
        found.append(Cell(*key, mean.samples, mean.mean, mean.error, beyond[key]))
    return found


def write_csv(path: Path, rows: Sequence[Cell]) -> None:
    """COLUMNS, one line per cell, lengths ascending within a subtask."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for row in rows:
            rounded = {"mean": round(row.mean, 3), "standard_error": round(row.standard_error, 3)}
            writer.writerow(asdict(row) | rounded)


def averages(table: Sequence[Cell], model: str, task: str) -> dict[int, Mean]:
    """For each length the mean over the task's subtasks."""
    parts: dict[int, list[Mean]] = defaultdict(list)
    for cell in table:
        if (cell.model, cell.task) == (model, task):
            parts[cell.length].append(Mean(cell.samples, cell.mean, cell.standard_error))
    return {length: mean_of_means(parts[length]) for length in sorted(parts)}


def paired(records: Sequence[Record], others: Sequence[Record], task: str) -> Mean | None:
    """Mean of (score of `records` - score of `others`) over the prompts that both were asked.

    Paired by the prompt's digest; perplexity by document, in nats per token. None without a pair.
    """
    mine, theirs = (_by_prompt(rows, task) for rows in (records, others))
    both = [key for key in mine if key in theirs]
    return mean_of([mine[key] - theirs[key] for key in both]) if both else None


def _by_prompt(records: Sequence[Record], task: str) -> dict[tuple, float]:
    if task != "perplexity":
        return {
            (r["subtask"], r["key"], r["prompt_sha256"]): r["score"]
            for r in records
            if r["task"] == task
        }
    nll: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        if record["task"] == task:
            both = nll[record["key"], record["length"]]
            both[0] += record["nll"]
            both[1] += record["tokens"]
    return {key: total / tokens for key, (total, tokens) in nll.items()}

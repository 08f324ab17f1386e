"""Records: JSON lines that tasks and training write, and the tables that are made of them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import write_whole
from pipeline.manifest import StageError

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Every line of a finished file; an empty list where there is no file.

    Raises:
        StageError: on a line that is no JSON object.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        record = _parse(line)
        if record is None:
            raise StageError(
                f"{path}:{number}: {line[:60]!r} is no JSON object; write the file again: run the "
                "stage of its folder with force=true"
            )
        records.append(record)
    return records


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


class Journal:
    """Appends the records of samples to a file, so that a killed run can go on.

    Each record carries "model", "task", the sample's "key", and in "parts" how many records the
    sample has. Opening drops a half-written line and samples with fewer records than that.
    """

    def __init__(self, path: Path, others: Sequence[Path] = (), writes: bool = True) -> None:
        """`others`: files of the same kind that other processes write; only read. `writes`: off,
        another process writes what this one is given."""
        self.path, self.writes = path, writes
        whole = _whole_samples(path)
        self.done = set(whole)
        if writes:
            _write_whole(path, whole)
        for other in others:
            self.done |= _whole_samples(other).keys()

    def append(self, model: str, task: str, key: str, records: list[Record]) -> None:
        """Write all records of one sample and hand them to the system."""
        sample = {"task": task, "model": model, "key": key, "parts": len(records)}
        lines = "".join(json.dumps({**sample, **record}) + "\n" for record in records)
        if self.writes:
            with self.path.open("a") as stream:
                stream.write(lines)
        self.done.add((model, task, key))

    def gather(self, others: Sequence[Path]) -> None:
        """Take over the samples of other files that this one lacks."""
        found = _whole_samples(self.path)
        for other in others:
            for sample, records in _whole_samples(other).items():
                found.setdefault(sample, records)
        _write_whole(self.path, found)
        self.done = set(found)


def _whole_samples(path: Path) -> dict[tuple[str, str, str], list[Record]]:
    """The records of each (model, task, key) that has as many as it says, broken lines left out.

    A sample that two processes have written is one of the two.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in map(_parse, lines):
        if record is not None:
            found.setdefault((record["model"], record["task"], record["key"]), []).append(record)
    return {
        sample: records[: records[0]["parts"]]
        for sample, records in found.items()
        if len(records) >= records[0]["parts"]
    }


def _write_whole(path: Path, samples: dict[tuple[str, str, str], list[Record]]) -> None:
    lines = [json.dumps(record) + "\n" for records in samples.values() for record in records]
    write_whole(path, "".join(lines).encode())


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [start, stop) of their documents, and their perplexity."""

    start: int
    stop: int
    tokens: int
    perplexity: float


def perplexity(records: list[Record]) -> float:
    """exp(nats per token) over all tokens of these perplexity records."""
    return math.exp(sum(r["nll"] for r in records) / sum(r["tokens"] for r in records))


def of_task(records: list[Record], task: str) -> dict[str, list[Record]]:
    """The records of one task by model, models in the order in which they come."""
    by_model = defaultdict(list)
    for record in records:
        if record["task"] == task:
            by_model[record["model"]].append(record)
    return dict(by_model)


def perplexity_by_position(records: list[Record]) -> dict[str, list[Bucket]]:
    """For each model, the buckets in ascending order, over all documents."""
    tables = {}
    for model, mine in of_task(records, "perplexity").items():
        by_start = defaultdict(list)
        for record in mine:
            by_start[record["start"]].append(record)
        tables[model] = [
            Bucket(
                start,
                max(r["stop"] for r in by_start[start]),
                sum(r["tokens"] for r in by_start[start]),
                perplexity(by_start[start]),
            )
            for start in sorted(by_start)
        ]
    return tables


def niah_cells(records: list[Record]) -> dict[str, dict[tuple[int, int], float]]:
    """For each model, the mean score of each (length, depth)."""
    tables = {}
    for model, mine in of_task(records, "niah").items():
        scores = defaultdict(list)
        for record in mine:
            scores[record["length"], record["depth"]].append(record["score"])
        tables[model] = {cell: sum(scores[cell]) / len(scores[cell]) for cell in sorted(scores)}
    return tables


def kv_rows(records: list[Record]) -> list[Record]:
    """The KV cache's bytes of the exported model by ascending length."""
    rows = of_task(records, "kv_bytes").get("final", [])
    return sorted(rows, key=lambda record: record["length"])


def by_step(metrics: list[Record], kind: str) -> list[Record]:
    """The training or validation records of metrics.jsonl by ascending step."""
    return sorted((r for r in metrics if r["kind"] == kind), key=lambda record: record["step"])

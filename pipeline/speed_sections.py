"""Sections of the report on speed: what docs/results has of the GPU on which the run trained."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.records import Record
from pipeline.report_page import Pictures, Section, Table

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# Of a table's columns those that are shown, as far as it has them.
SHOWN = (
    *("group", "arm", "pattern", "documents", "length", "backend", "pass", "model", "prompt"),
    *("ms", "tflops", "step_seconds", "tokens_per_second_per_gpu", "mfu", "peak_gib"),
    *("prefill_seconds", "decode_ms", "ms_per_token"),
)
KINDS = {
    "kernels": "Speed of kernels",
    "train_step": "Speed of training steps",
    "serving": "Speed of serving",
}


def read_table(path: Path) -> list[Record]:
    """The rows of a CSV file, numbers and truth values as such, empty cells as None."""
    with path.open(newline="") as stream:
        return [{key: _value(cell) for key, cell in row.items()} for row in csv.DictReader(stream)]


def _value(cell: str) -> Any:
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def speed_sections(pictures: Pictures, gpu: str, folder: Path = RESULTS) -> list[Section]:
    """Sections of the tables kernels_*.csv, train_step_*.csv and serving_*.csv of docs/results.

    Args:
        gpu: the GPU's name by CUDA; rows measured on another one are not shown.
    """
    sections = []
    for kind, title in KINDS.items():
        for path in sorted(folder.glob(f"{kind}_*.csv")):
            rows = [row for row in read_table(path) if row.get("gpu") == gpu]
            if rows:
                sections.append(_section(title, path.name, rows, gpu, pictures))
    return sections


def _section(title: str, name: str, rows: list[Record], gpu: str, pictures: Pictures) -> Section:
    dates = sorted({str(row["date"]) for row in rows if row.get("date")})
    when = f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else ""
    text = f"Measured on {gpu}{when}, apart from this run: docs/results/{name}."
    figure = None
    if name.startswith("kernels") and figures.lengths_of(rows):
        figure = figures.speed_by_length(rows)
    if name.startswith("train_step") and figures.several_lengths(rows):
        figure = figures.training_speed_by_length(rows)
    picture = pictures.save(f"speed_{Path(name).stem}", figure) if figure else None
    columns = [column for column in SHOWN if column in rows[0]] or list(rows[0])[:10]
    cells = [tuple(_cell(row[column]) for column in columns) for row in rows]
    return Section(title, text, picture, Table(tuple(columns), cells))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)

"""Sections of the report on scores: needles, RULER, BABILong, short tasks, models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import figures, score_figures
from pipeline.manifest import digest, read_manifest
from pipeline.records import Record, niah_cells, of_task, read_records
from pipeline.report_page import Pictures, Section, Table
from pipeline.schema import Config
from pipeline.scores import Mean, averages, cells, mean_of_means, paired
from pipeline.stages.evaluate import RECORDS, folder_name

TITLES = {
    "ruler": ("RULER", "Mean score of each task and length; the last row is their mean."),
    "babilong": (
        "BABILong",
        "Facts of bAbI's worlds in a book's text: mean score of each task and length.",
    ),
}
PAIRED = ("niah", "ruler", "babilong", "short")


def niah_sections(
    records: list[Record], beside: dict[str, list[Record]], pictures: Pictures
) -> list[Section]:
    """A map per number of needles: of each model, and of the final one of each run beside."""
    found = [r for r in records if r["task"] == "niah"]
    for run, theirs in beside.items():
        mine = [r for r in theirs if (r["task"], r["model"]) == ("niah", "final")]
        found += [{**record, "model": run} for record in mine]
    records = found
    counts = sorted({r.get("needles", 1) for r in records if r["task"] == "niah"})
    if not counts:
        text = "No needle records: eval.tasks does not name niah."
        return [Section("Needle in a haystack", text)]
    return [_niah(records, count, pictures) for count in counts]


def _niah(records: list[Record], needles: int, pictures: Pictures) -> Section:
    mine = [r for r in records if r["task"] == "niah" and r.get("needles", 1) == needles]
    found = niah_cells(mine)
    every = sorted({cell for table in found.values() for cell in table})
    rows = [
        (
            f"{length:,}",
            f"{depth}%",
            *(f"{t[length, depth]:.1f}" if (length, depth) in t else "" for t in found.values()),
        )
        for length, depth in every
    ]
    samples = {record["sample"] for record in mine}
    name, title, what = "niah", "Needle in a haystack", "A secret number"
    if needles > 1:
        name, title = f"niah_{needles}", f"{needles} needles in a haystack"
        what = f"{needles} secret numbers, of which the first lies at the depth,"
    asked = "asked for at the end; mean of"
    text = f"{what} in held-out text, {asked} {len(samples)} greedy answers in each cell, "
    text += "100 where the number is in the answer." if needles == 1 else "the share of them told."
    picture = pictures.save(name, figures.niah_map(found))
    return Section(title, text, picture, Table(("Length", "Depth", *found), rows))


def task_section(task: str, records: list[Record], pictures: Pictures) -> Section:
    """RULER or BABILong by length and task."""
    title, text = TITLES[task]
    mine = of_task(records, task)
    if not mine:
        return Section(title, f"No {task} records: eval.tasks does not name {task}.")
    tables = {model: cells(rows) for model, rows in mine.items()}
    means = {model: averages(table, model, task) for model, table in tables.items()}
    rows = []
    for length in sorted({length for mean in means.values() for length in mean}):
        for subtask in dict.fromkeys(cell.subtask for table in tables.values() for cell in table):
            found = [
                next((c for c in table if (c.subtask, c.length) == (subtask, length)), None)
                for table in tables.values()
            ]
            shown = ["" if c is None else f"{c.mean:.1f} ± {c.standard_error:.1f}" for c in found]
            rows.append((f"{length:,}", subtask, *shown))
        shown = [str(mean[length]) if length in mean else "" for mean in means.values()]
        rows.append((f"{length:,}", "mean", *shown))
    if any(cell.beyond for table in tables.values() for cell in table):
        text += " A star marks a length above the context that the model was trained on."
    picture = pictures.save(task, score_figures.task_map(tables, means))
    return Section(title, text, picture, Table(("Length", "Task", *tables), rows))


def short_section(records: list[Record], skipped: str | None, pictures: Pictures) -> Section:
    """Short tasks, or why there are none."""
    mine = of_task(records, "short")
    if not mine:
        reason = f"skipped, since {skipped}." if skipped else "eval.tasks does not name short."
        return Section("Short tasks", f"No records of short tasks: {reason}")
    tables = {model: cells(rows) for model, rows in mine.items()}
    rows = [
        (subtask, *(_shown(table, subtask) for table in tables.values()))
        for subtask in dict.fromkeys(cell.subtask for table in tables.values() for cell in table)
    ]
    return Section(
        "Short tasks",
        "Through lm-eval: accuracy in percent, and its standard error.",
        pictures.save("short", score_figures.task_means(tables)),
        Table(("Task", *tables), rows),
    )


def _shown(table: Sequence, subtask: str) -> str:
    found = [cell for cell in table if cell.subtask == subtask]
    return f"{found[0].mean:.1f} ± {found[0].standard_error:.1f}" if found else ""


def beside_folders(config: Config) -> dict[str, Path]:
    """The evaluation's folder of each run of report.beside (EXPERIMENT or EXPERIMENT/VARIANT)."""
    root, name = Path(config.outputs).absolute(), folder_name(config)
    found = {}
    for run in config.report.beside:
        experiment, _, variant = run.partition("/")
        found[run] = root / experiment / (variant or "main") / name
    return found


def beside_ids(config: Config) -> dict[str, str | None]:
    """What the evaluations of other runs are now, so that the page follows them."""
    manifests = {run: read_manifest(folder) for run, folder in beside_folders(config).items()}
    return {run: m and digest([m["id"], m["finished"]]) for run, m in manifests.items()}


def beside_records(config: Config) -> dict[str, list[Record]]:
    """The records of each run of report.beside whose evaluation is finished."""
    return {
        run: read_records(folder / RECORDS)
        for run, folder in beside_folders(config).items()
        if read_manifest(folder) is not None
    }


def comparison_section(config: Config, records: list[Record], pictures: Pictures) -> Section:
    """Every model of this run and of the runs beside it: means, and differences to `final`.

    Without `final`, to the first model.
    """
    models, missing = _by_label(records), []
    for run, folder in beside_folders(config).items():
        if read_manifest(folder) is None:
            missing.append(run)
        else:
            models |= _by_label(read_records(folder / RECORDS), run)
    title = "Models side by side"
    absent = f" Without {', '.join(missing)}: no finished evaluation there." if missing else ""
    tasks = [task for task in PAIRED if any(of_task(rows, task) for rows in models.values())]
    if len(models) < 2 or not tasks:
        return Section(title, f"There is one model alone, or no score.{absent}")
    reference = "final" if "final" in models else next(iter(models))
    rows, drawn = [], []
    for task in (*tasks, "perplexity"):
        for label, mine in models.items():
            mean = _overall(mine, task)
            pair = None if label == reference else paired(mine, models[reference], task)
            if mean is None:
                continue
            unit = "" if task != "perplexity" else " nats per token"
            digits = 1 if task != "perplexity" else 4
            shown = f"{mean.mean:.{digits}f} ± {mean.error:.{digits}f}{unit}"
            change = f"{pair.mean:+.{digits}f} ± {pair.error:.{digits}f}" if pair else ""
            rows.append((task, label, shown, change, str(pair.samples) if pair else ""))
            if pair and task != "perplexity":
                drawn.append((f"{task}: {label}", pair))
    picture = pictures.save("comparison", score_figures.differences(drawn)) if drawn else None
    text = (
        f"Means over all samples and their standard errors, and the paired difference to "
        f"{reference} on the prompts that both were asked.{absent}"
    )
    header = ("Task", "Model", "Mean", f"Minus {reference}", "Pairs")
    return Section(title, text, picture, Table(header, rows))


def _by_label(records: list[Record], run: str = "") -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        model = record["model"]
        label = model if not run else run if model == "final" else f"{run} {model}"
        found.setdefault(label, []).append(record)
    return found


def _overall(records: list[Record], task: str) -> Mean | None:
    """Of all scores, each length and subtask counting alike; of perplexity the mean loss."""
    mine = [record for record in records if record["task"] == task]
    if not mine:
        return None
    if task == "perplexity":
        # Against nothing: the loss of each document itself.
        return paired(mine, [{**record, "nll": 0.0} for record in mine], task)
    table = cells(mine)
    return mean_of_means([Mean(c.samples, c.mean, c.standard_error) for c in table])

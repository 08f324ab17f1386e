"""Pictures of scores: a map of tasks by lengths for each model, and tasks with their errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pipeline.figures import BLUE, CURVES, DPI, MARKERS
from pipeline.scores import Cell, Mean

# Marks a length above the context that a model was trained on.
BEYOND = "*"


def length_label(length: int, beyond: bool = False) -> str:
    """Such as 4K, or 32K* beyond the trained context."""
    text = f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"
    return text + (BEYOND if beyond else "")


def task_map(tables: dict[str, Sequence[Cell]], averages: dict[str, dict[int, Mean]]) -> Figure:
    """Mean score of each subtask and length, with the mean over subtasks below; a map per model."""
    subtasks = list(dict.fromkeys(cell.subtask for table in tables.values() for cell in table))
    widest = max(len(means) for means in averages.values())
    size = (2.2 + (0.9 + 0.62 * widest) * len(tables), 1.3 + 0.3 * (len(subtasks) + 1))
    figure = Figure(figsize=(max(5.0, size[0]), size[1]), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, (model, table) in zip(panels, tables.items(), strict=True):
        lengths = list(averages[model])
        beyond = {cell.length: cell.beyond for cell in table}
        grid = np.full((len(subtasks) + 1, len(lengths)), np.nan)
        for cell in table:
            grid[subtasks.index(cell.subtask), lengths.index(cell.length)] = cell.mean
        for column, length in enumerate(lengths):
            grid[-1, column] = averages[model][length].mean
        image = axes.imshow(grid, cmap="cividis", norm=Normalize(0, 100), aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                shade = "black" if value > 55 else "white"
                label = {"ha": "center", "va": "center", "fontsize": 8, "color": shade}
                axes.text(column, row, f"{value:.0f}", **label)
        axes.axhline(len(subtasks) - 0.5, color="white", linewidth=2)
        labels = [length_label(length, beyond.get(length, False)) for length in lengths]
        axes.set_xticks(range(len(lengths)), labels)
        axes.set_yticks(range(len(subtasks) + 1), [*subtasks, "mean"])
        axes.set_xlabel("Length (tokens)")
        axes.set_title(model, fontsize=10)
    figure.colorbar(image, ax=list(panels), label="Score (0 to 100)")
    return figure


def task_means(tables: dict[str, Sequence[Cell]]) -> Figure:
    """A row per task, a mark with its standard error per model."""
    tasks = list(dict.fromkeys(cell.subtask for table in tables.values() for cell in table))
    figure = Figure(figsize=(7.2, 1.2 + 0.34 * len(tasks)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for place, (model, table) in enumerate(tables.items()):
        shift = 0.16 * (place - (len(tables) - 1) / 2)
        rows = [tasks.index(cell.subtask) + shift for cell in table]
        style = {"color": CURVES[place % len(CURVES)], "fmt": MARKERS[place % len(MARKERS)]}
        means, errors = zip(*((cell.mean, cell.standard_error) for cell in table), strict=True)
        axes.errorbar(means, rows, xerr=errors, capsize=3, markersize=5, label=model, **style)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("Score (0 to 100), with its standard error")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    return figure


def differences(rows: Sequence[tuple[str, Mean]]) -> Figure:
    """Paired differences, a labelled row each, with 1.96 standard errors to both sides."""
    figure = Figure(figsize=(7.2, 1.2 + 0.34 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    means = [mean.mean for _, mean in rows]
    spread = [1.96 * mean.error for _, mean in rows]
    axes.errorbar(means, range(len(rows)), xerr=spread, fmt="o", color=BLUE, capsize=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("Difference in score on the same prompts (95% interval)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure

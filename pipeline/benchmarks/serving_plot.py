"""The picture of a serving table: prompts, answers and cache by length, a curve per arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from pipeline.figures import BLUE, DPI, GREY, VERMILLION, _tidy

STYLES = {"hybrid": (BLUE, "o"), "full": (VERMILLION, "s"), "stock": (GREY, "^")}
PANELS = (
    ("prefill_seconds", 1, "Prefill, seconds a row"),
    ("decode_ms", 1, "Decode, ms a token"),
    ("cache_allocated_bytes", 1e9, "Keys and values, GB"),
)


def serving_by_length(rows: Sequence[dict[str, Any]]) -> Figure:
    """Prefill seconds, decode milliseconds and the cache's GB at batch 1, by length."""
    rows = [row for row in rows if "decode_ms" in row and row["batch"] == 1]
    figure = Figure(figsize=(10.8, 3.6), dpi=DPI, layout="constrained")
    lengths = sorted({row["length"] for row in rows})
    for axes, (key, unit, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for arm, (colour, marker) in STYLES.items():
            # Of a length measured in several groups, the best.
            best: dict[int, float] = {}
            for row in rows:
                if row["arm"] == arm and row.get(key):
                    at = row["length"]
                    best[at] = min(row[key] / unit, best.get(at, float("inf")))
            if best:
                points = zip(*sorted(best.items()), strict=True)
                axes.plot(*points, color=colour, marker=marker, markersize=5, label=arm)
        _tidy(axes)
        axes.set_xscale("log", base=2)
        if key == "decode_ms":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(lengths, [f"{at // 1024}K" if at >= 1024 else f"{at}" for at in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("Tokens of the prompt")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    return figure

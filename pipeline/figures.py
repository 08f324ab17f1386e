"""Pictures made of records and of Pattern.visible alone; `python -m pipeline.figures FOLDER` draws
those that kernels/README.md shows.

Each function takes plain records and returns a matplotlib Figure. Colours are Okabe and Ito's
(https://jfly.uni-koeln.de/color), told apart without colour vision and, with markers, in print.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullLocator

from kernels.pattern import Pattern
from model.config import describe_schedule
from pipeline.records import Bucket, Record

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
LIGHT = "#F2F2F2"
CURVES = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Of the documents in a training step's row: line styles, and names.
LINES = ("-", "--", ":", "-.")
DOCUMENTS = {"one": "one document", "packed": "packed documents"}
DPI = 144
MIB = 2**20
# Beyond this ratio of greatest to least a linear axis flattens the lesser curve.
LOG_RATIO = 8.0
# For the README: small enough that every cell of the drawing is one (query, key) pair.
DRAWN_TOKENS = 48
DRAWN_CELLS = 96
EXAMPLES = (
    ("Full", Pattern.full(), 0, 1),
    ("Sink tokens and window", Pattern(sink_tokens=3, window=10, block=3), 0, 1),
    (
        "Strided blocks, shared phase",
        Pattern(sink_tokens=3, window=6, block=3, stride=4),
        0,
        1,
    ),
    *(
        (
            f"Strided, phase per head: KV head {head} of 4",
            Pattern(sink_tokens=3, window=6, block=3, stride=4, phase="per_head"),
            head,
            4,
        )
        for head in (1, 2, 3)
    ),
)


def _figure(width: float = 7.2, height: float = 3.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)


def _thousands(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _positions(axis, length: int) -> None:
    """Ticks at multiples of a power of two, as lengths of context are."""
    axis.set_major_locator(MultipleLocator(2 ** max(0, math.ceil(math.log2(length / 8)))))
    _thousands(axis)


def _steps(axes: Axes, buckets: Sequence[tuple[int, int, float]], label: str, colour: str) -> None:
    """A horizontal piece per bucket (start, stop, value), a marker in its middle."""
    edges = [bucket[0] for bucket in buckets] + [buckets[-1][1]]
    values = [value for _, _, value in buckets]
    marker = MARKERS[CURVES.index(colour)]
    axes.stairs(values, edges, baseline=None, color=colour, linewidth=1.8)
    middles = [(start + stop) / 2 for start, stop, _ in buckets]
    axes.plot(middles, values, marker, color=colour, markersize=4.5, label=label)


def _by_position(
    curves: dict[str, Sequence[tuple[int, int, float]]], quantity: str, old_context: int | None
) -> Figure:
    figure, axes = _figure()
    # The first is what was before, in the colour that stands for it elsewhere.
    colours = cycle((VERMILLION, BLUE, *CURVES[2:]))
    for (label, buckets), colour in zip(curves.items(), colours, strict=False):
        _steps(axes, buckets, label, colour)
    _tidy(axes)
    values = [value for buckets in curves.values() for _, _, value in buckets]
    if min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axes.set_yscale("log")
        quantity += ", log scale"
    last = max(buckets[-1][1] for buckets in curves.values())
    if old_context is not None and old_context < last:
        axes.axvline(old_context, color="black", linestyle="--", linewidth=1)
        label = f" old context: {old_context:,}"
        place = axes.get_xaxis_transform()
        axes.text(old_context, 1.0, label, fontsize=8, va="bottom", ha="left", transform=place)
    axes.set_xlim(0, last)
    _positions(axes.xaxis, last)
    if max(values) >= 1000 or axes.get_yscale() == "log":
        _thousands(axes.yaxis)
    axes.set_xlabel("Position in the document (tokens)")
    axes.set_ylabel(quantity)
    axes.legend(frameon=False)
    return figure


def loss_by_position(validation: Sequence[Record], old_context: int | None = None) -> Figure:
    """Held-out loss by position at the first and the last validation record."""
    curves = {
        f"step {record['step']:,}{note}": [
            (bucket["start"], bucket["stop"], bucket["loss"]) for bucket in record["by_position"]
        ]
        for record, note in ((validation[0], " (before training)"), (validation[-1], ""))
    }
    return _by_position(curves, "Held-out loss (nats per token)", old_context)


def perplexity_by_position(
    tables: dict[str, list[Bucket]], old_context: int | None = None
) -> Figure:
    """Perplexity on held-out documents by position, a curve per model."""
    names = {"base": "base (as fetched)", "final": "final (as exported)"}
    curves = {
        names.get(model, model): [(b.start, b.stop, b.perplexity) for b in buckets]
        for model, buckets in tables.items()
    }
    return _by_position(curves, "Perplexity", old_context)


def training_loss(train: Sequence[Record], validation: Sequence[Record]) -> Figure:
    """Loss of every step, and the held-out loss at its steps."""
    figure, axes = _figure()
    finite = [(r["step"], r["loss"]) for r in train if r["loss"] is not None]
    steps, losses = zip(*finite, strict=True) if finite else ((), ())
    axes.plot(steps, losses, color=BLUE, linewidth=1.4, label="training batch")
    if validation:
        steps, losses = zip(*((r["step"], r["loss"]) for r in validation), strict=True)
        axes.plot(steps, losses, "s--", color=VERMILLION, markersize=5, label="held out")
    _tidy(axes)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _thousands(axes.xaxis)
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def niah_map(cells: dict[str, dict[tuple[int, int], float]]) -> Figure:
    """Mean score of each length and depth, a map per model on the same scale."""
    widest = max(len({length for length, _ in table}) for table in cells.values())
    columns = min(2, len(cells))
    rows = -(-len(cells) // columns)
    width = max(3.4, 1.4 + 0.62 * widest) * columns
    size = max(width, 5.0), 0.6 + 3.0 * rows
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    scale = Normalize(0, 100)
    for axes, (model, table) in zip(panels, cells.items(), strict=False):
        lengths = sorted({length for length, _ in table})
        depths = sorted({depth for _, depth in table})
        grid = np.full((len(depths), len(lengths)), np.nan)
        for (length, depth), value in table.items():
            grid[depths.index(depth), lengths.index(length)] = value
        image = axes.imshow(grid, cmap="cividis", norm=scale, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                shade = "black" if value > 55 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth}" for depth in depths])
        axes.set_xlabel("Length (tokens)")
        axes.set_title(model, fontsize=10)
    for axes in panels[::columns]:
        axes.set_ylabel("Depth of the needle (%)")
    figure.colorbar(image, ax=list(panels), label="Score (0 to 100)")
    return figure


def kv_bytes(rows: Sequence[Record]) -> Figure:
    """Bytes of the KV cache by length: all layers full, and the hybrid's cache as measured."""
    figure, axes = _figure()
    places = np.arange(len(rows))
    full = np.array([row["full_bytes"] for row in rows]) / MIB
    held = np.array([row["allocated_bytes"] for row in rows]) / MIB
    axes.bar(places - 0.2, full, 0.38, color=GREY, label="every layer full")
    axes.bar(
        *(places + 0.2, held, 0.38),
        color=BLUE,
        hatch="//",
        edgecolor="white",
        label="hybrid, as allocated",
    )
    for place, row, top in zip(places, rows, held, strict=True):
        change = -round(saved_percent(row))
        text = f"{change:+}%".replace("-", "\N{MINUS SIGN}") if change else "same"
        axes.text(place + 0.2, top, text, ha="center", va="bottom", fontsize=9)
    _tidy(axes)
    if full.max() / min(full.min(), held.min()) > LOG_RATIO * 2:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_minor_locator(NullLocator())
    _thousands(axes.yaxis)
    axes.set_xticks(places, [f"{row['length']:,}" for row in rows])
    axes.set_xlabel("Prompt (tokens)")
    axes.set_ylabel("KV cache of one sequence (MiB)")
    axes.legend(frameon=False, loc="upper left")
    return figure


def saved_percent(row: Record) -> float:
    """How much of the all-full bytes the allocated ones save, percent; below 0 where none."""
    return 100 * (1 - row["allocated_bytes"] / row["full_bytes"])


def schedule(is_full: Sequence[bool]) -> Figure:
    """The layers in a row from input to output: F full, S sparse."""
    figure, axes = _figure(7.2, 1.25)
    for layer, kind in enumerate(is_full):
        colour = BLUE if kind else "#E69F00"
        axes.add_patch(Rectangle((layer + 0.05, 0), 0.9, 1, facecolor=colour))
        ink = "white" if kind else "black"
        size = 9 if len(is_full) <= 40 else 5
        label = "F" if kind else "S"
        axes.text(layer + 0.5, 0.5, label, ha="center", va="center", color=ink, fontsize=size)
    every = max(1, -(-len(is_full) // 16))
    marks = range(0, len(is_full), every)
    axes.set_xticks([mark + 0.5 for mark in marks], [str(mark) for mark in marks])
    axes.set_xlim(0, len(is_full))
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("Layer, from input to output")
    full = sum(map(bool, is_full))
    counts = f"{full} of {len(is_full)} layers full (F), {len(is_full) - full} sparse (S)"
    axes.set_title(f"{describe_schedule(tuple(is_full))}: {counts}", fontsize=10)
    return figure


def visible_kinds(
    pattern: Pattern, length: int, cells: int, kv_head: int = 0, total_kv_heads: int = 1
) -> np.ndarray:
    """What the queries (rows) see of the keys, int [cells, cells], in a document of `length`.

    0 nothing, 1 strided block, 2 window, 3 sink tokens beyond it. A cell of several tokens shows
    the greatest that it holds, among queries and keys close enough to miss no block.
    """
    width = -(-length // cells)
    rows = min(8, width)
    columns = min(width, max(8, -(-width // pattern.block)))
    q = (torch.arange(cells * rows) * length // (cells * rows))[:, None]
    k = (torch.arange(cells * columns) * length // (cells * columns))[None, :]
    kinds = pattern.visible(q, k, kv_head, total_kv_heads).long()
    if pattern.is_full:
        kinds *= 2
    else:
        kinds[replace(pattern, stride=None).visible(q, k)] = 3
        kinds[replace(pattern, stride=None, sink_tokens=0).visible(q, k)] = 2
    return kinds.view(cells, rows, cells, columns).amax(dim=(1, 3)).numpy()


def patterns(
    examples: Sequence[tuple[str, Pattern, int, int]] = EXAMPLES, length: int = DRAWN_TOKENS
) -> Figure:
    """A panel per (title, pattern, KV head, KV heads): queries downwards, keys to the right."""
    columns = min(3, len(examples))
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(3.0 * columns, 3.1 * rows + 0.5), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    colours = ListedColormap([LIGHT, GREEN, BLUE, "#E69F00"])
    cells = min(length, DRAWN_CELLS)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(examples) :]:
        axes.set_visible(False)
    for axes, (title, pattern, head, heads) in zip(panels, examples, strict=False):
        kinds = visible_kinds(pattern, length, cells, head, heads)
        axes.imshow(kinds, cmap=colours, vmin=0, vmax=3, extent=(0, length, length, 0))
        if length <= DRAWN_TOKENS:
            axes.set_xticks(np.arange(length), minor=True)
            axes.set_yticks(np.arange(length), minor=True)
            axes.grid(True, which="minor", color="white", linewidth=0.5)
        axes.tick_params(which="both", length=0, labelsize=8)
        _positions(axes.xaxis, 2 * length)
        _positions(axes.yaxis, 2 * length)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("Key position (tokens)", fontsize=8)
    for axes in panels[::columns]:
        axes.set_ylabel("Query position (tokens)", fontsize=8)
    labels = (
        "not visible",
        "strided block",
        "window (all keys where full)",
        "sink tokens beyond it",
    )
    handles = [Patch(facecolor=colours(i), label=text) for i, text in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def lengths_of(rows: Sequence[Record]) -> list[Record]:
    """Of a table of kernels the rows of the case that was timed at the most lengths, if several."""
    cases: dict[tuple, list[Record]] = {}
    for row in rows:
        if row.get("tflops") is not None and row["documents"] == 1 and not row["deterministic"]:
            key = row["pattern"], row["heads"], row["kv_heads"], row["head_dim"]
            cases.setdefault(key, []).append(row)

    def lengths(found: list[Record]) -> int:
        return len({row["length"] for row in found})

    most = max(cases.values(), key=lengths, default=[])
    return most if lengths(most) > 1 else []


def speed_by_length(rows: Sequence[Record]) -> Figure:
    """TFLOP/s on the pattern's pairs by length, a panel per pass and a curve per backend."""
    rows = lengths_of(rows)
    figure = Figure(figsize=(8.4, 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    styles = dict(zip(backends, cycle(zip(CURVES, MARKERS, strict=True)), strict=False))
    lengths = sorted({row["length"] for row in rows})
    for axes, name in zip(panels, ("forward", "backward"), strict=True):
        for backend in backends:
            own = [row for row in rows if (row["backend"], row["pass"]) == (backend, name)]
            # Of a length measured in several groups, the best.
            points = sorted({row["length"] for row in own})
            speeds = [max(row["tflops"] for row in own if row["length"] == at) for at in points]
            colour, marker = styles[backend]
            line = "-" if len(points) > 1 else "none"
            axes.plot(points, speeds, marker, linestyle=line, color=colour, label=backend)
        _tidy(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{at // 1024}K" if at >= 1024 else f"{at}" for at in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.08 * max(row["tflops"] for row in rows))
        axes.set_xlabel("Tokens of the document")
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("TFLOP/s on the pattern's pairs")
    row = rows[0]
    title = f"{row['pattern']}, {row['heads']} heads ({row['kv_heads']} KV), head dim"
    figure.suptitle(f"{title} {row['head_dim']}", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": len(labels)}
    figure.legend(handles, labels, frameon=False, fontsize=8, **place)
    return figure


def several_lengths(rows: Sequence[Record]) -> bool:
    """Whether a table of training steps has rows of more than one length that were measured."""
    return len({row["length"] for row in rows if row.get("tokens_per_second_per_gpu")}) > 1


def training_speed_by_length(rows: Sequence[Record]) -> Figure:
    """Tokens per second and GPU by the row's tokens, a curve per arm, documents and mask."""
    figure, axes = _figure()
    curves: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if speed := row.get("tokens_per_second_per_gpu"):
            points = curves.setdefault((row["documents"], row["document_mask"], row["arm"]), {})
            points[row["length"]] = max(speed, points.get(row["length"], 0.0))
    kinds = list(dict.fromkeys(key[:2] for key in curves))
    styles = dict(zip(kinds, cycle(zip(LINES, MARKERS, strict=False)), strict=False))
    for (documents, mask, arm), points in curves.items():
        line, marker = styles[documents, mask]
        colour, inside = {"hybrid": (BLUE, BLUE), "full": (VERMILLION, "white")}[arm]
        label = f"{arm}, {DOCUMENTS.get(documents, f'documents of {documents}')}"
        label += "" if mask else ", no mask"
        style = {"linestyle": line, "marker": marker, "color": colour, "markerfacecolor": inside}
        axes.plot(*zip(*sorted(points.items()), strict=True), **style, markersize=5, label=label)
    _tidy(axes)
    lengths = sorted({length for points in curves.values() for length in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{at // 1024}K" if at >= 1024 else f"{at}" for at in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    _thousands(axes.yaxis)
    axes.set_xlabel("Tokens of the row")
    axes.set_ylabel("Tokens per second and GPU")
    axes.legend(frameon=False, fontsize=8)
    return figure


def save_pattern_pictures(folder: Path) -> None:
    """Write patterns.png, and schedule.png of LongGen's 7B: 12 full layers of 32."""
    folder.mkdir(parents=True, exist_ok=True)
    patterns().savefig(folder / "patterns.png")
    schedule([10 <= layer < 22 for layer in range(32)]).savefig(folder / "schedule.png")


if __name__ == "__main__":
    save_pattern_pictures(Path(sys.argv[1]))

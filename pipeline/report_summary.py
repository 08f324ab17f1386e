"""The result of a run in at most six lines, for the terminal and the top of its page."""

from __future__ import annotations

from pipeline import figures
from pipeline.records import Record, by_step, kv_rows, niah_cells, of_task, perplexity

# Of texts this many times as long as the old context, ...
LONG = 8
# ... what lies beyond so many times the old context is said.
FAR = 4


def summarise(
    metrics: list[Record],
    records: list[Record],
    old_context: int,
    trained: str | None = None,
    window: int | None = None,
    beside: dict[str, list[Record]] | None = None,
) -> list[str]:
    """The result in at most six lines.

    Args:
        old_context: tokens that the model looked back over before.
        trained: a line on what was trained, if anything was.
        window: of the sparse layers; needles within it tell nothing of what lies beyond.
        beside: records of other runs by their names, of which the needles are told.
    """
    lines = [trained] if trained else []
    validation = by_step(metrics, "validation")
    if validation:
        first, last = validation[0], validation[-1]
        lines.append(
            f"held-out loss {first['loss']:.4f} -> {last['loss']:.4f} nats per token "
            f"(step {first['step']:,} -> {last['step']:,})"
        )
    lines += _perplexities(of_task(records, "perplexity"), old_context)
    lines += _needles(records, window, beside or {})
    rows = kv_rows(records)
    if rows:
        row = rows[-1]
        lines.append(
            f"KV cache at {row['length']:,} tokens: {figures.saved_percent(row):.1f}% of the bytes "
            f"saved ({mib(row['allocated_bytes'])} of {mib(row['full_bytes'])} MiB)"
        )
    return lines


def mib(count: int) -> str:
    """Bytes in MiB, as tables show them."""
    return f"{count / figures.MIB:,.2f}"


def _perplexities(measured: dict[str, list[Record]], old_context: int) -> list[str]:
    """Perplexity far beyond the old context, and its ratio to that within it."""
    if not measured:
        return []
    longest = max(row["stop"] for rows in measured.values() for row in rows)
    far = longest >= LONG * old_context
    least = FAR * old_context if far else old_context
    beyond = {m: [r for r in rows if r["start"] >= least] for m, rows in measured.items()}
    within = {m: [r for r in rows if r["stop"] <= old_context] for m, rows in measured.items()}
    where = f"beyond the old context of {old_context:,} tokens"
    if far:
        where = f"at {FAR} to {longest / old_context:g} times the old context of {old_context:,}"
    if not all(beyond.values()):
        beyond, where = measured, "over all positions (none beyond the old context)"
        within = {}
    told = " -> ".join(f"{perplexity(rows):,.2f} ({m})" for m, rows in beyond.items())
    lines = [f"perplexity {where}: {told}"]
    if within and all(within.values()):
        ratios = {m: perplexity(beyond[m]) / perplexity(within[m]) for m in beyond}
        told = " -> ".join(f"{ratio:,.2f} ({m})" for m, ratio in ratios.items())
        lines.append(f"that, as a multiple of the perplexity within the old context: {told}")
    return lines


def _needles(
    records: list[Record], window: int | None, beside: dict[str, list[Record]]
) -> list[str]:
    """Mean scores of one needle, and of other runs' final models on the same prompts."""
    models = of_task(records, "niah")
    for run, rows in beside.items():
        models |= {run: [r for r in rows if r["task"] == "niah" and r["model"] == "final"]}
    models = {m: [r for r in rows if r.get("needles", 1) == 1] for m, rows in models.items()}
    found = {model: rows for model, rows in models.items() if rows}
    if not found:
        return []
    where = ""
    if window is not None:
        # Of how far a needle lay, older records say nothing.
        hidden = {
            model: [r for r in rows if r.get("distance", 0) > window]
            for model, rows in found.items()
        }
        if all(hidden.values()):
            found, where = hidden, f", further back than the window of {window:,}"
    cells = niah_cells([{**r, "model": model} for model, rows in found.items() for r in rows])
    lengths = sorted({length for table in cells.values() for length, _ in table})
    means = {model: sum(table.values()) / len(table) for model, table in cells.items()}
    own = " -> ".join(f"{m:.1f} ({model})" for model, m in means.items() if model not in beside)
    others = "".join(f", {means[run]:.1f} ({run})" for run in beside if run in means)
    return [
        f"needle in a haystack, {lengths[0]:,} to {lengths[-1]:,} tokens{where}: {own}{others} "
        "of 100"
    ]

"""report: one page and its pictures, made from the records and manifests of a run alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kernels.pattern import Pattern
from model.config import describe_schedule
from pipeline import figures
from pipeline.manifest import StageContext, read_manifest
from pipeline.records import (
    Record,
    by_step,
    kv_rows,
    perplexity_by_position,
    read_records,
)
from pipeline.report_page import Pictures, Section, Table, render
from pipeline.report_summary import mib, summarise
from pipeline.schema import Config
from pipeline.score_sections import (
    beside_folders,
    beside_ids,
    beside_records,
    comparison_section,
    niah_sections,
    short_section,
    task_section,
)
from pipeline.speed_sections import speed_sections
from pipeline.stages.evaluate import RECORDS
from pipeline.training.metrics import device_name
from pipeline.wandb_run import log_report, open_run, trained_run

# Seconds of work, of records that stay: where they or the runs beside have changed, made anew.
REMADE = True
# As many KV heads of a pattern that differs by head are drawn.
HEADS_DRAWN = 5


def inputs(config: Config) -> tuple[str, ...]:
    """All stages whose records or manifests are shown; an untrained export has no finetune."""
    trained = () if config.export.source == "convert" else ("finetune",)
    return ("fetch", "data_prep", "convert", *trained, "export", "evaluate")


INPUTS = inputs


def folder_name(config: Config) -> str:
    """`report`, or `report_NAME` of a suite."""
    return "_".join(filter(None, ("report", config.eval.name)))


def depends_on(config: Config) -> dict[str, Any]:
    """What the page names, the two lengths that its pictures mark, and the runs beside it."""
    return {
        "name": config.name,
        "variant": config.variant,
        "model": {"name": config.model.name, "max_positions": config.model.max_positions},
        "seq_length": config.data.seq_length,
        "beside": beside_ids(config),
    }


def parameters(export: Path) -> int:
    """Values in a folder's safetensors files; a tied embedding is stored, and counts, once."""
    total = 0
    for path in sorted(export.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    return total


def _trained_line(context: StageContext, exported: dict[str, Any]) -> str | None:
    """What was trained, in a line; None of an untrained export."""
    if "finetune" not in inputs(context.config):
        return None
    counts = (read_manifest(context.folder("finetune")) or {}).get("counts", {})
    if "tokens" not in counts:
        return None
    old, new = context.config.model.max_positions, exported["max_position_embeddings"]
    return (
        f"context {old:,} -> {new:,} tokens, layers "
        f"{describe_schedule(tuple(exported['is_full']))}: trained on {counts['tokens']:,} tokens "
        f"in {counts['steps']:,} steps"
    )


def _device(context: StageContext) -> str:
    """The GPU on which the run trained, or else this one; "CPU" where there is none."""
    if "finetune" in inputs(context.config):
        counts = (read_manifest(context.folder("finetune")) or {}).get("counts", {})
        if "device" in counts:
            return counts["device"]
    return device_name(torch.device(context.config.device))


def _facts(context: StageContext, exported: dict[str, Any]) -> Section:
    """What ran, from the manifests and the exported folder."""
    manifests = {
        stage: read_manifest(context.folder(stage)) or {} for stage in inputs(context.config)
    }
    counts = {stage: manifest.get("counts", {}) for stage, manifest in manifests.items()}
    model, pattern = context.config.model, Pattern(**exported["pattern"])
    rows = [
        ("Experiment", f"{context.config.name}, variant {context.config.variant}"),
        (
            "Model",
            f"{model.name}: {parameters(context.folder('export')):,} parameters, "
            f"{exported['num_hidden_layers']} layers, {exported['num_attention_heads']} heads, "
            f"{exported['num_key_value_heads']} KV heads, context before {model.max_positions:,}",
        ),
        ("Layers", describe_schedule(tuple(exported["is_full"]))),
        ("Rows", f"{context.config.data.seq_length:,} tokens"),
    ]
    if not all(exported["is_full"]):
        seen = f"{pattern.sink_tokens:,} sink tokens, a window of {pattern.window:,}"
        if pattern.stride:
            seen += f", every {pattern.stride}th block of {pattern.block}, {pattern.phase} phase"
        rows.insert(3, ("Sparse layers see", seen))
    prepared = counts["data_prep"]
    if "train" in prepared:
        rows.append(("Data", f"{prepared['train']['tokens']:,} tokens for training"))
    if "tokens" in counts.get("finetune", {}):
        trained = counts["finetune"]
        rows.append(("Trained on", f"{trained['tokens']:,} tokens in {trained['steps']:,} steps"))
    seconds = [
        f"{stage} {manifest['seconds']:,.1f}"
        for stage, manifest in manifests.items()
        if "seconds" in manifest
    ]
    rows.append(("Seconds", ", ".join(seconds)))
    for run, folder in beside_folders(context.config).items():
        rows += _facts_beside(run, folder.parent)
    used = manifests["evaluate"].get("versions", {})
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in used.items())))
    return Section("What ran", "As the stages' manifests say.", None, Table((), rows, facts=True))


def _facts_beside(run: str, folder: Path) -> list[tuple[str, str]]:
    """What another run trained, and how long its stages took."""
    manifests = {path.name: read_manifest(path) for path in sorted(folder.glob("*"))}
    trained = (manifests.get("finetune") or {}).get("counts", {})
    told = []
    if "schedule" in trained:
        told.append(f"layers {trained['schedule']}, {trained['tokens']:,} tokens")
    told += [
        f"{stage} {manifests[stage]['seconds']:,.1f} s"
        for stage in ("finetune", "export", "evaluate")
        if "seconds" in (manifests.get(stage) or {})
    ]
    return [(f"Beside: {run}", ", ".join(told))] if told else []


def _shape(exported: dict[str, Any], length: int, pictures: Pictures) -> list[Section]:
    """The schedule and the pattern as they were exported."""
    kinds, pattern = exported["is_full"], Pattern(**exported["pattern"])
    heads = exported["num_key_value_heads"]
    shown = [("Full layers", Pattern.full(), 0, 1)] if any(kinds) else []
    if not all(kinds) and pattern.heads_differ:
        shown += [
            (f"Sparse layers, KV head {head} of {heads}", pattern, head, heads)
            for head in range(min(heads, HEADS_DRAWN))
        ]
    elif not all(kinds):
        shown += [("Sparse layers", pattern, 0, 1)]
    drawn = figures.patterns(shown, length)
    return [
        Section(
            "Schedule of the layers",
            "Which layers see every earlier token, and which only the pattern's.",
            pictures.save("schedule", figures.schedule(kinds)),
        ),
        Section(
            "Patterns",
            f"What each query sees in a document of {length:,} tokens. A cell is coloured where "
            "any of its pairs is visible.",
            pictures.save("patterns", drawn),
        ),
    ]


def _training(metrics: list[Record], old_context: int, pictures: Pictures) -> list[Section]:
    """The loss by step and, on held-out rows, by position."""
    train, validation = by_step(metrics, "train"), by_step(metrics, "validation")
    sections = []
    if train:
        rows = [
            (
                f"{r['step']:,}",
                "not finite" if r["loss"] is None else f"{r['loss']:.4f}",
                f"{r['lr']:.2e}",
                "not finite" if r["grad_norm"] is None else f"{r['grad_norm']:.3f}",
                f"{r['tokens_per_second']:,.0f}",
            )
            for r in train
        ]
        left_out = [f"step {r['step']:,}: {r['skipped']}" for r in train if r.get("skipped")]
        said = f" Steps that were not taken: {'; '.join(left_out)}." if left_out else ""
        sections.append(
            Section(
                "Training loss",
                "Mean loss of each step's batch, and of the held-out rows at the steps at which "
                f"they were tried.{said}",
                pictures.save("training_loss", figures.training_loss(train, validation)),
                Table(("Step", "Loss", "LR", "Gradient norm", "Tokens/s"), rows),
            )
        )
    else:
        sections.append(Section("Training loss", "No training records: nothing was trained."))
    if validation:
        first, last = validation[0], validation[-1]
        late = {bucket["start"]: bucket["loss"] for bucket in last["by_position"]}
        rows = [
            (
                f"{b['start']:,} to {b['stop']:,}",
                f"{b['loss']:.4f}",
                f"{late[b['start']]:.4f}",
                f"{b['tokens']:,}",
            )
            for b in first["by_position"]
        ]
        sections.append(
            Section(
                "Held-out loss by position, before and after training",
                f"On the same held-out rows at step {first['step']:,} and at step "
                f"{last['step']:,}, by position within the document.",
                pictures.save(
                    "loss_by_position", figures.loss_by_position(validation, old_context)
                ),
                Table(
                    ("Position", f"Step {first['step']:,}", f"Step {last['step']:,}", "Tokens"),
                    rows,
                ),
            )
        )
    else:
        sections.append(
            Section("Held-out loss by position", "No validation records: nothing was trained.")
        )
    return sections


def _perplexity(
    records: list[Record], beside: dict[str, list[Record]], old_context: int, pictures: Pictures
) -> Section:
    tables = perplexity_by_position(records)
    for run, theirs in beside.items():
        if (found := perplexity_by_position(theirs)).get("final"):
            tables[run] = found["final"]
    if not tables:
        return Section(
            "Perplexity by position", "No perplexity records: eval.tasks does not name perplexity."
        )
    by_start = {model: {b.start: b for b in buckets} for model, buckets in tables.items()}
    longest = max(tables.values(), key=len)
    rows = [
        (
            f"{bucket.start:,} to {bucket.stop:,}",
            *(
                f"{mine[bucket.start].perplexity:,.2f}" if bucket.start in mine else ""
                for mine in by_start.values()
            ),
            f"{bucket.tokens:,}",
        )
        for bucket in longest
    ]
    documents = {record["document"] for record in records if record["task"] == "perplexity"}
    return Section(
        "Perplexity by position",
        f"On {len(documents)} whole held-out documents, exp of the mean loss of the tokens in "
        "each bucket of positions.",
        pictures.save(
            "perplexity_by_position", figures.perplexity_by_position(tables, old_context)
        ),
        Table(("Position", *tables, "Tokens"), rows),
    )


def _kv(records: list[Record], pictures: Pictures) -> Section:
    rows = kv_rows(records)
    if not rows:
        return Section("KV cache", "No kv_bytes records: eval.models does not name final.")
    cells = [
        (
            f"{row['length']:,}",
            mib(row["full_bytes"]),
            mib(row["allocated_bytes"]),
            mib(row["live_bytes"]),
            f"{figures.saved_percent(row):.1f}%",
        )
        for row in rows
    ]
    header = ("Prompt (tokens)", "Full (MiB)", "Allocated (MiB)", "Live (MiB)", "Saved")
    return Section(
        "KV cache",
        "Bytes of one sequence's keys and values after the prompt: measured on the exported "
        "model's own cache, beside those of the same model with every layer full.",
        pictures.save("kv_bytes", figures.kv_bytes(rows)),
        Table(header, cells),
    )


def run(context: StageContext) -> dict[str, Any]:
    """Write index.html, and each figure as PNG and SVG; the counts' "summary" says the result.

    Raises:
        StageError: on a broken line in metrics.jsonl or records.jsonl.
    """
    config, pictures = context.config, Pictures(context.out / "figures")
    trained = "finetune" in inputs(config)
    metrics = read_records(context.folder("finetune") / "metrics.jsonl") if trained else []
    evaluated = context.folder("evaluate")
    records = read_records(evaluated / RECORDS)
    counts = (read_manifest(evaluated) or {}).get("counts", {})
    skipped = counts.get("skipped", {}).get("short")
    exported = json.loads((context.folder("export") / "config.json").read_text())
    old_context = config.model.max_positions
    beside = beside_records(config)
    window = None if all(exported["is_full"]) else exported["pattern"]["window"]
    trained_line = _trained_line(context, exported)
    summary = summarise(metrics, records, old_context, trained_line, window, beside)
    sections = [
        _perplexity(records, beside, old_context, pictures),
        *niah_sections(records, beside, pictures),
        _kv(records, pictures),
        *_shape(exported, config.data.seq_length, pictures),
        *_training(metrics, old_context, pictures),
        task_section("ruler", records, pictures),
        task_section("babilong", records, pictures),
        short_section(records, skipped, pictures),
        comparison_section(config, records, pictures),
        _facts(context, exported),
        *speed_sections(pictures, _device(context)),
    ]
    # What there is nothing of comes last.
    sections.sort(key=lambda section: section.picture is None and section.table is None)
    told = _to_wandb(context, trained, sections)
    page = render(f"LongGen: {config.name}, {config.variant}", summary, sections)
    (context.out / "index.html").write_text(page, encoding="utf-8")
    return {"summary": summary, "figures": len(list(pictures.folder.glob("*.svg"))), **told}


def _to_wandb(context: StageContext, trained: bool, sections: list[Section]) -> dict[str, Any]:
    """The same pictures and tables in the run that training logged to, or in one of their own."""
    config = context.config
    finetune = context.folder("finetune") if trained else None
    run_id = trained_run(finetune) if finetune else None
    metrics = finetune / "metrics.jsonl" if finetune else None
    name = f"{config.name}/{config.variant}"
    run = open_run(config.wandb, context.out.parent, name, asdict(config), run_id, metrics)
    return {} if run is None else {"wandb_run": run.id, "logged": log_report(run, sections)}

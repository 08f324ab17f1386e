"""evaluate: tasks on the model as fetched and as exported, one record after another."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data_prep.shards import HeldOutDocuments
from pipeline.manifest import StageContext
from pipeline.records import Journal, read_records
from pipeline.schema import Config
from pipeline.stages.export import load_source
from pipeline.tasks import kv_bytes, niah, perplexity

INPUTS = ("fetch", "data_prep", "export")
RESUMABLE = True
TASKS = {"perplexity": perplexity, "niah": niah, "kv_bytes": kv_bytes}
LOG_SECONDS = 15.0


def depends_on(config: Config) -> dict[str, Any]:
    """The eval section: which tasks, models, lengths and seeds."""
    return {"eval": asdict(config.eval)}


def load_model(name: str, context: StageContext) -> Any:
    """The "base" (as fetched, every layer full) or "final" (as exported) model, on the device.

    On a GPU in the exported dtype, on a CPU in float32, in which a CPU is faster.
    """
    config = context.config
    on_cpu = config.device == "cpu" or config.export.dtype == "fp32"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    transformers_logging.disable_progress_bar()
    if name == "base":
        folder = context.folder("fetch") / "model"
        return load_source(folder, dtype, config.device, config.model.allow_pickle)
    model = AutoModelForCausalLM.from_pretrained(
        context.folder("export"), trust_remote_code=True, dtype=dtype
    )
    return model.to(config.device).eval()


def track(samples: Sequence[Any], label: str, log: logging.Logger) -> Iterator[Any]:
    """Yield the samples and say how far they are by tokens: a bar on a terminal, else lines."""
    total = sum(len(sample.tokens) for sample in samples)
    started = spoken = time.monotonic()
    done, console = 0, Console()
    columns = (
        TextColumn(label),
        BarColumn(),
        TextColumn("{task.percentage:.0f}% of {task.total:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total)
        for number, sample in enumerate(samples, 1):
            yield sample
            done += len(sample.tokens)
            bar.update(task, completed=done)
            now = time.monotonic()
            if not console.is_terminal and now - spoken >= LOG_SECONDS:
                spoken = now
                left = (now - started) * (total - done) / done
                log.info("%s: %d of %d samples, %.0f s left", label, number, len(samples), left)
    log.info("%s: %d samples in %.1f s", label, len(samples), time.monotonic() - started)


def run(context: StageContext) -> dict[str, Any]:
    """Write records.jsonl; samples that an earlier, killed run finished are kept.

    Raises:
        StageError: where the held-out documents do not suffice for a task (see the tasks).
    """
    section, log = context.config.eval, context.log
    # The base model's for both models, so that both see the same ids.
    tokenizer = AutoTokenizer.from_pretrained(context.folder("fetch") / "model")
    documents = HeldOutDocuments(context.folder("data_prep") / "held_out_documents")
    samples = {
        name: TASKS[name].build(section, tokenizer, documents)
        for name in (*section.tasks, "kv_bytes")
    }
    found = len(samples.get("perplexity", []))
    if "perplexity" in section.tasks and found < section.perplexity.documents:
        log.warning(
            "perplexity: only %d of %d documents: no more held-out ones have %d tokens",
            found,
            section.perplexity.documents,
            section.perplexity.min_length,
        )
    path = context.out / "records.jsonl"
    journal = Journal(path)
    if journal.done:
        log.info("%d samples were finished before and are kept", len(journal.done))
    for name in section.models:
        # Every layer of the base is full: its cache is what full_bytes says.
        tasks = [task for task in samples if task != "kv_bytes" or name == "final"]
        left = {
            task: [s for s in samples[task] if (name, task, s.key) not in journal.done]
            for task in tasks
        }
        if not any(left.values()):
            continue
        model = load_model(name, context)
        for task, mine in left.items():
            for sample in track(mine, f"{name} {task}", log):
                records = TASKS[task].score(sample, model, tokenizer, section)
                journal.append(name, task, sample.key, records)
        del model
    written = Counter(f"{r['model']} {r['task']}" for r in read_records(path))
    return {"records": dict(written)}

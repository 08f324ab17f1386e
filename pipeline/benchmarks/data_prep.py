"""Stage data_prep beside its peers: tokens per CPU second of whole runs over one corpus.

Each run is a program of its own, from its start to its end, so imports count. CPU seconds, user and
system, are those of its processes together: they hardly depend on what else the machine does, as
seconds by the clock would. Runs take turns, and ratios are of medians.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.benchmarks.data_prep_peers import PEERS
from pipeline.manifest import StageContext, StageError
from pipeline.schema import BenchmarkSection, Config

ROOT = Path(__file__).resolve().parents[2]
OURS = "data_prep"
COLUMNS = (
    "tokenizer",
    "engine",
    "tokens",
    "cpu_seconds",
    "cpu_seconds_all",
    "tokens_per_cpu_second",
    "ours_over_it",
    "ours_over_it_least",
    "peak_mib",
    "version",
)


@dataclass
class Runs:
    """What the repeated runs of one program over one corpus came to."""

    tokens: int = 0
    version: str = ""
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0


def measure(context: StageContext) -> tuple[dict[str, Any], int]:
    """(figures, 0): writes data_prep.csv, a row for each tokenizer and program."""
    bench, log = context.config.benchmark, context.log
    if not bench.corpus or not bench.tokenizers:
        raise StageError(
            f"benchmark.corpus={bench.corpus!r}, benchmark.tokenizers={bench.tokenizers}: must "
            "name a folder of .jsonl files, and model folders by name; set both, such as "
            "benchmark.corpus=/texts 'benchmark.tokenizers=[{name: llama2, path: /models/llama2}]'"
        )
    rows = []
    for tokenizer in bench.tokenizers:
        name, folder = tokenizer.name, Path(tokenizer.path).absolute()
        runs = {program: Runs() for program in (OURS, *PEERS)}
        for repeat in range(bench.repeats):
            for program, found in runs.items():
                with tempfile.TemporaryDirectory(dir=context.out) as scratch:
                    _run(program, found, bench, context.config, folder, Path(scratch))
                log.info(
                    f"{name}, {program}, {repeat + 1} of {bench.repeats}: "
                    f"{found.cpu_seconds[-1]:.1f} CPU s for {found.tokens:,} tokens"
                )
        rows += table(name, runs)
        with (context.out / "data_prep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        if row["ours_over_it"]:
            log.info(f"{row['tokenizer']}: {row['ours_over_it']} times {row['engine']}")
    return {"rows": rows}, 0


def table(name: str, runs: dict[str, Runs]) -> list[dict[str, Any]]:
    """Rows of COLUMNS for one tokenizer.

    Raises:
        StageError: when the programs did not do the same work.
    """
    ours = runs[OURS]
    own_speeds = [ours.tokens / seconds for seconds in ours.cpu_seconds]
    rows = []
    for program, found in runs.items():
        # Each adds its own tokens at a document's start or end.
        if abs(found.tokens / ours.tokens - 1) > 0.005:
            raise StageError(
                f"{name}: {program} made {found.tokens:,} tokens of the corpus, {OURS} "
                f"{ours.tokens:,}; must be the same within 0.5%; check that the folder's "
                "tokenizer.json is its tokenizer"
            )
        speeds = [found.tokens / seconds for seconds in found.cpu_seconds]
        speed = statistics.median(speeds)
        is_peer = program != OURS
        rows.append(
            {
                "tokenizer": name,
                "engine": program,
                "tokens": found.tokens,
                "cpu_seconds": round(statistics.median(found.cpu_seconds), 1),
                "cpu_seconds_all": " ".join(f"{seconds:.1f}" for seconds in found.cpu_seconds),
                "tokens_per_cpu_second": round(speed),
                "ours_over_it": round(statistics.median(own_speeds) / speed, 2) if is_peer else "",
                "ours_over_it_least": round(min(own_speeds) / max(speeds), 2) if is_peer else "",
                "peak_mib": round(found.peak_mib),
                "version": found.version,
            }
        )
    return rows


def _run(
    program: str, found: Runs, bench: BenchmarkSection, config: Config, model: Path, scratch: Path
) -> None:
    corpus = Path(bench.corpus).absolute()
    if program == OURS:
        keys = _own_keys(config, corpus, model, scratch)
        entry = [sys.executable, str(ROOT / "pipeline/run.py"), *keys]
        # fetch links the model's folder, and is no part of what is measured
        _spend([*entry, "stage=fetch"])
        _, seconds, peak = _spend([*entry, "stage=data_prep"])
        (manifest,) = (scratch / "artifacts/data_prep").glob("*/manifest.json")
        counts = json.loads(manifest.read_text())["counts"]
        found.tokens = sum(row["read"]["tokens"] for row in counts["sources"])
        found.version = counts["engine"]
    else:
        python = bench.peer_python or sys.executable
        script = str(ROOT / "pipeline/benchmarks/data_prep_peers.py")
        places = [str(corpus), str(model), str(scratch / "out")]
        told, seconds, peak = _spend([python, script, program, *places])
        answer = json.loads(told.splitlines()[-1])
        found.tokens, found.version = answer["tokens"], answer["version"]
    found.cpu_seconds.append(seconds)
    found.peak_mib = max(found.peak_mib, peak)


def _own_keys(config: Config, corpus: Path, model: Path, scratch: Path) -> list[str]:
    source = f"{{name: corpus, path: {json.dumps(str(corpus))}, format: jsonl}}"
    return [
        f"outputs={scratch}",
        "experiment=own",
        "device=cpu",
        f"model.source={model}",
        f"data.sources=[{source}]",
        f"data.seq_length={config.data.seq_length}",
        "data.tokens=null",
        "data.held_out=0.001",
        f"data.workers={config.data.workers or 'null'}",
    ]


def _spend(command: list[str]) -> tuple[str, float, float]:
    """Run a program: (what it printed, CPU seconds and peak MiB of its processes).

    Of several processes, the peak is the largest one's.
    """
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=errors, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        if process.returncode:
            errors.seek(0)
            told = (printed.read() + errors.read())[-2000:]
            raise StageError(
                f"`{' '.join(command[:3])} ...` ended with {process.returncode}: {told}; mend "
                "that; peers need benchmark.peer_python, a Python with datatrove, datasets and "
                "transformers"
            )
        return printed.read(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024

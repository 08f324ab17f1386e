"""Prompts and answers at a model's true shapes on random weights: the hybrid, the full, the stock.

Hybrid and full are one engine with the same weights and the same dense backend; stock is
transformers' Llama on those weights. Every row is measured alone: its cache is given back before
the next. Ranks of a tensor-parallel world (parallel.tensor processes) measure together.
"""

from __future__ import annotations

import csv
import gc
import time
from contextlib import suppress
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from kernels.dense import BY_NAME
from model.engine import Engine
from model.engine_weights import EngineWeights, ServingError, load_weights, random_reader
from model.modeling_longgen import LongGenConfig
from pipeline.benchmarks.backends_said import BackendsSaid
from pipeline.benchmarks.serving_plot import serving_by_length
from pipeline.benchmarks.serving_stock import StockLlama
from pipeline.benchmarks.train_rows import arm_shape
from pipeline.hf_folder import longgen_config
from pipeline.manifest import StageContext
from pipeline.schema import Config, ServingCase
from pipeline.serving import join_ranks

ARMS = ("hybrid", "full", "stock")
PACKAGES = ("torch", "triton", "transformers", "flash-attn-4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Tokens of a row's warm-up beyond its first chunk, so that both ways of attending are compiled.
BEYOND_A_CHUNK = 256
# A prompt that takes longer is not taken in again.
LONG_SECONDS = 15.0
COLUMNS = (
    "group",
    "arm",
    "length",
    "batch",
    "layers",
    "full_layers",
    "tensor",
    "prefill_chunk",
    "prefill_seconds",
    "prefill_seconds_least",
    "prefill_tokens_per_second",
    "decode_ms",
    "decode_ms_least",
    "decode_ms_most",
    "decode_tokens_per_second",
    "steps",
    "weight_bytes",
    "cache_live_bytes",
    "cache_live_bytes_by_pattern",
    "cache_allocated_bytes",
    "cache_device_bytes",
    "peak_allocated_bytes",
    "prefill_over",
    "decode_over",
    "dense_backend",
    "sparse_backend",
    "linears",
    "reason",
)
Row = dict[str, Any]


def check(config: Config) -> str | None:
    """What is wrong with the cases, with the remedy; None where they can be measured."""
    bench, parallel = config.benchmark, config.parallel
    for index, case in enumerate(bench.serving_cases):
        key = f"benchmark.serving_cases[{index}]"
        for name, least in (("length", 1), ("batch", 1), ("new_tokens", 2)):
            if getattr(case, name) < least:
                return f"{key}.{name}={getattr(case, name)}: must be at least {least}; set it"
        if not case.arms or set(case.arms) - set(ARMS):
            return f"{key}.arms={case.arms}: must name some of {', '.join(ARMS)}; set it"
    if bench.prefill_chunk < 1:
        return f"benchmark.prefill_chunk={bench.prefill_chunk}: must be at least 1; set it"
    if bench.dense_backend not in (None, *BY_NAME):
        legal = ", ".join(BY_NAME)
        return f"benchmark.dense_backend={bench.dense_backend!r}: must be null or one of {legal}"
    world = parallel.nodes * parallel.gpus_per_node
    if config.stage == "benchmark" and world != parallel.tensor:
        return (
            f"parallel.tensor={parallel.tensor} of {world} processes: one model is served, by all "
            f"of them; set parallel.tensor={world}"
        )
    return None


class Serving:
    """Measures row after row on the same weights."""

    def __init__(self, config: Config) -> None:
        self.config, self.bench = config, config.benchmark
        device, self.shard, self.group = join_ranks(torch.device(config.device))
        self.device = device
        self.dtype = DTYPES[self.bench.precision]
        self.weights: EngineWeights = load_weights(
            random_reader(device, self.bench.seed + self.shard.rank),
            self.arm("full"),
            self.dtype,
            device,
            self.shard,
        )

    def arm(self, name: str) -> LongGenConfig:
        """The configuration of an arm; a stock Llama is full."""
        shape = arm_shape(self.config, "hybrid" if name == "hybrid" else "full")
        return longgen_config(replace(shape, max_positions=2**30))

    def row(self, case: ServingCase, arm: str) -> Row:
        """A row of the table: what was measured, or why nothing was."""
        config = self.arm(arm)
        known = {
            "group": case.group,
            "arm": arm,
            "length": case.length,
            "batch": case.batch,
            "layers": config.num_hidden_layers,
            "full_layers": sum(config.is_full),
            "tensor": self.shard.size,
            "prefill_chunk": case.length if arm == "stock" else self.bench.prefill_chunk,
            "weight_bytes": self.weights.nbytes,
        }
        try:
            with BackendsSaid() as backends:
                if arm == "stock":
                    measured = self._stock(config, case)
                else:
                    measured = self._engine(config, case) | backends.columns()
                    # One that was asked for by name does not say so.
                    measured["dense_backend"] = (
                        measured["dense_backend"] or self.bench.dense_backend
                    )
            return known | measured
        except (ServingError, torch.OutOfMemoryError, MemoryError) as error:
            lines = str(error).strip().splitlines()
            return known | {"reason": f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]}
        finally:
            self._free()

    def _free(self) -> None:
        gc.collect()
        # After an error of the device even this fails.
        with suppress(RuntimeError):
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _allocated(self, peak: bool = False) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()

    def _prompts(self, case: ServingCase, tokens: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.bench.seed)
        vocabulary = self.config.model.vocab_size
        return list(torch.randint(vocabulary, (case.batch, tokens), generator=generator))

    def _seconds(self, call) -> float:
        self._wait()
        if self.group is not None:
            dist.barrier(group=self.group)
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def _prefills(self, call) -> list[float]:
        times = [self._seconds(call)]
        while len(times) < self.bench.repeats and times[0] < LONG_SECONDS:
            times.append(self._seconds(call))
        return times

    def _decodes(self, step, count: int) -> list[float]:
        """Milliseconds a step, of `repeats` runs of so many steps."""

        def steps() -> None:
            for _ in range(count):
                step()

        return [self._seconds(steps) * 1e3 / count for _ in range(self.bench.repeats)]

    def _engine(self, config: LongGenConfig, case: ServingCase) -> Row:
        bench = self.bench
        options = {"chunk": bench.prefill_chunk, "dense_backend": bench.dense_backend}
        engine = Engine(config, self.weights, self.shard, self.group, **options)
        # The first run of steps warms up.
        room = case.length + case.new_tokens * (bench.repeats + 1)
        prompts = self._prompts(case, case.length)
        warm = min(case.length, bench.prefill_chunk + BEYOND_A_CHUNK)
        before = self._allocated()
        engine.reserve(case.batch, room)
        cache_bytes = None if before is None else self._allocated() - before
        engine.prefill([prompt[:warm] for prompt in prompts[:1]] * case.batch)
        if before is not None:
            torch.cuda.reset_peak_memory_stats()

        def prefill() -> None:
            engine.reserve(case.batch, room)
            engine.prefill(prompts)

        prefills = self._prefills(prefill)
        live, allocated = engine.cache.live_bytes(), engine.cache.allocated_bytes()
        for _ in range(case.new_tokens):
            engine.decode()
        decodes = self._decodes(engine.decode, case.new_tokens)
        if not engine.logits_BV.isfinite().all():
            raise RuntimeError("logits that are not finite: the row would time nonsense")
        # By the definition, key by key; the positions of one row are those of all.
        token = 2 * self.config.model.head_dim * self.dtype.itemsize
        decoder = engine.decoder
        whole = config.num_key_value_heads
        heads = range(decoder.first_kv_head, decoder.first_kv_head + decoder.kv_heads)
        keys = {
            pattern: sum(len(pattern.live(case.length, head, whole)) for head in heads)
            for pattern in set(decoder.patterns)
        }
        by_pattern = case.batch * token * sum(keys[pattern] for pattern in decoder.patterns)
        return self._columns(case, prefills, decodes) | {
            "cache_live_bytes": live,
            "cache_live_bytes_by_pattern": by_pattern,
            "cache_allocated_bytes": allocated,
            "cache_device_bytes": cache_bytes,
            "linears": "; ".join(f"{name} {how}" for name, how in engine.linears.items()),
        }

    def _stock(self, config: LongGenConfig, case: ServingCase) -> Row:
        if self.shard.size > 1:
            raise ServingError("stock transformers is measured on one GPU; set parallel.tensor=1")
        stock = StockLlama(config, self.weights)
        ids = torch.stack(self._prompts(case, case.length)).to(self.device)
        room = case.length + case.new_tokens * (self.bench.repeats + 1)
        # Libraries initialise.
        stock.reserve(64)
        stock.forward(stock.forward(ids[:, : min(32, case.length)]))
        stock.cache = None
        self._free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        state = {}

        def prefill() -> None:
            stock.reserve(room)
            state["next"] = stock.forward(ids)

        def step() -> None:
            state["next"] = stock.forward(state["next"])

        prefills = self._prefills(prefill)
        for _ in range(case.new_tokens):
            step()
        decodes = self._decodes(step, case.new_tokens)
        return self._columns(case, prefills, decodes) | {
            "cache_allocated_bytes": stock.cache_bytes(),
            "dense_backend": "torch_sdpa",
        }

    def _columns(self, case: ServingCase, prefills: list[float], decodes: list[float]) -> Row:
        seconds, ms = median(prefills), median(decodes)
        return {
            "prefill_seconds": seconds,
            "prefill_seconds_least": min(prefills),
            "prefill_tokens_per_second": case.batch * case.length / seconds,
            "decode_ms": ms,
            "decode_ms_least": min(decodes),
            "decode_ms_most": max(decodes),
            "decode_tokens_per_second": case.batch * 1e3 / ms,
            "steps": case.new_tokens * self.bench.repeats,
            "peak_allocated_bytes": self._allocated(peak=True),
        }


def compare_arms(rows: list[Row]) -> list[str]:
    """Enter how many times faster the hybrid is than full; what to say of all the rows."""
    measured = {
        (row["length"], row["batch"], row["arm"]): row for row in rows if "decode_ms" in row
    }
    lines = []
    for (length, batch, arm), row in measured.items():
        full = measured.get((length, batch, "full"))
        if arm != "hybrid" or full is None:
            continue
        row["prefill_over"] = full["prefill_seconds"] / row["prefill_seconds"]
        row["decode_over"] = full["decode_ms"] / row["decode_ms"]
        saved = 100 * (1 - row["cache_live_bytes"] / full["cache_live_bytes"])
        lines.append(
            f"{length} tokens, batch {batch}: hybrid over full {row['prefill_over']:.2f}x in "
            f"prefill, {row['decode_over']:.2f}x in decode, cache {saved:.1f}% smaller"
        )
    for length in sorted({key[0] for key in measured}):
        best = {}
        for arm in ("hybrid", "full"):
            own = [row for (at, _, name), row in measured.items() if (at, name) == (length, arm)]
            best[arm] = max(own, key=lambda row: row["batch"], default=None)
        if None not in best.values() and best["hybrid"]["batch"] > best["full"]["batch"]:
            speeds = {arm: row["decode_tokens_per_second"] for arm, row in best.items()}
            lines.append(
                f"{length} tokens, each at its largest batch measured: hybrid "
                f"{speeds['hybrid']:.1f} tokens/s at {best['hybrid']['batch']}, full "
                f"{speeds['full']:.1f} at {best['full']['batch']}: "
                f"{speeds['hybrid'] / speeds['full']:.2f}x"
            )
    return lines


def in_words(row: Row) -> str:
    """A line for the log."""
    named = f"{row['arm']}, {row['length']} tokens, batch {row['batch']}"
    if "decode_ms" not in row:
        return f"{named}: not measured: {row['reason']}"
    return (
        f"{named}: prefill {row['prefill_seconds']:.2f} s, decode {row['decode_ms']:.2f} ms a "
        f"step, cache {row['cache_allocated_bytes'] / 1e9:.2f} GB"
    )


def _save(rows: list[Row], path, columns: Row) -> None:
    # Whole at every moment: a run that is killed keeps its rows.
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *columns))
        writer.writeheader()
        writer.writerows(
            {key: f"{x:.6g}" if isinstance(x, float) else x for key, x in (row | columns).items()}
            for row in rows
        )
    partial.replace(path)


def measure(context: StageContext) -> tuple[dict[str, Any], int]:
    """(figures, this process's rank): writes serving.csv row by row, and a plot by length."""
    from pipeline.stages.benchmark import machine

    config, bench = context.config, context.config.benchmark
    ends = time.monotonic() + 60 * bench.budget_minutes
    told = machine(config)
    columns = {"gpu": told["machine"], "commit": told["commit"], "date": told["date"]}
    columns |= {name: told["versions"].get(name) for name in PACKAGES}
    serving = Serving(config)
    rows: list[Row] = []
    cases = [case for group in bench.groups for case in bench.serving_cases if case.group == group]
    for case, arm in [(found, arm) for found in cases for arm in found.arms]:
        late = torch.tensor(int(time.monotonic() > ends), device=serving.device)
        if serving.group is not None:
            dist.all_reduce(late, group=serving.group)
        if late:
            reason = f"past the budget of {bench.budget_minutes:g} minutes"
            known = {"group": case.group, "arm": arm, "length": case.length, "batch": case.batch}
            rows.append(known | {"reason": reason})
        else:
            rows.append(serving.row(case, arm))
        lines = compare_arms(rows)
        if serving.shard.rank == 0:
            _save(rows, context.out / "serving.csv", columns)
            context.log.info("%s", in_words(rows[-1]))
    for line in lines:
        context.log.info("%s", line)
    if serving.shard.rank == 0 and len({row["length"] for row in rows if "decode_ms" in row}) > 1:
        for picture in ("png", "svg"):
            serving_by_length(rows).savefig(context.out / f"serving_by_length.{picture}")
    missing = sum("decode_ms" not in row for row in rows)
    measured = {"measured": len(rows) - missing, "not measured": missing, "rows": rows}
    return measured, serving.shard.rank

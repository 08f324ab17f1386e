"""The attention kernels and their peers in one table: milliseconds, TFLOP/s, bandwidth, memory.

A case is a pattern over documents of one length; its contenders take turns on the same inputs, each
checked against another before it is timed. FLOPs are of the pattern's pairs: forward 4 * head_dim
a pair and query head, backward 2.5 times that (as in FlashAttention's own benchmarks).
"""

from __future__ import annotations

import csv
import gc
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.pattern import Pattern
from pipeline import figures
from pipeline.benchmarks import attention_peers
from pipeline.benchmarks.attention_decode import make_caches, measure_decode
from pipeline.benchmarks.attention_peers import OURS, Attention, attention
from pipeline.benchmarks.stopwatch import Stopwatch
from pipeline.manifest import StageContext
from pipeline.schema import BenchmarkSection, KernelCase, PeerSetting

log = logging.getLogger("longgen")

PASSES = ("forward", "backward")
BACKWARD_FLOPS = 2.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# By how much two right results may differ: of 16-bit operands, and of float32's.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
# Of longer rows, the tokens at each end that are compared: whole copies would fill the GPU.
COMPARED = 65_536
MIB = 2**20
COLUMNS = (
    "group",
    "pattern",
    "documents",
    "length",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "deterministic",
    "backend",
    "pass",
    "ms",
    "ms_least",
    "ms_most",
    "tflops",
    "ps_per_pair",
    "gb_per_s",
    "share_of_copy",
    "peak_mib",
    "error",
    "checked_against",
    "setting",
    "tried",
    "reason",
)
Row = dict[str, Any]


def describe(pattern: Pattern) -> str:
    """The pattern in words."""
    if pattern.is_full:
        return "full"
    parts = [f"sink {pattern.sink_tokens}"] if pattern.sink_tokens else []
    parts.append(f"window {pattern.window}")
    if pattern.stride is not None:
        parts.append(f"stride {pattern.stride} x {pattern.block} {pattern.phase}")
    return " + ".join(parts)


def case_pattern(case: KernelCase) -> Pattern:
    """The pattern of a case; null is full attention."""
    return Pattern.full() if case.pattern is None else Pattern(**asdict(case.pattern))


@dataclass
class Contender:
    """A backend at one setting; by pass: what to call, how it compares, times, or why not."""

    backend: str
    setting: PeerSetting | None
    attention: Attention | None = None
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    against: dict[str, str] = field(default_factory=dict)
    peak: dict[str, float | None] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> dict[str, Any]:
        """What its setting sets."""
        if self.setting is None:
            return {}
        blocks = {"q_block": self.setting.q_block, "k_block": self.setting.k_block}
        return blocks | self.setting.options

    def fail(self, error: Exception, name: str = "forward") -> None:
        """Keeps in one line why a pass is left out; without a forward there is no backward."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        for left_out in PASSES[PASSES.index(name) :]:
            self.reasons.setdefault(left_out, reason)
            self.calls.pop(left_out, None)

    def disagree(self, name: str) -> None:
        """Leaves a pass out because of its error."""
        told = f"differs from {self.against[name]} by {self.error[name]:.1e}"
        self.fail(ArithmeticError(told), name)


def _ends(x: torch.Tensor) -> list[torch.Tensor]:
    return [x] if len(x) <= 2 * COMPARED else [x[:COMPARED], x[-COMPARED:]]


def _difference(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """||got - wanted|| / ||wanted||."""
    apart = sum((a.float() - b.float()).norm() ** 2 for a, b in zip(got, wanted, strict=True))
    return (apart / sum(b.float().norm() ** 2 for b in wanted)).sqrt().item()


class AttentionCase:
    """The inputs of one case and what runs on them."""

    def __init__(self, case: KernelCase, dtype: torch.dtype, device: torch.device, seed: int):
        self.case, self.device, self.pattern = case, device, case_pattern(case)
        self.tolerance = TOLERANCE[dtype]
        self.bounds = tuple(range(0, case.documents * case.length + 1, case.length))
        generator = torch.Generator(device).manual_seed(seed)
        shape = {"device": device, "dtype": dtype, "generator": generator}
        self.inputs = tuple(
            torch.randn(self.bounds[-1], heads, case.head_dim, **shape)
            for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
        )
        self.heads_first: tuple[torch.Tensor, ...] = ()
        # Of each pattern and pass, with what the others are compared.
        self.anchors: dict[tuple[Pattern, str], tuple[Contender, list]] = {}
        self.agreed: set[tuple[Pattern, str]] = set()

    def _inputs(self, attention: Attention) -> tuple[torch.Tensor, ...]:
        if not attention.heads_first:
            return self.inputs
        if not self.heads_first:
            self.heads_first = tuple(x.transpose(0, 1)[None].contiguous() for x in self.inputs)
        return self.heads_first

    def _memory(self, call: Callable[[], Any]) -> tuple[Any, float | None]:
        """What the call gives, and the bytes it took at most beside what stood before, in MiB."""
        if self.device.type != "cuda":
            return call(), None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / MIB

    def _compare(self, contender: Contender, results: dict[str, list]) -> None:
        pattern = contender.attention.pattern
        if pattern != self.pattern and (pattern, "forward") not in self.anchors:
            # A peer's own pattern: nobody else computes it unasked.
            ours = Contender(OURS[0], None)
            for name, wanted in self._results(ours, pattern).items():
                self.anchors[pattern, name] = ours, wanted
        for name, got in results.items():
            anchor, wanted = self.anchors.setdefault((pattern, name), (contender, got))
            if anchor is contender:
                continue
            error = max(_difference(*pair) for pair in zip(got, wanted, strict=True))
            contender.error[name], contender.against[name] = error, anchor.backend
            # Its own is the one to whom it is closest: another may be the one that is wrong.
            if error < anchor.error.get(name, math.inf):
                anchor.error[name], anchor.against[name] = error, contender.backend
            if error > self.tolerance:
                contender.disagree(name)
            else:
                self.agreed.add((pattern, name))

    def settle(self) -> None:
        """Leaves out those with whom others were compared and of whom none agreed."""
        for (pattern, name), (anchor, _) in self.anchors.items():
            if name in anchor.error and (pattern, name) not in self.agreed:
                anchor.disagree(name)
        self.anchors.clear()

    def _results(self, contender: Contender, pattern: Pattern) -> dict[str, list]:
        """Runs each pass once, which compiles it; copies of what is compared, where it succeeds."""
        case = self.case
        contender.attention = attention(
            *(contender.backend, contender.setting, pattern, self.bounds),
            *(case.heads, case.kv_heads, self.device),
        )
        heads_first = contender.attention.heads_first
        *leaves, d_out = self._inputs(contender.attention)
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, results = None, {}
        for name in PASSES:
            try:
                if name == "forward":
                    found = (out := contender.attention.attend(*leaves),)
                else:
                    found = torch.autograd.grad(out, leaves, d_out)
                if not all(x.isfinite().all() for x in found):
                    raise ArithmeticError("gives NaN or infinity")
            except Exception as error:
                contender.fail(error, name)
                break
            found = [x.detach()[0].transpose(0, 1) if heads_first else x.detach() for x in found]
            results[name] = [[part.clone() for part in _ends(x)] for x in found]
        return results

    def prepare(self, contender: Contender) -> None:
        """Compile, check, and keep a graph whose backward can be run again and again."""
        self._compare(contender, self._results(contender, self.pattern))
        if "forward" in contender.reasons:
            return
        attend = contender.attention.attend
        *leaves, d_out = self._inputs(contender.attention)
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, contender.peak["forward"] = self._memory(lambda: attend(*leaves))
        contender.calls["forward"] = lambda: attend(*leaves)

        def backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, leaves, d_out, retain_graph=True)

        if "backward" not in contender.reasons:
            contender.peak["backward"] = self._memory(backward)[1]
            contender.calls["backward"] = backward


@contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    """Deterministic where asked for, as train.deterministic sets it."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if deterministic:
        torch.use_deterministic_algorithms(True)
        # Filling every buffer is a debugging aid, not part of what is measured.
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _free() -> None:
    """Compiled functions and cached blocks of one case are of no use to the next."""
    attention_peers.block_mask.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _contenders(case: KernelCase, settings: list[PeerSetting]) -> list[Contender]:
    return [
        Contender(backend, setting)
        for backend in case.backends
        for setting in ([s for s in settings if s.peer == backend] or [None])
    ]


def _attention_row(case: AttentionCase, contenders: list[Contender], name: str) -> Row:
    """One backend's row of one pass: its best setting, and all that were tried."""
    timed = [c for c in contenders if name in c.times]
    row: Row = {"backend": contenders[0].backend, "pass": name}
    if len(contenders) > 1:
        row["tried"] = json.dumps(
            [
                c.label
                | (
                    {"ms": round(statistics.median(c.times[name]), 4)}
                    if name in c.times
                    else {"reason": c.reasons[name]}
                )
                for c in contenders
            ]
        )
    if not timed:
        return row | {"reason": contenders[0].reasons[name]}
    best = min(timed, key=lambda c: statistics.median(c.times[name]))
    ms, shape, pattern = statistics.median(best.times[name]), case.case, best.attention.pattern
    pairs = pattern.pairs([shape.length] * shape.documents, shape.kv_heads)
    pairs *= shape.heads // shape.kv_heads
    flops = 4 * shape.head_dim * pairs * (BACKWARD_FLOPS if name == "backward" else 1)
    return row | {
        "pattern": describe(pattern),
        "ms": round(ms, 4),
        "ms_least": round(min(best.times[name]), 4),
        "ms_most": round(max(best.times[name]), 4),
        "tflops": float(f"{flops / ms / 1e9:.4g}"),
        "ps_per_pair": float(f"{ms * 1e9 / pairs:.4g}"),
        "peak_mib": best.peak[name] and round(best.peak[name], 1),
        "error": best.error.get(name) and float(f"{best.error[name]:.2e}"),
        "checked_against": best.against.get(name),
        "setting": json.dumps(best.label) if best.label else None,
    }


def attention_rows(
    case: KernelCase, bench: BenchmarkSection, device: torch.device, late: Callable[[], bool]
) -> list[Row]:
    """Two rows, forward and backward, of each backend of the case."""
    watch = Stopwatch(device, bench.repeats, bench.launch_ms)
    contenders = _contenders(case, bench.settings)
    with _algorithms(case.deterministic):
        work = AttentionCase(case, DTYPES[bench.precision], device, bench.seed)
        for contender in contenders:
            if contender.backend not in OURS and late():
                budget = f"past the budget of {bench.budget_minutes:g} minutes"
                contender.fail(TimeoutError(budget))
                continue
            started = time.perf_counter()
            try:
                work.prepare(contender)
            except Exception as error:
                contender.fail(error)
            seconds = time.perf_counter() - started
            if seconds > 1:
                setting = contender.label or ""
                log.info("%s %s took %.0f s to prepare", contender.backend, setting, seconds)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        work.settle()
        for name in PASSES:
            calls = {i: c.calls[name] for i, c in enumerate(contenders) if name in c.calls}
            for i, times in watch.rounds(calls).items():
                if isinstance(times, Exception):
                    contenders[i].fail(times, name)
                else:
                    contenders[i].times[name] = times
    rows = []
    for backend in case.backends:
        own = [c for c in contenders if c.backend == backend]
        rows += [_attention_row(work, own, name) for name in PASSES]
    return rows


def decode_rows(case: KernelCase, bench: BenchmarkSection, device: torch.device) -> list[Row]:
    """One row of each backend of the case."""
    dtype = DTYPES[bench.precision]
    caches = make_caches(
        *(case_pattern(case), case.length, case.documents),
        *(case.heads, case.kv_heads, case.head_dim, dtype, device, bench.seed),
    )
    watch = Stopwatch(device, bench.repeats, bench.launch_ms)
    rows = []
    for backend, found in measure_decode(caches, case.backends, watch, TOLERANCE[dtype]).items():
        row: Row = {"backend": backend, "pass": "decode"} | found
        if "ms" in found:
            row["ms_least"], row["ms_most"] = min(found["ms"]), max(found["ms"])
            row["ms"] = statistics.median(found["ms"])
        short = {k: float(f"{v:.5g}") for k, v in row.items() if isinstance(v, float)}
        rows.append(row | short)
    return rows


def _in_words(row: Row) -> str:
    case = (
        f"{row['pattern']}, {row['documents']} x {row['length']:,}, "
        f"{row['heads']}/{row['kv_heads']} x {row['head_dim']}"
    )
    case += ", deterministic" if row["deterministic"] else ""
    if row.get("ms") is None:
        return f"{case}: {row['backend']} {row['pass']}: not measured: {row['reason']}"
    figure = f"{row['ms']:.3f} ms"
    if "tflops" in row:
        figure += f", {row['tflops']:.0f} TFLOP/s"
    if "gb_per_s" in row:
        figure += f", {row['gb_per_s']:.0f} GB/s"
    if "share_of_copy" in row:
        figure += f", {row['share_of_copy']:.1%} of a copy's"
    return f"{case}: {row['backend']} {row['pass']}: {figure}"


def against_peers(rows: list[Row]) -> list[str]:
    """A line for each case and pass in which ours and a peer ran over the same pattern."""
    lines, keys = [], (*COLUMNS[: COLUMNS.index("backend")], "pass")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if "tflops" in row:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for group in groups.values():
        ours = [row for row in group if row["backend"] in OURS]
        peers = [row for row in group if row["backend"] not in OURS]
        if ours and peers:
            best, peer = (min(x, key=lambda row: row["ms"]) for x in (ours, peers))
            lines.append(f"{_in_words(best)}, {peer['ms'] / best['ms']:.2f}x {peer['backend']}")
    return lines


def save_table(rows: list[Row], path: Path, columns: dict[str, Any]) -> None:
    """The rows as CSV; `columns` are the same in each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *columns))
        writer.writeheader()
        writer.writerows(row | columns for row in rows)


def measure(context: StageContext) -> tuple[dict[str, Any], int]:
    """(figures, 0): writes kernels.csv case by case, and a plot by length."""
    from pipeline.stages.benchmark import machine

    bench, device = context.config.benchmark, torch.device(context.config.device)
    ends = time.monotonic() + 60 * bench.budget_minutes
    told = machine(context.config)
    columns = {"gpu": told["machine"], "commit": told["commit"], "date": told["date"]}
    columns |= {name: told["versions"].get(name) for name in ("torch", "triton", "flash-attn-4")}
    rows: list[Row] = []
    for case in (case for group in bench.groups for case in bench.cases if case.group == group):
        shared = {key: value for key, value in asdict(case).items() if key in COLUMNS}
        shared |= {"pattern": describe(case_pattern(case)), "dtype": bench.precision}
        try:
            if case.group == "decode":
                found = decode_rows(case, bench, device)
            else:
                found = attention_rows(case, bench, device, lambda: time.monotonic() > ends)
        except RuntimeError as error:
            # Out of memory for the inputs themselves: the other cases go on.
            reason = str(error).splitlines()[0]
            found = [{"backend": name, "pass": "", "reason": reason} for name in case.backends]
        _free()
        for row in found:
            rows.append(shared | row)
            context.log.info("%s", _in_words(rows[-1]))
        save_table(rows, context.out / "kernels.csv", columns)
    for picture in ("png", "svg") if figures.lengths_of(rows) else ():
        figures.speed_by_length(rows).savefig(context.out / f"kernels_by_length.{picture}")
    lines = against_peers(rows)
    for line in lines:
        context.log.info("%s", line)
    missing = sum(row.get("ms") is None for row in rows)
    return {"measured": len(rows) - missing, "not measured": missing, "rows": rows}, 0

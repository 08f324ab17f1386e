"""Whole training steps on random weights of true shapes: the hybrid against the full model.

A step is Trainer.step, as finetune takes it: one row's transfer, forward, backward, clipping and
the optimizer's update. Arms take turns on one engine, on the same rows; it is trained on from case
to case, so losses of two cases do not compare. first_loss of a run's first row is that of the drawn
weights, the same on every layout that has its rows.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import _lru_cache_wrapper, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist

from model.config import ModelConfig
from pipeline import figures
from pipeline.benchmarks.backends_said import BackendsSaid
from pipeline.benchmarks.train_rows import (
    PEAKS,
    TIMES,
    TRAIN_KEYS,
    RandomRows,
    Row,
    arm_shape,
    case_columns,
    case_config,
    compare_arms,
    document_lengths,
    in_words,
    measured_columns,
    save_table,
)
from pipeline.manifest import StageContext
from pipeline.schema import Config, TrainCase, TrainSection
from pipeline.training.layout import Layout

log = logging.getLogger("longgen")

WARM_UP = 1
# Whose versions are columns.
PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "flash-attn-4")
# Standard deviation of the weights, as Llama's and GPT-2's are drawn; those that write to the
# residual stream get it divided by sqrt(2 * layers) (GPT-2).
DEVIATION = 0.02
TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def set_arm(model: torch.nn.Module, shape: ModelConfig) -> None:
    """Give each layer of a built HybridGPT the pattern and the RoPE that it has in `shape`."""
    from model.layer_spec import FULL, SPARSE, HybridSelfAttention

    for module in model.modules():
        if isinstance(module, HybridSelfAttention):
            layer = module.layer_number - 1
            module.rope_kind = FULL if shape.is_full[layer] else SPARSE
            module.core_attention.pattern = shape.pattern_of(layer)


def set_memory(model: torch.nn.Module, train: TrainSection) -> None:
    """Let a built HybridGPT keep for its backward what build_model would let it keep.

    Host buffers are new ones: those of rows of another length would stay beside them.
    """
    from model.kept import KeptTensors

    memory = model.memory
    memory.kept.clear()
    memory.kept = KeptTensors(train.offload_activations)
    memory.recompute, memory.mlp_tile = train.recompute, train.mlp_tile


def fill_random(engine, shape: ModelConfig, layout: Layout, seed: int) -> None:
    """Draw masters and weights on the device, the same for every layout: whole tensors, each by the
    seed and its name, of which a rank keeps its blocks."""
    from model.mapping import megatron_shape
    from pipeline.training.checkpoint import fill_masters

    # Blocks of one tensor follow each other.
    @lru_cache(maxsize=1)
    def drawn(name: str) -> torch.Tensor:
        size = megatron_shape(name, shape)
        if len(size) == 1:
            return torch.ones(size)
        deviation = DEVIATION
        if name.endswith(TO_RESIDUAL):
            deviation /= math.sqrt(2 * shape.num_layers)
        own = torch.Generator(layout.device).manual_seed(crc32(f"{seed} {name}".encode()))
        return torch.randn(size, generator=own, device=layout.device).mul_(deviation)

    fill_masters(engine, shape, layout, lambda name, within: drawn(name)[within])


class StepClock:
    """One clock around a step, synchronised at its two ends, and the edges of the step's parts.

    Edges are CUDA events, waited for at the step's end alone, and on a CPU the wall clock. Where
    the training loop itself waits, as for the loss before the optimizer, is part of the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.edges: list[Any] = []

    def mark(self) -> None:
        """One part ends, the next begins."""
        if not self.on_gpu:
            self.edges.append(time.perf_counter())
            return
        self.edges.append(torch.cuda.Event(enable_timing=True))
        self.edges[-1].record()

    def time(self, step: Callable[[], Any]) -> tuple[list[float], Any]:
        """(seconds in the order of TIMES, what the step gives); it marks its inner edges."""
        self.edges.clear()
        self._finish()
        started = time.perf_counter()
        self.mark()
        result = step()
        self.mark()
        self._finish()
        seconds = [time.perf_counter() - started]
        for start, stop in pairwise(self.edges):
            seconds.append(start.elapsed_time(stop) / 1e3 if self.on_gpu else stop - start)
        if len(seconds) != len(TIMES):
            raise RuntimeError(
                f"a step of {len(seconds) - 1} parts: must be {', '.join(TIMES[1:])}; one backward "
                "and one optimizer step; set train.rows_per_step to one row a group"
            )
        return seconds, result

    def _finish(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


class TimedEngine:
    """A DeepSpeedEngine that marks where backward and optimizer begin, and otherwise is itself.

    What is before backward, reading and transfer of the row among it, counts as forward; clipping
    counts as optimizer.
    """

    def __init__(self, engine, mark: Callable[[], None]) -> None:
        self._engine, self._mark = engine, mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        return self._engine(*batch)

    def backward(self, loss: torch.Tensor) -> Any:
        """Its backward, behind an edge."""
        self._mark()
        return self._engine.backward(loss)

    def step(self) -> Any:
        """Its step, behind an edge."""
        self._mark()
        return self._engine.step()


class TrainSteps:
    """Measures case after case on one engine, which it builds again only where it must."""

    def __init__(self, config: Config, layout: Layout, folder: Path) -> None:
        self.config, self.layout, self.folder = config, layout, folder
        self.engine = None
        self.offloads: bool | None = None
        # Row length and memory keys of the engine's last case, and the steps it has taken.
        self.keeps: tuple | None = None
        self.taken = 0
        # Of an engine that could not be built, why: by whether it offloads.
        self.unbuilt: dict[bool, str] = {}

    def row(self, case: TrainCase, arm: str) -> Row:
        """A row of the table: what was measured, or why nothing was.

        Ranks run out of memory alike. Where one alone does, the others wait for it in vain, and the
        process groups' timeouts end the run; the rows before are in the table.
        """
        known, config = case_columns(self.config, case, arm), case_config(self.config, case)
        offloads = config.parallel.optimizer_offload
        if offloads in self.unbuilt:
            return known | {"reason": self.unbuilt[offloads]}
        try:
            return known | self._measured(known, config, case)
        except Exception as error:
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
            if not isinstance(error, torch.OutOfMemoryError | MemoryError):
                log.warning("%s", reason, exc_info=True)
        if self.engine is None:
            self.unbuilt[offloads] = reason
        # It may have stopped in the middle of a step.
        self.drop_engine()
        return known | {"reason": reason}

    def drop_engine(self) -> None:
        """Let go of the engine and all that it holds."""
        engine, self.engine, self.keeps = self.engine, None, None
        # After an error of the device even this fails.
        with suppress(RuntimeError):
            if engine is not None:
                engine.module.memory.kept.clear()
                engine.destroy()
            del engine
            _forget_modules()
            _free(self.layout.device)

    def _prepare(self, config: Config, shape: ModelConfig) -> None:
        """An engine for this case, its weights drawn where it is a new one."""
        from pipeline.training.engine import build_engine, build_model

        offloads = config.parallel.optimizer_offload
        if self.engine is not None and self.offloads != offloads:
            self.drop_engine()
        if self.engine is None:
            started = time.perf_counter()
            model = build_model(config, shape, self.layout)
            self.engine = build_engine(model, config.train, config.parallel, self.layout)
            self.offloads, self.taken = offloads, 0
            fill_random(self.engine, shape, self.layout, self.config.benchmark.seed)
            log.info("engine built in %.1f s", time.perf_counter() - started)
        set_arm(self.engine.module, shape)
        # Pinning takes longer than a step, so arms of one case share their buffers.
        keeps = config.data.seq_length, *(getattr(config.train, key) for key in TRAIN_KEYS)
        if self.keeps != keeps:
            set_memory(self.engine.module, config.train)
            self.keeps = keeps

    def _measured(self, known: Row, config: Config, case: TrainCase) -> Row:
        from pipeline.training.loader import Loader
        from pipeline.training.loop import Trainer

        layout, bench, train = self.layout, self.config.benchmark, config.train
        shape = arm_shape(config, known["arm"])
        self._prepare(config, shape)
        lengths = document_lengths(case, bench)
        rows = RandomRows(lengths, shape.vocab_size, bench.seed)
        clock = StepClock(layout.device)
        trainer = Trainer(
            TimedEngine(self.engine, clock.mark),
            *(layout, shape, train, Loader.of(rows, train, layout), rows),
            metrics=None,
            checkpointer=None,
            folder=self.folder,
        )
        _free(layout.device)
        _forget_peaks(layout.device)
        times, losses, before = [], [], []
        with BackendsSaid() as backends:
            for number in range(WARM_UP + (case.steps or bench.repeats)):
                consumed = number * train.rows_per_step
                dist.barrier(group=layout.host_group)
                seconds, told = clock.time(lambda at=consumed: trainer.step(self.taken, at))
                self.taken += 1
                if number < WARM_UP:
                    before.append(told["loss"])
                else:
                    times.append(seconds)
                    losses.append(told["loss"])
        # The slowest rank's times, the fullest one's memory.
        slowest, fullest = (
            torch.tensor(found, dtype=torch.float64) for found in (times, _peaks(layout.device))
        )
        for found in (slowest, fullest):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=layout.host_group)
        peaks = [None if peak < 0 else int(peak) for peak in fullest.tolist()]
        gpu = torch.cuda.get_device_name() if layout.device.type == "cuda" else "CPU"
        return {
            "first_loss": f"{before[0]:.6f}",
            **measured_columns(known, slowest.tolist(), losses, gpu),
            **dict(zip(PEAKS, peaks, strict=True)),
            **backends.columns(),
        }


def _forget_modules() -> None:
    """Empty what DeepSpeed's ZeRO 3 keeps of an engine's modules beyond its end."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    # Arguments of cached calls.
    for found in gc.get_objects():
        if type(found) is _lru_cache_wrapper and found.__module__.startswith("deepspeed."):
            found.cache_clear()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # Pinned memory too is cached, by size.
        torch._C._host_emptyCache()


def _forget_peaks(device: torch.device) -> None:
    # Linux forgets the peak of resident memory so; elsewhere it stays the whole process's.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_peak_host_memory_stats()


def _peaks(device: torch.device) -> list[int]:
    """PEAKS of this process; -1 for what a CPU has not."""
    from pipeline.training.metrics import peak_resident_bytes

    if device.type != "cuda":
        return [-1, -1, peak_resident_bytes(), -1]
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", -1)
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return [*found, peak_resident_bytes(), pinned]


def in_order(config: Config) -> list[tuple[TrainCase, str]]:
    """The wanted groups' cases and their arms, as they stand; those of one engine together."""
    bench = config.benchmark
    cases = [case for group in bench.groups for case in bench.train_cases if case.group == group]

    def offloads(case: TrainCase) -> bool:
        return case_config(config, case).parallel.optimizer_offload

    # Stable: by where the first case of the same engine stands.
    first = list(map(offloads, cases)).index
    cases.sort(key=lambda case: first(offloads(case)))
    return [(case, arm) for case in cases for arm in case.arms]


def measure(context: StageContext) -> tuple[dict[str, Any], int]:
    """(figures, this process's rank): writes train_step.csv row by row, and a plot by length."""
    from pipeline.stages.benchmark import machine

    config, bench = context.config, context.config.benchmark
    ends = time.monotonic() + 60 * bench.budget_minutes
    layout = Layout(config.parallel, torch.device(config.device))
    told = machine(config)
    columns = {"gpu": told["machine"], "commit": told["commit"], "date": told["date"]}
    columns |= {name: told["versions"].get(name) for name in PACKAGES}
    steps = TrainSteps(config, layout, context.out)
    rows: list[Row] = []
    for case, arm in in_order(config):
        if layout.largest(int(time.monotonic() > ends)):
            late = f"past the budget of {bench.budget_minutes:g} minutes"
            rows.append(case_columns(config, case, arm) | {"reason": late})
        else:
            rows.append(steps.row(case, arm))
        lines = compare_arms(rows)
        if layout.rank == 0:
            save_table(rows, context.out / "train_step.csv", columns)
            context.log.info("%s", in_words(rows[-1]))
    steps.drop_engine()
    for line in lines:
        context.log.info("%s", line)
    if layout.rank == 0 and figures.several_lengths(rows):
        for picture in ("png", "svg"):
            name = f"train_step_by_length.{picture}"
            figures.training_speed_by_length(rows).savefig(context.out / name)
    missing = sum("step_seconds" not in row for row in rows)
    measured = {"measured": len(rows) - missing, "not measured": missing, "rows": rows}
    return measured, layout.rank

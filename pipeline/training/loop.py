"""The training loop: steps, validation, checkpoints, and the edges at which a run may stop."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from model.config import ModelConfig
from model.cost import peak_flops, training_flops
from model.loss import IGNORED
from pipeline.manifest import STOPPED_BY_FILE, StageStopped
from pipeline.progress import Reporter, pairs
from pipeline.schema import TrainSection
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.checkpoint_folder import saved_step
from pipeline.training.engine import inner_optimizer, learning_rate
from pipeline.training.guards import StepGuard, StopRequest
from pipeline.training.layout import Layout
from pipeline.training.loader import Batch, Loader, Rows, collate
from pipeline.training.metrics import (
    Metrics,
    PositionLosses,
    device_name,
    peak_resident_bytes,
)
from pipeline.training.profiler import traced
from pipeline.training.watchdog import Watchdog

log = logging.getLogger("longgen.training")

# A run's folder holds this file where it is to save and stop.
TRIGGER = "stop"
# ... and this one once it has: torchrun's own exit code does not tell it from a failure.
STOPPED = "stopped"
# What a rank asks the others for where its save in the background has failed: above any signal.
SAVE_FAILED = 1000
# How many times train.hang_seconds what compiles kernels or writes to disk may take.
LONG = 10
# Seconds by which process groups wait longer than the watchdog, which needs up to 200 to end a run.
MARGIN = 300


class Trainer:
    """One run: an engine, its rows, and the record it keeps in `folder`."""

    def __init__(
        self,
        engine,
        layout: Layout,
        config: ModelConfig,
        train: TrainSection,
        loader: Loader,
        held_out: Rows,
        metrics: Metrics | None,
        checkpointer: Checkpointer,
        folder: Path,
    ) -> None:
        """`metrics`: on rank 0, which alone keeps the record."""
        self.engine, self.layout, self.config, self.train = engine, layout, config, train
        self.loader, self.held_out, self.metrics = loader, held_out, metrics
        self.checkpointer, self.folder = checkpointer, folder
        # The step that the run starts after, and the one that is at work or was the last.
        self.first = self.current = 0
        self.reporter = Reporter(log, shown=layout.rank == 0)
        self.peak = peak_flops(device_name(layout.device))
        self.guard = StepGuard(
            non_finite=train.non_finite,
            spike_sigmas=train.spike_sigmas,
            spike_window=train.spike_window,
        )
        inner_optimizer(engine).refuses = lambda: self.guard.refuses(
            float(engine.optimizer._global_grad_norm)
        )
        if train.hang_seconds:
            # A group that gave up first would end its rank before it is known which one is behind.
            layout.set_timeouts(LONG * train.hang_seconds + MARGIN)
        self.watchdog = Watchdog(train.hang_seconds, layout.rank, layout.size, layout.store, folder)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        batch = batch.to(self.layout.device)
        losses = self.engine(batch.tokens_BS, batch.positions_BS, batch.cu_seqlens, batch.labels_BS)
        return losses, batch

    def _record(self, record: dict) -> None:
        if self.metrics:
            self.metrics.write(record)

    def validate(self, step: int) -> None:
        """Held-out loss by position in the document, on the same rows every time."""
        layout = self.layout
        rows = min(self.train.validation_rows, len(self.held_out))
        length = len(self.held_out[0][0])
        losses = PositionLosses(self.train.position_bucket, length, layout.device)
        started = time.perf_counter()
        log.info("finetune: validation starts %s", pairs({"step": step, "rows": rows}))
        self.engine.eval()
        with torch.no_grad(), self.reporter.task("finetune: validation") as update:
            # All ranks go through as many forwards; beyond the last row they count nothing.
            for first in range(0, rows, layout.rows_size):
                self._beat(f"step {step}: validation row {first}", long=True)
                row = first + layout.rows_rank
                batch = collate([self.held_out[min(row, rows - 1)]], self.train.document_mask)
                values, batch = self._forward(batch.shard(layout.ulysses_rank, layout.ulysses_size))
                counts = (
                    batch.labels_BS != IGNORED
                    if row < rows
                    else batch.labels_BS.new_zeros(batch.labels_BS.shape, dtype=torch.bool)
                )
                losses.add(values, batch.positions_BS, counts)
                done = min(first + layout.rows_size, rows)
                values = {"step": step, "row": done, "of_rows": rows}
                update(done / rows, f"row {done} of {rows}", values)
        self.engine.train()
        layout.sum(losses.sums)
        record = {"kind": "validation", "step": step, "loss": losses.loss()}
        self._record({**record, "by_position": losses.by_position()})
        values = {"step": step, "loss": f"{record['loss']:.4f}", "rows": rows}
        log.info(
            "finetune: validation %s", pairs(values | {"seconds": time.perf_counter() - started})
        )

    def step(self, step: int, consumed: int) -> dict[str, float]:
        """One optimizer step from the rows after `consumed`; what it measured.

        Each micro-batch contributes sum(token losses) * group size * accumulation / valid tokens
        of the whole global batch: DeepSpeed divides by group size and accumulation.
        """
        started = time.perf_counter()
        number = step + 1
        first = number <= self.first + 1
        self._beat(f"step {number}: reading rows")
        batches = self.loader.step(consumed)
        waited = time.perf_counter() - started
        device = self.layout.device
        valid = torch.tensor(sum(b.valid_tokens for b in batches), device=device)
        valid = self.layout.sum(valid).clamp(min=1)
        scale = self.layout.get_data_parallel_world_size() * len(batches) / valid
        rate = learning_rate(self.train, step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), dtype=torch.float64, device=device)
        lengths = []
        for index, batch in enumerate(batches):
            self._beat(f"step {number}: forward {index}", first)
            losses, batch = self._forward(batch)
            summed = losses.float().sum()
            total += summed.detach()
            self._beat(f"step {number}: backward {index}", first)
            self.engine.backward(summed * scale)
            if self.engine.is_gradient_accumulation_boundary():
                # Only now, when the device has been given all its work, is it waited for.
                loss = (self.layout.sum(total.clone()) / valid).item()
                self.guard.check_loss(number, loss)
            self._beat(f"step {number}: optimizer {index}", first)
            self.engine.step()
            lengths += batch.lengths
        norm = float(self.engine.get_global_grad_norm())
        # Asked here too: where the norm is not finite, DeepSpeed leaves out the update itself.
        self.guard.refuses(norm)
        skipped = self.guard.finish(number)
        if skipped:
            log.warning('finetune: skipped step=%d reason="%s"', number, skipped)
        seconds = time.perf_counter() - started
        tokens = self.train.rows_per_step * batches[0].tokens_BS.shape[1]
        tokens *= self.layout.ulysses_size
        sharing = self.layout.tensor_size * self.layout.ulysses_size
        flops = training_flops(self.config, lengths) / sharing / seconds
        on_gpu = device.type == "cuda"
        return {
            "loss": loss if math.isfinite(loss) else None,
            "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped": skipped,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / self.peak if self.peak else None,
            "memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
            "seconds": seconds,
            "data_wait": waited / seconds,
        }

    def _traced(self, number: int):
        """Of the step of that number a trace is written, where the configuration asks for one."""
        if number != self.train.profile_step or self.layout.rank != 0:
            return nullcontext()
        return traced(self.folder / f"trace_step_{number}.json.gz")

    def _beat(self, what: str, long: bool = False) -> None:
        self.watchdog.beat(what, LONG * self.train.hang_seconds if long else None)

    def save(self, step: int, consumed: int) -> None:
        """A checkpoint of where the run stands."""
        self._beat(f"step {step}: saving", long=True)
        run_id = self.metrics.run_id if self.metrics else None
        at = checkpoint.Progress(
            step, consumed, run_id, self.guard.state(), of_steps=self.train.steps
        )
        blocked = self.checkpointer.save(at)
        log.info("finetune: saving step=%d blocked_seconds=%.2f", step, blocked)

    def run(self, start: checkpoint.Progress) -> None:
        """Train from `start` to the last step.

        Raises:
            StageStopped: a signal came to a rank, or the trigger file: the step was finished and
                saved.
            StageError: a save failed; noticed after the step at whose end a rank knew.
        """
        with self.watchdog, self.reporter:
            try:
                self._run(start)
            finally:
                self.checkpointer.close()

    def _run(self, start: checkpoint.Progress) -> None:
        step, consumed = start.step, start.rows_consumed
        last, self.first = self.train.steps, step
        if self.layout.rank == 0:
            (self.folder / STOPPED).unlink(missing_ok=True)
        if start.guard:
            self.guard.restore(start.guard)
        if self.layout.device.type == "cuda":
            log.info("finetune: compiling kernels, the first forward and step take longer")
        if step == 0:
            self.validate(0)
        with (
            StopRequest(self.folder / TRIGGER, self._acknowledge) as stop,
            self.reporter.task("finetune", step / last) as update,
        ):
            while step < last:
                self.current = step + 1
                with self._traced(step + 1):
                    measured = self.step(step, consumed)
                step, consumed = step + 1, consumed + self.train.rows_per_step
                loss, norm = (_format(measured[key]) for key in ("loss", "grad_norm"))
                left = update(step / last, f"{step} of {last} steps, loss {loss}")
                self._record({"kind": "train", "step": step, **measured})
                if step % self.train.log_every == 0 or step == last:
                    values = {
                        "step": step,
                        "of_steps": last,
                        "loss": loss,
                        "grad_norm": norm,
                        "lr": f"{measured['lr']:.2e}",
                        "tokens_per_second": f"{measured['tokens_per_second']:.0f}",
                        "eta_seconds": left,
                    }
                    log.info("finetune: train %s", pairs(values))
                if step % self.train.validate_every == 0 or step == last:
                    self.validate(step)
                self._beat(f"step {step}: asking all ranks whether to stop")
                failed = self.checkpointer.failed
                stopping = self.layout.largest(SAVE_FAILED if failed else stop.wanted())
                if stopping == SAVE_FAILED:
                    # Raises on every rank what has happened.
                    self.checkpointer.wait()
                if step % self.train.save_every == 0 or step == last or stopping:
                    self.save(step, consumed)
                if stopping:
                    self.checkpointer.wait()
                    self._forget(stop)
                    if stopping == STOPPED_BY_FILE and self.layout.rank == 0:
                        (self.folder / STOPPED).touch()
                    raise StageStopped(stopping)
            self._forget(stop)

    def _acknowledge(self) -> None:
        """Say at once that a signal has come, while the step goes on."""
        if self.layout.rank == 0:
            lost = self.current - saved_step(self.folder)
            steps = "1 step" if lost == 1 else f"{lost} steps"
            message = "finetune: saving after this step; press Ctrl-C again to stop now, losing %s"
            log.warning(message, steps)

    def _forget(self, stop: StopRequest) -> None:
        """Let the next start not stop for the same file."""
        if self.layout.rank == 0:
            stop.consume()


def _format(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"

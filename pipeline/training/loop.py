"""The training loop: steps, validation, checkpoints, and the edges at which a run may stop."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from model.config import ModelConfig
from model.cost import peak_flops, training_flops
from model.loss import IGNORED
from pipeline.manifest import StageStopped
from pipeline.schema import TrainSection
from pipeline.training import checkpoint
from pipeline.training.engine import learning_rate
from pipeline.training.guards import StopRequest, refuse_non_finite
from pipeline.training.layout import Layout
from pipeline.training.loader import Batch, Loader, Rows, collate
from pipeline.training.metrics import Metrics, PositionLosses, peak_resident_bytes

log = logging.getLogger("longgen.training")


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
        metrics: Metrics,
        folder: Path,
    ) -> None:
        self.engine, self.layout, self.config, self.train = engine, layout, config, train
        self.loader, self.held_out = loader, held_out
        self.metrics, self.checkpoints = metrics, folder / "checkpoints"
        on_gpu = layout.device.type == "cuda"
        name = torch.cuda.get_device_name(layout.device) if on_gpu else "CPU"
        self.peak = peak_flops(name)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        batch = batch.to(self.layout.device)
        losses = self.engine(batch.tokens_BS, batch.positions_BS, batch.cu_seqlens, batch.labels_BS)
        return losses, batch

    def validate(self, step: int) -> None:
        """Held-out loss by position in the document, on the same rows every time."""
        rows = min(self.train.validation_rows, len(self.held_out))
        length = len(self.held_out[0][0])
        losses = PositionLosses(self.train.position_bucket, length, self.layout.device)
        self.engine.eval()
        with torch.no_grad():
            for row in range(rows):
                batch = collate([self.held_out[row]], self.train.document_mask)
                values, batch = self._forward(batch)
                losses.add(values, batch.positions_BS, batch.labels_BS != IGNORED)
        self.engine.train()
        record = {"kind": "validation", "step": step, "loss": losses.loss()}
        self.metrics.write({**record, "by_position": losses.by_position()})
        log.info("step %d: held-out loss %.4f on %d rows", step, record["loss"], rows)

    def step(self, step: int, consumed: int) -> dict[str, float]:
        """One optimizer step from the rows after `consumed`; what it measured.

        Each micro-batch contributes sum(token losses) * group size * accumulation / valid tokens
        of the whole global batch: DeepSpeed divides by group size and accumulation.
        """
        started = time.perf_counter()
        batches = self.loader.step(consumed)
        device = self.layout.device
        valid = torch.tensor(sum(b.valid_tokens for b in batches), device=device)
        valid = self.layout.sum(valid).clamp(min=1)
        scale = self.layout.get_data_parallel_world_size() * len(batches) / valid
        rate = learning_rate(self.train, step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), dtype=torch.float64, device=device)
        lengths = []
        for batch in batches:
            losses, batch = self._forward(batch)
            summed = losses.float().sum()
            total += summed.detach()
            if self.engine.is_gradient_accumulation_boundary():
                loss = (self.layout.sum(total.clone()) / valid).item()
                refuse_non_finite(loss, "the loss", step + 1)
            self.engine.backward(summed * scale)
            self.engine.step()
            lengths += batch.lengths
        norm = float(self.engine.get_global_grad_norm())
        refuse_non_finite(norm, "the gradient norm", step + 1)
        seconds = time.perf_counter() - started
        tokens = self.train.rows_per_step * batches[0].tokens_BS.shape[1]
        flops = training_flops(self.config, lengths) / seconds
        on_gpu = device.type == "cuda"
        return {
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / self.peak if self.peak else None,
            "memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
            "seconds": seconds,
        }

    def run(self, start: checkpoint.Progress) -> None:
        """Train from `start` to the last step.

        Raises:
            StageStopped: a signal came; the step was finished and saved.
        """
        step, consumed = start.step, start.rows_consumed
        last = self.train.steps
        if step == 0:
            self.validate(0)
        columns = (
            TextColumn("finetune"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        with StopRequest() as stop, Progress(*columns, transient=True) as bar:
            task = bar.add_task("finetune", total=last, completed=step, loss="-")
            while step < last:
                measured = self.step(step, consumed)
                step, consumed = step + 1, consumed + self.train.rows_per_step
                bar.update(task, completed=step, loss=f"{measured['loss']:.4f}")
                self.metrics.write({"kind": "train", "step": step, **measured})
                if step % self.train.log_every == 0 or step == last:
                    log.info(
                        "step %d/%d: loss %.4f, gradient norm %.3f, lr %.2e, %.0f tokens/s",
                        step,
                        last,
                        *(measured[k] for k in ("loss", "grad_norm", "lr", "tokens_per_second")),
                    )
                if step % self.train.validate_every == 0 or step == last:
                    self.validate(step)
                stopping = stop.signal is not None
                if step % self.train.save_every == 0 or step == last or stopping:
                    at = checkpoint.Progress(step, consumed, self.metrics.run_id)
                    path = checkpoint.save(self.engine, self.checkpoints, at, self.train.keep_last)
                    log.info("saved %s", path.name)
                if stopping:
                    raise StageStopped(stop.signal)

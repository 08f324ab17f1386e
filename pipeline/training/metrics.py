"""What a run tells while it trains: metrics.jsonl, W&B, and the losses by position."""

from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.schema import WandbSection
from pipeline.training.checkpoint import Progress
from pipeline.wandb_run import log_record, open_run

log = logging.getLogger("longgen.training")


class PositionLosses:
    """Sums of token losses by position within the document, in buckets of `width` tokens."""

    def __init__(self, width: int, length: int, device: torch.device) -> None:
        self.width = width
        buckets = -(-length // width)
        # Row 0: loss in nats; row 1: tokens.
        self.sums = torch.zeros(2, buckets, dtype=torch.float64, device=device)

    def add(self, losses_BS, positions_BS, valid_BS) -> None:
        """Add the losses [B, S] of the tokens where `valid_BS` is true."""
        # The position of the token that is predicted, as evaluation counts it.
        last = self.sums.shape[1] - 1
        bucket = ((positions_BS + 1) // self.width).clamp(max=last).flatten()
        valid = valid_BS.flatten().double()
        values = losses_BS.detach().flatten().double() * valid
        self.sums[0].index_add_(0, bucket, values)
        self.sums[1].index_add_(0, bucket, valid)

    def loss(self) -> float:
        """Mean loss per token, nats."""
        return (self.sums[0].sum() / self.sums[1].sum()).item()

    def by_position(self) -> list[dict[str, float]]:
        """One entry per bucket that holds tokens."""
        return [
            {
                "start": i * self.width,
                "stop": (i + 1) * self.width,
                "loss": total / tokens,
                "tokens": int(tokens),
            }
            for i, (total, tokens) in enumerate(self.sums.t().tolist())
            if tokens
        ]


def device_name(device: torch.device) -> str:
    """The GPU's name by CUDA, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_resident_bytes() -> int:
    """The most host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _truncate_after(path: Path, step: int) -> None:
    """Drop the lines beyond `step`, which will be repeated, and a half-written last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


class Metrics:
    """Appends records to metrics.jsonl and mirrors them to W&B."""

    def __init__(
        self,
        folder: Path,
        wandb: WandbSection,
        name: str,
        config: dict[str, Any],
        start: Progress | None,
    ) -> None:
        """Open metrics.jsonl in `folder`, the stage's, and the W&B run in the folder above it.

        `start`: where the run continues, under the same W&B id; None for a new run.

        Lines of steps after `start`, which a run that died had written, are dropped.
        """
        path = folder / "metrics.jsonl"
        _truncate_after(path, start.step if start else -1)
        self.file = path.open("a", buffering=1)
        run_id = start.wandb_id if start else None
        self.run = open_run(wandb, folder.parent, name, config, run_id, path)

    @property
    def run_id(self) -> str | None:
        """The W&B run's id, which a checkpoint keeps."""
        return self.run.id if self.run else None

    def write(self, record: dict[str, Any]) -> None:
        """One record with "kind" and "step"; the time (seconds since 1970) is added."""
        record = {**record, "time": round(time.time(), 3)}
        self.file.write(json.dumps(record) + "\n")
        if self.run:
            log_record(self.run, record)

    def close(self) -> None:
        """Flush and end."""
        self.file.close()
        if self.run:
            self.run.finish()

"""The DeepSpeed engine around the model: ZeRO, accumulation, clipping, AdamW, learning rate."""

from __future__ import annotations

import contextlib
import io
import logging
import math

import torch

from pipeline.schema import ParallelSection, TrainSection
from pipeline.training.layout import Layout


def learning_rate(train: TrainSection, step: int) -> float:
    """Learning rate of the step that comes after `step` steps.

    Linear warm-up, then constant, or a cosine from lr to lr * min_lr_ratio at the last step.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps - 1)
    floor = train.min_lr_ratio
    return train.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def accumulation_steps(train: TrainSection, data_parallel_size: int) -> int:
    """Micro-batches of one process in one step."""
    return train.rows_per_step // (data_parallel_size * train.micro_batch_rows)


def build_engine(
    model: torch.nn.Module, train: TrainSection, parallel: ParallelSection, layout: Layout
):
    """A DeepSpeedEngine whose optimizer holds fp32 masters and both Adam moments.

    Weight decay applies to matrices, not to norms.
    """
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": train.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=train.lr,
        betas=tuple(train.betas),
        eps=train.adam_eps,
        fused=layout.device.type == "cuda" and not parallel.optimizer_offload,
    )
    config = {
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps(train, layout.data_parallel_size),
        "gradient_clipping": train.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
        },
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if parallel.optimizer_offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # DeepSpeed's own CPU optimizer would have to be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed prints its memory use while it starts; metrics.jsonl has the run's.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=layout
        )
    return engine

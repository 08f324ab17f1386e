"""Stage finetune: extend the context of the converted model in the hybrid."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kernels.pattern import Pattern
from model.config import ModelConfig, describe_schedule, resolve_schedule
from model.weights import WeightFolder
from pipeline.advice import held_out_shortage
from pipeline.manifest import StageContext, StageError
from pipeline.schema import Config
from pipeline.training.checkpoint_folder import check_shared, saved_step  # noqa: F401
from pipeline.training.layout import Layout
from pipeline.training.metrics import Metrics, device_name

INPUTS = ("data_prep", "convert")
RESUMABLE = True
DISTRIBUTED = True
# What says how often to speak, look or save, or how memory is spent, and does not change the maths.
NOT_THE_RESULT = (
    "log_every",
    "validate_every",
    "save_every",
    "keep_last",
    "save_background",
    "hang_seconds",
    "profile_step",
    "micro_batch_rows",
    "recompute",
    "offload_activations",
    "mlp_tile",
    # They decide at what the run stumbles; told to stop, a user mends them and goes on.
    "non_finite",
    "spike_sigmas",
    "spike_window",
)


def depends_on(config: Config) -> dict[str, Any]:
    """Pattern, schedule, RoPE and training; not the layout, which never changes the maths."""
    train = {k: v for k, v in asdict(config.train).items() if k not in NOT_THE_RESULT}
    return {
        "pattern": asdict(config.pattern),
        "schedule": asdict(config.schedule),
        "rope": asdict(config.rope),
        "train": train,
    }


def hybrid_config(source: ModelConfig, config: Config) -> ModelConfig:
    """The source model's configuration with the run's schedule, pattern, RoPE and row length."""
    base = config.rope.base
    rope = dict(source.rope) if base is None else {**source.rope, "rope_theta": base}
    sparse_base = config.rope.sparse_base
    sparse = dict(rope) if sparse_base is None else {**rope, "rope_theta": sparse_base}
    return replace(
        source,
        rope=rope,
        sparse_rope=sparse,
        is_full=resolve_schedule(config.schedule.full, config.schedule.count, source.num_layers),
        pattern=Pattern(**asdict(config.pattern)),
        max_positions=max(source.max_positions, config.data.seq_length),
    )


def _deterministic(train) -> None:
    if train.deterministic:
        # cuBLAS needs a fixed workspace to repeat its sums.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def run(context: StageContext) -> dict[str, Any]:
    """Train to the last step, from the newest checkpoint in the folder if there is one."""
    config, train, out, log = context.config, context.config.train, context.out, context.log
    _deterministic(train)
    layout = Layout(config.parallel, torch.device(config.device))
    check_shared(out, layout.host_group)
    # megatron-core and DeepSpeed may be imported only once the layout stands.
    from data_prep.shards import PackedRows
    from pipeline.training.checkpoint import (
        Checkpointer,
        Progress,
        fill_masters,
        weights_reader,
    )
    from pipeline.training.engine import build_engine, build_model
    from pipeline.training.loader import Loader
    from pipeline.training.loop import TRIGGER, Trainer

    torch.manual_seed(train.seed)
    source = ModelConfig.load(context.folder("convert") / "model.json")
    shape = hybrid_config(source, config)
    if layout.rank == 0:
        shape.save(out / "model.json")
    log.info("finetune: layers %s, %s", describe_schedule(shape.is_full), shape.pattern)
    log.info("finetune: to save and stop: touch %s", out / TRIGGER)
    if train.keep_last == 1:
        log.warning(
            "finetune: train.keep_last=1: there is no checkpoint before the newest one; if its "
            "files are damaged, training starts again from step 0. train.keep_last=2 keeps another"
        )
    if lacking := held_out_shortage(config, context.folder("data_prep")):
        log.warning("stage=evaluate will stop: %s", lacking)
    model = build_model(config, shape, layout)
    weights = WeightFolder(context.folder("convert"))
    odd = sorted({name for name, _ in model.named_parameters()} ^ set(weights))
    if odd:
        raise StageError(
            f"{weights.folder}: {odd[0]} and {len(odd) - 1} other tensors are in the model or in "
            "the weights alone; they must be the same; run stage=convert force=true"
        )
    engine = build_engine(model, train, config.parallel, layout)
    checkpointer = Checkpointer(
        engine,
        shape,
        layout,
        out / "checkpoints",
        keep_last=train.keep_last,
        background=train.save_background,
    )
    start = checkpointer.load()
    if start:
        log.info("finetune: resume step=%d", start.step)
    elif train.weights_from:
        read = weights_reader(Path(train.weights_from), shape, layout.host_group)
        fill_masters(engine, shape, layout, read)
    else:
        fill_masters(engine, shape, layout, weights.read)
    rows = PackedRows(context.folder("data_prep") / "train")
    held_out = PackedRows(context.folder("data_prep") / "held_out")
    metrics = None
    if layout.rank == 0:
        name = f"{config.name}/{config.variant}"
        metrics = Metrics(out, config.wandb, name, asdict(config), start)
    loader = Loader.of(rows, train, layout)
    trainer = Trainer(engine, layout, shape, train, loader, held_out, metrics, checkpointer, out)
    try:
        trainer.run(start or Progress(0, 0))
    finally:
        if metrics:
            metrics.close()
        torch.use_deterministic_algorithms(False)
    return {
        "steps": train.steps,
        "tokens": train.steps * train.rows_per_step * config.data.seq_length,
        "schedule": describe_schedule(shape.is_full),
        "device": device_name(layout.device),
    }

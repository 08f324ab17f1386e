"""Stage finetune: extend the context of the converted model in the hybrid."""

from __future__ import annotations

import os
import shutil
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
# What may change where a run continues, unfinished or finished: every key of `train`. Of the other
# sections `parallel`, `wandb`, `device` and `outputs` are free, and all that it reads is fixed.
FREE, MAY_GROW, FIXED = "free", "may grow", "fixed"
ON_RESUME = {
    "steps": MAY_GROW,
    # How often to log, validate or save, and how memory is spent: the maths stay the same.
    "log_every": FREE,
    "validate_every": FREE,
    "save_every": FREE,
    "keep_last": FREE,
    "save_background": FREE,
    "hang_seconds": FREE,
    "profile_step": FREE,
    "micro_batch_rows": FREE,
    "recompute": FREE,
    "offload_activations": FREE,
    "mlp_tile": FREE,
    # What the run stops at: set otherwise after it has stopped.
    "non_finite": FREE,
    "spike_sigmas": FREE,
    "spike_window": FREE,
    "rows_per_step": FIXED,
    "lr": FIXED,
    "lr_schedule": FIXED,
    "min_lr_ratio": FIXED,
    "warmup_steps": FIXED,
    "betas": FIXED,
    "adam_eps": FIXED,
    "weight_decay": FIXED,
    "clip": FIXED,
    "seed": FIXED,
    "precision": FIXED,
    "document_mask": FIXED,
    "deterministic": FIXED,
    "validation_rows": FIXED,
    "position_bucket": FIXED,
    "weights_from": FIXED,
}


def depends_on(config: Config) -> dict[str, Any]:
    """Pattern, schedule, RoPE and training; not the layout, which never changes the maths."""
    train = {k: v for k, v in asdict(config.train).items() if ON_RESUME[k] != FREE}
    return {
        "pattern": asdict(config.pattern),
        "schedule": asdict(config.schedule),
        "rope": asdict(config.rope),
        "train": train,
    }


def lengthens(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a run that depends on `old` may go on as `new`: the same but for what may grow."""
    may_grow = [key for key, may in ON_RESUME.items() if may == MAY_GROW]
    grown = {key: new["train"][key] for key in may_grow if new["train"][key] > old["train"][key]}
    return bool(grown) and new == old | {"train": old["train"] | grown}


def continue_finished(finished: Path, out: Path) -> None:
    """Fill the new folder `out` with what a finished run goes on from.

    Checkpoints are linked where the file system can; what is in `finished` does not change.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(finished / "checkpoints", out / "checkpoints", copy_function=link)
    shutil.copy2(finished / "metrics.jsonl", out)


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
    from pipeline.training.engine import build_engine, build_model, learning_rate
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
        if start.of_steps and start.of_steps != train.steps:
            before = learning_rate(replace(train, steps=start.of_steps), start.step - 1)
            now = learning_rate(train, start.step)
            log.info(
                "finetune: lengthened of_steps=%d->%d lr=%.2e->%.2e; lr_schedule=%s goes on as in "
                "a run that began with train.steps=%d; Adam's moments are kept",
                *(start.of_steps, train.steps, before, now, train.lr_schedule, train.steps),
            )
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

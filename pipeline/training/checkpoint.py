"""Checkpoints by parameter name: fp32 masters, both Adam moments, and where the run stood.

A checkpoint is a folder `step_NNNNNN` in torch.distributed.checkpoint's format, written under
another name and renamed when whole; `latest` names the newest. The weights that train are the
masters cast to the training dtype, so they are not stored twice. Learning rate and data order are
functions of the step, and the step draws no random number beyond the stored generator state.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from pipeline.manifest import StageError

LATEST = "latest"
PROGRESS = "progress.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps, rows consumed (the loader's state), its W&B id."""

    step: int
    rows_consumed: int
    wandb_id: str | None = None


def _inner_optimizer(engine):
    """torch's AdamW inside DeepSpeed's ZeRO or bf16 optimizer."""
    return engine.optimizer.optimizer


def _adam_step(engine) -> torch.Tensor | None:
    states = _inner_optimizer(engine).state.values()
    return next((state["step"] for state in states if "step" in state), None)


def _allocate_moments(engine, step: float) -> None:
    """Give the optimizer its state before its first step, so that it can be filled by name."""
    inner = _inner_optimizer(engine)
    for group in inner.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        for flat in group["params"]:
            device = flat.device if on_device else "cpu"
            inner.state[flat] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=device),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
    _link_moments(engine)


def _link_moments(engine) -> None:
    """Let the moments be reached by parameter.

    DeepSpeed 0.19 does so once, after the first parameter group's first step, when the other groups
    have none yet.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def save(engine, folder: Path, progress: Progress, keep_last: int) -> Path:
    """Write `folder`/step_NNNNNN, point `latest` at it and drop all but the newest `keep_last`.

    Raises:
        StageError: where the disk is full; what was written of this checkpoint is removed.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_moments(engine)
    state: dict[str, torch.Tensor] = {"rng": torch.get_rng_state()}
    for name, parameter in engine.module.named_parameters():
        state[f"master.{name}"] = safe_get_full_fp32_param(parameter)
        for moment in MOMENTS:
            state[f"{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment)
    final = folder / f"step_{progress.step:06d}"
    partial = folder / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        dcp.save(state, storage_writer=FileSystemWriter(partial))
        stored = {**asdict(progress), "adam_step": float(_adam_step(engine))}
        (partial / PROGRESS).write_text(json.dumps(stored) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        pointer = folder / f"{LATEST}.partial"
        pointer.write_text(final.name + "\n")
        pointer.replace(folder / LATEST)
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        # What torch.distributed.checkpoint raises carries each rank's traceback.
        failures = getattr(error, "failures", None) or {0: (error, None)}
        cause = str(next(iter(failures.values()))[0]).splitlines()[0]
        raise StageError(
            f"{final}: the checkpoint could not be written ({cause}); free space or set outputs to "
            "another disk, and run the same command again"
        ) from error
    for old in sorted(folder.glob("step_??????"))[:-keep_last]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names; None where there is none."""
    pointer = folder / LATEST
    return folder / pointer.read_text().strip() if pointer.exists() else None


def load(engine, checkpoint: Path) -> Progress:
    """Restore masters, moments and weights into the engine; the exact state that `save` saw."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    stored = json.loads((checkpoint / PROGRESS).read_text())
    _allocate_moments(engine, stored.pop("adam_step"))
    kinds = ("master", *MOMENTS)
    named = list(engine.module.named_parameters())
    state: dict[str, torch.Tensor] = {
        f"{kind}.{name}": torch.empty(parameter.shape, dtype=torch.float32)
        for name, parameter in named
        for kind in kinds
    }
    state["rng"] = torch.get_rng_state()
    dcp.load(state, storage_reader=FileSystemReader(checkpoint))
    for name, parameter in named:
        master = state[f"master.{name}"].to(parameter.device)
        safe_set_full_fp32_param(parameter, master)
        parameter.data.copy_(master)
        for moment in MOMENTS:
            value = state[f"{moment}.{name}"].to(parameter.device)
            safe_set_full_optimizer_state(parameter, value, moment)
    torch.set_rng_state(state["rng"])
    return Progress(**stored)


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Megatron name, fp32 master) of the newest checkpoint of a finetune folder, one by one."""
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        raise StageError(f"{folder}: holds no checkpoint; run stage=finetune first")
    reader = FileSystemReader(checkpoint)
    for key, found in reader.read_metadata().state_dict_metadata.items():
        kind, _, name = key.partition(".")
        if kind == "master":
            state = {key: torch.empty(found.size, dtype=found.properties.dtype)}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(state, storage_reader=reader, no_dist=True)
            yield name, state[key]

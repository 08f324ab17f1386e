"""A model as an Engine on this machine: the ranks that share it, and its weights from a folder."""

from __future__ import annotations

import atexit
import logging
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model.engine import Engine
from model.engine_weights import Shard, load_weights
from model.modeling_longgen import LongGenConfig
from model.weights import WeightFolder
from pipeline.manifest import StageError

# Between two lines about how far the loading is.
LOG_SECONDS = 15.0


def join_ranks(device: torch.device) -> tuple[torch.device, Shard, dist.ProcessGroup | None]:
    """(this process's device, its shard, the group), of all the processes that were started.

    Raises:
        StageError: where this process has no GPU of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return device, Shard(), None
    if device.type == "cuda":
        index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= gpus:
            raise StageError(
                f"{size} processes on {gpus} CUDA GPUs: each needs its own, since "
                "parallel.share_gpus is for training; start as many as there are GPUs"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device, Shard(dist.get_rank(), size), dist.group.WORLD


def load_engine(
    folder: Path,
    config: LongGenConfig,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard,
    group: dist.ProcessGroup | None,
    log: logging.Logger,
    *,
    chunk: int,
    allow_pickle: bool = False,
) -> Engine:
    """An engine with a Hugging Face folder's weights, of which each rank reads its own part.

    Raises:
        WeightsError: for a missing, truncated or unreadable file, or a missing tensor.
        ServingError: for tensors of other shapes than the configuration's.
    """
    found = WeightFolder(folder, allow_pickle)
    started = spoken = time.monotonic()

    def told(done: int, layers: int) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= LOG_SECONDS:
            spoken = time.monotonic()
            left = (spoken - started) * (layers - done) / done
            log.info("weights: %d of %d layers, %.0f s left", done, layers, left)

    weights = load_weights(found.read, config, dtype, device, shard, told)
    seconds = time.monotonic() - started
    log.info("weights: %.2f GB on %s in %.1f s", weights.nbytes / 1e9, device, seconds)
    return Engine(config, weights, shard, group, chunk=chunk)

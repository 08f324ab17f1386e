"""Before hours are spent: does every rank have its GPU, do all talk, and is there room to save?

`torchrun ... slurm/preflight.py RUN DEVICE`: a rank that lacks something names its node and ends
with 1; rank 0 prints a line a node. Collectives are sanity checks, not benchmarks.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Bytes that are summed, and the least that a node's links and the whole world must carry. Far
# below any healthy NVLink or InfiniBand: what is slower runs over the wrong network.
SIZE = {"cuda": 2**28, "cpu": 2**20}
LEAST_IN_NODE = {"cuda": 20e9, "cpu": 0.0}
LEAST_TOGETHER = {"cuda": 1e9, "cpu": 0.0}
# Beside a run's checkpoints.
LEAST_FREE = 1e9
SECONDS = 180


def driver() -> str:
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip() or "none"


def own(run: Path, device: str) -> dict[str, object]:
    """What this rank sees by itself; RuntimeError where it lacks something."""
    local = int(os.environ["LOCAL_RANK"])
    found = {"node": socket.gethostname(), "torch": torch.__version__, "gpu": "none"}
    if device == "cuda":
        wanted = int(os.environ["LOCAL_WORLD_SIZE"])
        count = torch.cuda.device_count()
        if count < wanted:
            raise RuntimeError(f"shows {count} CUDA GPUs, {wanted} are wanted")
        torch.cuda.set_device(local)
        # A GPU that fell off its bus or has broken memory says so at its first work.
        ones = torch.ones(1024, 1024, device="cuda")
        if (ones @ ones).sum().item() != 1024.0**3:
            raise RuntimeError(f"GPU {local} cannot multiply")
        found |= {"gpu": torch.cuda.get_device_name(local), "driver": driver()}
    free = shutil.disk_usage(run).free
    if free < LEAST_FREE:
        raise RuntimeError(f"{run}: {free / 1e9:.1f} GB are free, {LEAST_FREE / 1e9:.1f} at least")
    mark = run / f".preflight_{os.environ['RANK']}"
    mark.write_bytes(b"0")
    mark.unlink()
    return found | {"free": free}


def speed(group, size: int, device: str) -> float:
    """Bytes/s out of one rank (bus bandwidth) of a sum over the group; infinite for one alone."""
    members = dist.get_world_size(group)
    if members == 1:
        return float("inf")
    value = torch.ones(size // 4, device=device)
    dist.all_reduce(value, group=group)
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    dist.all_reduce(value, group=group)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if value[0].item() != members**2:
        raise RuntimeError(f"a sum over {members} ranks gives {value[0].item()}")
    return 2 * (members - 1) / members * size / seconds


def together(found: dict[str, object], device: str) -> list[str]:
    """Speeds in each node and over all, and what differs; on rank 0 a line a node is printed."""
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=SECONDS)
    )
    rank, size = dist.get_rank(), dist.get_world_size()
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    groups = [dist.new_group(range(first, first + here)) for first in range(0, size, here)]
    found["in_node"] = speed(groups[rank // here], SIZE[device], device)
    found["together"] = speed(dist.group.WORLD, SIZE[device], device)
    everyone = [None] * size
    dist.all_gather_object(everyone, found)
    dist.destroy_process_group()
    wrong = []
    for first in everyone[::here]:
        for key in ("torch", "gpu", "driver"):
            if first.get(key) != everyone[0].get(key):
                wrong.append(f"{first['node']}: {key} {first.get(key)}, {everyone[0].get(key)} on "
                             f"{everyone[0]['node']}")  # fmt: skip
        if first["in_node"] < LEAST_IN_NODE[device]:
            wrong.append(f"{first['node']}: {first['in_node'] / 1e9:.1f} GB/s between its GPUs")
        if rank == 0:
            told = {k: f"{v / 1e9:.1f} GB{'' if k == 'free' else '/s'}" for k, v in first.items()
                    if isinstance(v, int | float)}  # fmt: skip
            print("preflight:", *(f"{k} {told.get(k, v)}" for k, v in first.items()), flush=True)
    if everyone[0]["together"] < LEAST_TOGETHER[device]:
        wrong.append(f"{everyone[0]['together'] / 1e9:.1f} GB/s over all nodes: see env.sh on NCCL")
    return wrong


def main() -> int:
    run, device = Path(sys.argv[1]), sys.argv[2]
    if device == "auto":
        device = "cuda"
    try:
        wrong = together(own(run, device), device)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        wrong = [f"{socket.gethostname()}, rank {os.environ['RANK']}: {reason}"]
        print(f"preflight: error: {wrong[0]}", flush=True)
        return 1
    if os.environ["RANK"] == "0":
        for line in wrong:
            print(f"preflight: error: {line}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

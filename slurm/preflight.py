"""Before hours are spent: does every rank have its GPU, do all talk, and is there room to save?

`slurm/launch.py ... slurm/preflight.py RUN DEVICE ROOM IN_NODE TOGETHER SCRIPT [ARGUMENT ...]`: RUN
is the run's folder, ROOM the bytes that its checkpoints take, IN_NODE and TOGETHER the least GB/s
that NCCL must reach within a node and between all (cluster.min_node_gbps, min_gbps). Every rank
looks at what it was given, all add up numbers within each node and then together, and each becomes
`python SCRIPT ARGUMENT ...`. A rank that lacks something, or waits in vain, names its node and ends
with 1; rank 0 prints a line a node. The sums are sanity checks, not benchmarks.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

# slurm/launch.py, whose child this is, ignores it. A rank that does not train yet saves nothing.
signal.signal(signal.SIGTERM, signal.SIG_DFL)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.rendezvous import rendezvous  # noqa: E402

# Bytes that are summed.
SIZE = {"cuda": 2**28, "cpu": 2**20}
# Bytes on each node's own disk, where kernels are compiled.
LEAST_LOCAL = 1e9
# Seconds that one look may take; a first sum over many nodes opens all their connections.
SECONDS = 180
GLOO = "a sum over gloo, for saves and stops (its network: GLOO_SOCKET_IFNAME, see slurm/env.sh)"
# Seconds that a shared file system may take to show what another node has written.
SEEN_WITHIN = 30
# As Slurm's --exclude takes it.
NODE = os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Unfit(Exception):
    """What this node lacks, and the remedy."""


def say(error: str) -> None:
    """One line that names the node."""
    print(f"preflight: error: {NODE}, rank {os.environ['RANK']}: {error}", flush=True)


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """End this process where `what` takes longer: a GPU or a network that hangs raises nothing."""

    def give_up() -> None:
        say(f"{what}: not done in {seconds:g} s; the first node that says so is the one that hangs")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def driver() -> str:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or f"unknown ({done.stderr.strip()})"


def check_gpu(local: int, wanted: int) -> None:
    """Take GPU `local` and let it work.

    Raises:
        Unfit: where the node shows fewer than `wanted`, or this one computes wrongly.
    """
    count = torch.cuda.device_count()
    if count < wanted:
        raise Unfit(f"shows {count} CUDA GPUs, {wanted} are wanted; submit with --exclude={NODE}")
    torch.cuda.set_device(local)
    # A GPU that fell off its bus or has broken memory says so at its first work.
    ones = torch.ones(1024, 1024, device="cuda")
    if (ones @ ones).sum().item() != 1024.0**3:
        raise Unfit(f"GPU {local} multiplies wrongly; submit with --exclude={NODE}")


def check_disks(run: Path, room: int) -> int:
    """Bytes free for the run's checkpoints beside those that it has.

    Raises:
        Unfit: where they do not suffice, the run cannot be written, or the node's disk is full.
    """
    local = Path(tempfile.gettempdir())
    if shutil.disk_usage(local).free < LEAST_LOCAL:
        raise Unfit(f"{local}: less than {LEAST_LOCAL / 1e9:g} GB free; clean it, or set TMPDIR")
    mark = run / f".preflight_{os.environ['RANK']}"
    mark.write_bytes(b"0")
    mark.unlink()
    free = shutil.disk_usage(run).free
    if int(os.environ["RANK"]) == 0:
        held = [path.stat().st_size for path in run.glob("finetune.partial/checkpoints/*/*")]
        if free + sum(held) < room:
            raise Unfit(
                f"{run}: {free / 1e9:.1f} GB free, the run's checkpoints take {room / 1e9:.1f} and "
                f"have {sum(held) / 1e9:.1f}; free space, lower train.keep_last, or set "
                "outputs=OTHER_DISK"
            )
    return free


def look_around(run: Path, device: str, room: int) -> dict[str, Any]:
    """What this rank sees by itself."""
    found = {"node": NODE, "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        check_gpu(local, int(os.environ["LOCAL_WORLD_SIZE"]))
        found |= {"gpu": torch.cuda.get_device_name(local), "driver": driver()}
    return found | {"free": check_disks(run, room)}


def bandwidth(group: dist.ProcessGroup, device: str) -> float:
    """Bytes/s out of one rank (bus bandwidth) of a sum over the group; infinite for one alone."""
    members = dist.get_world_size(group)
    if members == 1:
        return float("inf")
    value = torch.ones(SIZE[device] // 4, device=device)
    # The first sum opens the connections, the second is timed.
    for _ in range(2):
        started = time.perf_counter()
        dist.all_reduce(value, group=group)
        total = value[0].item()
        seconds = time.perf_counter() - started
    if total != members**2:
        raise Unfit(f"a sum of ones over {members} ranks, twice, gives {total:g}")
    return 2 * (members - 1) / members * SIZE[device] / seconds


def unseen(marks: list[Path]) -> list[int]:
    """Which ranks' marks do not show in the run's folder, in the order of ranks."""
    until = time.monotonic() + SEEN_WITHIN
    while (left := [r for r, mark in enumerate(marks) if not mark.exists()]) and (
        time.monotonic() < until
    ):
        time.sleep(0.5)
    return left


def faults(ranks: list[dict[str, Any]], in_node: float, together: float) -> list[str]:
    """What is wrong with nodes of which all ranks have told: other versions, slow links.

    `in_node`, `together`: the least bytes/s within a node and between all.
    """
    first, wrong = ranks[0], []
    for rank in ranks:
        if hidden := sorted({ranks[other]["node"] for other in rank["unseen"]}):
            wrong.append(
                f"{rank['node']}: does not see what {', '.join(hidden)} wrote into the run's "
                "folder, which seems to be a disk of each node by itself; set outputs to a folder "
                "that all nodes share"
            )
        for key in ("torch", "python", "gpu", "driver"):
            if rank.get(key) != first.get(key):
                wrong.append(
                    f"{rank['node']}: {key} {rank.get(key)}, but {first.get(key)} on "
                    f"{first['node']}; all must be alike: submit with --exclude={rank['node']}"
                )
        if rank["in node"] < in_node:
            wrong.append(
                f"{rank['node']}: {rank['in node'] / 1e9:.1f} GB/s between its ranks, "
                f"{in_node / 1e9:g} at least; submit with --exclude={rank['node']}, or, where "
                "GPUs without NVLink reach no more, set cluster.min_node_gbps"
            )
    if first["together"] < together:
        wrong.append(
            f"all nodes: {first['together'] / 1e9:.1f} GB/s, {together / 1e9:g} at least; NCCL may "
            "have taken the wrong network: see slurm/env.sh; where there is no faster one, set "
            "cluster.min_gbps"
        )
    # The ranks of a node say the same.
    return list(dict.fromkeys(wrong))


def meet(found: dict[str, Any], device: str, run: Path) -> list[dict[str, Any]]:
    """What every rank has found, with bandwidths, in the order of ranks."""
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=SECONDS)))
    # What comes after uses the launcher's store as well, and must not meet these keys.
    store = dist.PrefixStore("preflight", store)
    backend = "nccl" if device == "cuda" else "gloo"
    with at_most(SECONDS, "joining the others"):
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    # It finds its own network, and not NCCL's.
    with at_most(SECONDS, GLOO):
        try:
            host = dist.new_group(backend="gloo")
            found["gloo"] = bandwidth(host, "cpu")
        except RuntimeError as error:
            raise Unfit(f"{GLOO}: {str(error).splitlines()[0]}") from error
    with at_most(SECONDS, "joining this node's ranks"):
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        # A name of this start alone, for NFS remembers for a while which names were not there.
        start = [f"{time.time_ns():x}"]
        dist.broadcast_object_list(start, src=0, group=host)
        marks = [run / f".preflight_{start[0]}_{number}" for number in range(size)]
        marks[rank].touch()
        groups = [dist.new_group(range(first, first + here)) for first in range(0, size, here)]
    with at_most(SECONDS, "a sum over this node's ranks"):
        found["in node"] = bandwidth(groups[rank // here], device)
    with at_most(SECONDS, "a sum over all ranks"):
        found["together"] = bandwidth(dist.group.WORLD, device)
        # All have written theirs: the sum needs every rank.
        found["unseen"] = unseen(marks)
        ranks = [None] * size
        dist.all_gather_object(ranks, found, group=host)
    marks[rank].unlink()
    dist.destroy_process_group()
    return ranks


def told(key: str, value: Any) -> str:
    """A finding as printed."""
    if isinstance(value, int | float):
        value = f"{value / 1e9:.1f} GB{'' if key == 'free' else '/s'}"
    return f"{key} {value}"


def main() -> int:
    run, device, room, in_node, together, *command = sys.argv[1:]
    device = "cuda" if device == "auto" else device
    try:
        with at_most(SECONDS, "looking at GPU and disk"):
            found = look_around(Path(run), device, int(room))
        ranks = meet(found, device, Path(run))
    except (Unfit, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        say(str(error).splitlines()[0])
        return 1
    # On the CPU gloo does it all, and no rate is too low to try the scripts.
    unit = 1e9 if device == "cuda" else 0.0
    wrong = faults(ranks, float(in_node) * unit, float(together) * unit)
    if os.environ["RANK"] == "0":
        for rank in ranks[:: int(os.environ["LOCAL_WORLD_SIZE"])]:
            items = [told(*item) for item in rank.items() if item[0] != "unseen"]
            print("preflight:", ", ".join(items), flush=True)
        for line in wrong:
            print(f"preflight: error: {line}", flush=True)
    if wrong:
        return 1
    # In this process's place: the launcher watches it, and its GPU memory is given back.
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    sys.exit(main())

"""Runs a function in a world of several processes, quickly: forked from one that has imported all.

On GPUs the processes are spawned, since CUDA does not survive a fork.
"""

import multiprocessing
import os
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]


def _child(pipe, rank, size, port, function, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE=str(True),
    )
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_world(size, function, *arguments, gpu=False, timeout=120):
    """What `function(*arguments)` returns on each rank of a world of `size` processes.

    Raises:
        AssertionError: with the traceback of the rank that failed, or on a hang; none survives.
    """
    context = multiprocessing.get_context("spawn" if gpu else "forkserver")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not gpu:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        context.set_forkserver_preload(["tests.training.preload"])
    # Held by this process: a free port looked up for rank 0 may be taken before it gets there.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, children = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(
            target=_child, args=(theirs, rank, size, store.port, function, arguments), daemon=True
        )
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    results, open_pipes = {}, dict(zip(pipes, range(size), strict=True))
    try:
        while open_pipes:
            ready = wait(list(open_pipes), timeout)
            assert ready, f"ranks {sorted(open_pipes.values())} said nothing for {timeout} s"
            for pipe in ready:
                rank = open_pipes.pop(pipe)
                try:
                    fine, results[rank] = pipe.recv()
                except EOFError:
                    fine, results[rank] = False, "it died"
                assert fine, f"rank {rank} of {size}:\n{results[rank]}"
    finally:
        for child in children:
            if open_pipes:
                child.kill()
            child.join(10)
    return [results[rank] for rank in range(size)]

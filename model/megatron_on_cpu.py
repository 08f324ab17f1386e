"""Lets megatron-core 0.16 run on the CPU, over gloo.

megatron-core asks torch.cuda for its device and its random state even where no tensor lives on a
GPU. `install()` answers these calls for the CPU; it must run before megatron.core is imported.
"""

from __future__ import annotations

import contextlib
import os

import torch

_installed = False


def install() -> None:
    """Answer the CUDA calls that megatron-core makes on the CPU. Safe to call again.

    For a process that trains on the CPU, whether or not the machine has a GPU.
    """
    global _installed
    if _installed:
        return
    _installed = True
    # DeepSpeed's choice of accelerator, which it would otherwise guess from installed packages.
    os.environ["DS_ACCELERATOR"] = "cpu"
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = _get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = _set_state
    torch.Tensor.cuda = lambda self, *args, **kwargs: self

    import megatron.core.tensor_parallel.random as mcore_random

    class CpuRngStatesTracker(mcore_random.CudaRNGStatesTracker):
        @contextlib.contextmanager
        def fork(self, name=mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    mcore_random.CudaRNGStatesTracker = CpuRngStatesTracker
    mcore_random._get_cuda_rng_state = _get_state
    mcore_random._set_cuda_rng_state = _set_state


def _get_state(*args, **kwargs) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args, **kwargs) -> None:
    torch.set_rng_state(state)

"""The smallest Triton kernel: where it compiles and runs, the others do."""

import torch
import triton
import triton.language as tl


@triton.jit
def add_one_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def probe(device: torch.device) -> None:
    """Compile the kernel for `device` and run it.

    Raises:
        RuntimeError: where the kernel ran but did not compute.
        Exception: whatever Triton raises where it cannot compile or launch.
    """
    x = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(x):
        add_one_kernel[(1,)](x)
    if x.item() != 1:
        raise RuntimeError(f"1 + 0 was {x.item()} on {device}")

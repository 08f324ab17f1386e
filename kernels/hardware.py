"""What a device can run: its compute capability, and whether Triton's kernels compile on it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec

import torch

# Tensor cores take bfloat16 from Ampere on.
BFLOAT16_CAPABILITY = (8, 0)


@cache
def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU.

    None for a CPU, and for other makers' GPUs, whose numbers mean something else.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


@cache
def triton_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels cannot run on `device` in `dtype`, or None where they can.

    A small kernel is compiled and run once per device: Triton needs a C compiler, Python's headers
    and a GPU that it supports, and none of these shows before.
    """
    if device.type != "cuda":
        return f"needs a CUDA GPU; the tensors are on {device}"
    capability = cuda_capability(device)
    if dtype == torch.bfloat16 and capability is not None and capability < BFLOAT16_CAPABILITY:
        legal = ".".join(map(str, BFLOAT16_CAPABILITY))
        return f"bfloat16 needs compute capability {legal}; this GPU has {capability}"
    return _compile_failure(device)


def describe_skipped(skipped: Iterable[tuple[str, str]]) -> str:
    """Return " (a, b: reason; c: reason)" for backends and why each was skipped; "" for none."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped:
        names.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{', '.join(found)}: {reason}" for reason, found in names.items())
    return f" ({reasons})" if reasons else ""


@cache
def _compile_failure(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        from .triton_probe import probe

        probe(device)
    except Exception as error:
        # A missing compiler, header or driver: each with an exception class of its own.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"Triton cannot compile kernels here ({reason})"
    return None

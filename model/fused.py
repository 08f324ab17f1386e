"""Pointwise work between the matrix products: one kernel each on a GPU, by torch.compile.

Shapes: S row length, or this rank's share, B rows, N query heads, G KV heads, R = N / G, H head
dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
import torch.nn.functional as F

from kernels.hardware import triton_failure

from .rope import rotate


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def fused_on_gpu(function: Callable) -> Callable:
    """The function, compiled where its first argument is on a CUDA GPU and Triton works there.

    It is compiled at its first call, and once more for sizes that change.
    """

    @wraps(function)
    def run(x: torch.Tensor, *rest):
        serves = x.is_cuda and triton_failure(x.device, x.dtype) is None
        return (_compiled(function) if serves else function)(x, *rest)

    return run


@fused_on_gpu
def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [..., 2 * F], gate before up (arXiv 2002.05202): [..., F]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@fused_on_gpu
def split_and_rotate(
    mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [S, B, N, H], k and v [S, B, G, H] of a Megatron QKV projection, q and k under RoPE.

    Args:
        mixed: [S, B, G * (R + 2) * H]: per KV head its R query heads, its key and its value.
        cos, sin: float32 [S, B, 1, H].
    """
    rows, batch = mixed.shape[:2]
    mixed = mixed.view(rows, batch, kv_heads, -1, head_dim)
    q = mixed[..., :-2, :].reshape(rows, batch, -1, head_dim)
    k, v = mixed[..., -2, :], mixed[..., -1, :]
    q, k = (rotate(x.float(), cos, sin).to(mixed.dtype) for x in (q, k))
    return q, k, v.contiguous()

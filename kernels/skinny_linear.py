"""x W^T for a few tokens: the weights are read once, and memory sets the time.

Shapes: T tokens, K columns of the weights, N rows of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MOST_TOKENS = 16


class Settings(NamedTuple):
    """How a tile of the weights is worked on."""

    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int


# One token by sums over the columns; more of them by tensor cores, padded to 16.
SINGLE = (
    Settings(2, 2048, 4, 3),
    Settings(4, 1024, 4, 3),
    Settings(8, 512, 4, 3),
    Settings(8, 1024, 8, 3),
    Settings(16, 512, 8, 3),
)
SEVERAL = (
    Settings(16, 256, 4, 4),
    Settings(16, 512, 4, 3),
    Settings(32, 128, 4, 5),
    Settings(32, 256, 4, 4),
    Settings(64, 128, 4, 4),
)
# Of random weights in half precision, against F.linear.
TOLERANCE = 1e-2
# Weights that take turns in a measurement: together more than a GPU's L2 cache holds.
TURNS, ROUNDS = 8, 5


@triton.jit
def skinny_linear_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    tokens,
    size_n,
    size_k,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Some rows of the weights, for all tokens. WHOLE: TILE_K divides the columns."""
    row_N = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    in_n = row_N < size_n
    lanes_K = tl.arange(0, TILE_K)
    w_at = row_N.to(tl.int64)[:, None] * size_k + lanes_K[None, :]
    token_T = tl.arange(0, TILE_T)
    in_t = token_T < tokens
    if SINGLE:
        sums_NK = tl.zeros([TILE_N, TILE_K], tl.float32)
    else:
        out_TN = tl.zeros([TILE_T, TILE_N], tl.float32)
    for start in range(0, size_k, TILE_K):
        in_k = start + lanes_K < size_k
        mask = in_n[:, None] if WHOLE else in_n[:, None] & in_k[None, :]
        w_NK = tl.load(w_ptr + w_at + start, mask=mask, other=0.0, eviction_policy="evict_first")
        if SINGLE:
            x_K = tl.load(x_ptr + start + lanes_K, mask=in_k, other=0.0)
            sums_NK += w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
        else:
            x_at = token_T[:, None] * size_k + start + lanes_K[None, :]
            x_TK = tl.load(x_ptr + x_at, mask=in_t[:, None] & in_k[None, :], other=0.0)
            out_TN = tl.dot(x_TK, tl.trans(w_NK), out_TN)
    if SINGLE:
        out_N = tl.sum(sums_NK, 1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_N, out_N, mask=in_n)
    else:
        at = token_T[:, None] * size_n + row_N[None, :]
        out = out_TN.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=in_t[:, None] & in_n[None, :])


def skinny_linear(x_TK: torch.Tensor, w_NK: torch.Tensor, settings: Settings) -> torch.Tensor:
    """x W^T as [T, N], for at most MOST_TOKENS tokens; both contiguous."""
    (tokens, size_k), size_n = x_TK.shape, w_NK.shape[0]
    out = x_TK.new_empty(tokens, size_n)
    # Triton's interpreter gets dots of bfloat16 wrong.
    wide = not isinstance(skinny_linear_kernel, triton.JITFunction)
    skinny_linear_kernel[(triton.cdiv(size_n, settings.tile_n),)](
        x_TK.float() if wide else x_TK,
        w_NK.float() if wide else w_NK,
        out,
        tokens,
        size_n,
        size_k,
        SINGLE=tokens == 1,
        WHOLE=size_k % settings.tile_k == 0,
        TILE_T=1 if tokens == 1 else MOST_TOKENS,
        TILE_N=settings.tile_n,
        TILE_K=settings.tile_k,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    return out


Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fastest_linear(tokens: int, weights: Sequence[torch.Tensor]) -> tuple[Linear, str]:
    """(what multiplies so many tokens fastest with such weights, its name), as measured here.

    Candidates are torch's and the settings above, each in a CUDA graph over the weights in turn;
    off GPUs and for float32 or more tokens there is torch's alone.
    """
    first = weights[0]
    if not first.is_cuda or first.dtype == torch.float32 or tokens > MOST_TOKENS:
        return F.linear, "torch"
    weights = weights[:TURNS]
    x = torch.randn(tokens, first.shape[1], dtype=first.dtype, device=first.device)
    candidates: dict[str, Linear] = {"torch": F.linear}
    for settings in SINGLE if tokens == 1 else SEVERAL:
        name = f"triton {settings.tile_n} x {settings.tile_k}"
        candidates[name] = partial(skinny_linear, settings=settings)
    wanted, times = F.linear(x, first).float(), {}
    for name, linear in candidates.items():
        try:
            found = linear(x, first).float()
            if not (found - wanted).norm() <= TOLERANCE * wanted.norm():
                continue
            times[name] = _milliseconds(linear, x, weights)
        # A setting that this GPU has no room for is one candidate less.
        except triton.OutOfResources:
            continue
    best = min(times, key=times.get)
    return candidates[best], best


def _milliseconds(linear: Linear, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for weight in weights:
            linear(x, weight)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(ROUNDS):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)

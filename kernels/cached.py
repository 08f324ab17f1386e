"""What decoding (decode.py) and chunked prefill (chunk.py) share: queries over a cache's slots.

Shapes: B rows, L new tokens, N query heads, G KV heads, P heads whose positions differ (1 or G),
S slots, H head dim, M queries and K keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .call import DTYPES, check_heads, triton_head_dim_failure
from .pattern import Pattern

POSITION_DTYPES = (torch.int32, torch.int64)
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
# Loads are of 16 bytes.
ALIGNMENT = 16


@triton.jit
def see_keys(
    positions_M,
    key_K,
    phase,
    sink_tokens,
    window,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Pattern.visible as [M, K]; a negative position neither sees nor is seen. STRIDE 0: none."""
    distance = positions_M[:, None] - key_K[None, :]
    seen = (distance >= 0) & (key_K >= 0)[None, :]
    if not FULL:
        always_K = key_K < sink_tokens
        if STRIDE > 0:
            always_K = always_K | ((key_K // BLOCK) % STRIDE == phase)
        seen = seen & ((distance < window) | always_K[None, :])
    return seen


@triton.jit
def add_values(scores, v_KH, highest_M, total_M, out_MH, scale_log2, PRECISION: tl.constexpr):
    """A step of the online softmax over raw scores [M, K], -inf where not seen.

    highest_M is the largest score so far, scaled to powers of two.
    """
    higher_M = tl.maximum(highest_M, tl.max(scores, 1) * scale_log2)
    shift_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
    p = tl.exp2(scores * scale_log2 - shift_M[:, None])
    shrink_M = tl.exp2(highest_M - shift_M)
    total_M = total_M * shrink_M + tl.sum(p, 1)
    out_MH = out_MH * shrink_M[:, None]
    out_MH = tl.dot(p.to(v_KH.dtype), v_KH, out_MH, input_precision=PRECISION)
    return higher_M, total_M, out_MH


def pattern_constants(pattern: Pattern) -> dict[str, int | bool]:
    """What a kernel is compiled for: nothing that changes with lengths."""
    full = pattern.is_full
    return {
        "FULL": full,
        "BLOCK": pattern.block,
        "STRIDE": 0 if full or pattern.stride is None else pattern.stride,
        "PER_HEAD": pattern.heads_differ,
    }


def check_shapes(
    q_BLNH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    first_kv_head: int,
    total_kv_heads: int,
    scale: float,
) -> None:
    """Refuse queries, keys and values that do not fit together, or that no kernel serves.

    Raises:
        ValueError: naming what is legal and what to do.
    """
    shapes = [tuple(x.shape) for x in (q_BLNH, k_BGSH, v_BGSH)]
    fits = len(shapes[0]) == len(shapes[1]) == 4 and shapes[1] == shapes[2] and min(shapes[1]) > 0
    if fits:
        (batch, tokens, heads, head_dim), (k_batch, kv_heads, _, k_dim) = shapes[:2]
        fits = (batch, head_dim) == (k_batch, k_dim) and tokens > 0 and heads % kv_heads == 0
    if not fits:
        raise ValueError(
            f"q {shapes[0]}, k {shapes[1]}, v {shapes[2]}: must be [B, L, N, H], [B, G, S, H], "
            "[B, G, S, H], none of them empty, with N a multiple of G; check the head counts"
        )
    if failure := triton_head_dim_failure(head_dim):
        raise ValueError(f"{failure}; use cached_attention, which falls back to PyTorch")
    dtypes, devices = (
        {getattr(x, a) for x in (q_BLNH, k_BGSH, v_BGSH)} for a in ("dtype", "device")
    )
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"dtypes of q, k, v {q_BLNH.dtype}, {k_BGSH.dtype}, {v_BGSH.dtype}: must be one of "
            f"{', '.join(map(str, DTYPES))}, the same for all; cast them"
        )
    if len(devices) > 1:
        raise ValueError(
            f"devices of q, k, v {q_BLNH.device}, {k_BGSH.device}, {v_BGSH.device}: must be one; "
            "move them"
        )
    check_heads(kv_heads, first_kv_head, total_kv_heads)
    if not scale > 0:
        raise ValueError(f"softmax_scale={scale}: must be above 0; 1 / sqrt(H) is the default")


def check_positions(
    name: str, positions: torch.Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    """Refuse whole numbers (positions, counts) of another shape, dtype or device.

    Raises:
        ValueError: naming what is legal and what to do.
    """
    if tuple(positions.shape) not in shapes:
        raise ValueError(
            f"{name} {tuple(positions.shape)}: must be {' or '.join(map(str, shapes))}; "
            "pass those of these rows, tokens and slots"
        )
    if positions.dtype not in POSITION_DTYPES or positions.device != device:
        raise ValueError(
            f"{name} of {positions.dtype} on {positions.device}: must be int32 or int64 on {device}"
            "; convert them"
        )


def whole_vectors(x: torch.Tensor) -> bool:
    """Whether the last dim lies together, and all else in whole steps of ALIGNMENT bytes."""
    steps = [*x.stride()[:-1], x.data_ptr() // x.element_size()]
    return x.stride(-1) == 1 and not any(step * x.element_size() % ALIGNMENT for step in steps)


def readable(kernel, **tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as the kernel takes them; those that it cannot read, in whole vectors, refused.

    Raises:
        ValueError: naming what is legal and what to do.
    """
    compiled = isinstance(kernel, triton.JITFunction)
    for name, x in tensors.items():
        if compiled and not x.is_cuda:
            raise ValueError(
                f"{name} is on {x.device}: must be on a CUDA device; move it, or set "
                "TRITON_INTERPRET=1 before triton is first imported to run its kernels by hand"
            )
        if not whole_vectors(x):
            raise ValueError(
                f"{name} has strides {x.stride()} from byte {x.data_ptr() % ALIGNMENT}: the last "
                f"must be 1 and the others, like the start, whole steps of {ALIGNMENT} bytes; "
                "pass a contiguous tensor"
            )
    # Triton's interpreter gets dots of bfloat16 wrong.
    return [
        x.float() if x.dtype == torch.bfloat16 and not compiled else x for x in tensors.values()
    ]

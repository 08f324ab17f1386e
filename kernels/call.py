"""One call of attention: what reaches a backend beside q, k and v, and what is refused before.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from .pattern import Pattern

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Head dims of the Triton kernels: whole vectors of 16 bytes in half precision, at least a tensor
# core's 16 columns, at most what a tile of shared memory holds.
DIM_STEP, MIN_DIM, MAX_DIM = 8, 16, 128


@dataclass(frozen=True)
class Call:
    """bounds: the documents' cumulative lengths from 0 to T, strictly ascending. scale: of the
    scores, before the softmax. The KV heads are `first_kv_head` and following of the whole model's.
    """

    pattern: Pattern
    bounds: tuple[int, ...]
    first_kv_head: int
    total_kv_heads: int
    scale: float


def check_qkv(q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor) -> None:
    """Refuses shapes that do not fit together, and tensors on several devices.

    Raises:
        ValueError: see the messages.
    """
    fit = q_TNH.dim() == k_TGH.dim() == 3 and k_TGH.shape == v_TGH.shape
    fit = fit and q_TNH.shape[0] == k_TGH.shape[0] and q_TNH.shape[2] == k_TGH.shape[2]
    if not fit or k_TGH.shape[1] == 0 or q_TNH.shape[1] % k_TGH.shape[1]:
        raise ValueError(
            f"q {tuple(q_TNH.shape)}, k {tuple(k_TGH.shape)}, v {tuple(v_TGH.shape)}: must be "
            "[T, N, H], [T, G, H], [T, G, H] with N a multiple of G; check the head counts"
        )
    if not q_TNH.device == k_TGH.device == v_TGH.device:
        raise ValueError(
            f"q on {q_TNH.device}, k on {k_TGH.device}, v on {v_TGH.device}: must be on one "
            "device; move them with .to(device)"
        )


def check_tensors(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    """Refuses what does not fit together, by shape, dtype and device; reads no values.

    Raises:
        ValueError: see the messages.
    """
    check_qkv(q_TNH, k_TGH, v_TGH)
    if not q_TNH.dtype == k_TGH.dtype == v_TGH.dtype or q_TNH.dtype not in DTYPES:
        legal = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(
            f"q {q_TNH.dtype}, k {k_TGH.dtype}, v {v_TGH.dtype}: must be one dtype of {legal}; "
            "cast them with .to(dtype)"
        )
    integers = isinstance(cu_seqlens, torch.Tensor) and cu_seqlens.dtype == torch.int32
    if not integers or cu_seqlens.dim() != 1:
        found = type(cu_seqlens).__name__
        if isinstance(cu_seqlens, torch.Tensor):
            found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(
            f"cu_seqlens is {found}: must be a torch.int32 tensor [documents + 1]; pass "
            "torch.tensor([0, ...], dtype=torch.int32)"
        )


def triton_head_dim_failure(head_dim: int) -> str | None:
    """Return why the Triton kernels cannot take this head dim; None where they can."""
    if head_dim % DIM_STEP == 0 and MIN_DIM <= head_dim <= MAX_DIM:
        return None
    return f"head dim {head_dim} is not a multiple of {DIM_STEP} from {MIN_DIM} to {MAX_DIM}"


def check_heads(kv_heads: int, first_kv_head: int, total_kv_heads: int) -> None:
    """Refuses KV heads that lie outside the whole model's."""
    if not 0 <= first_kv_head <= total_kv_heads - kv_heads:
        raise ValueError(
            f"first_kv_head={first_kv_head} with {kv_heads} KV heads: must be from 0 to "
            f"total_kv_heads - {kv_heads} = {total_kv_heads - kv_heads}; pass the indices within "
            "the whole model"
        )


def host_bounds(cu_seqlens: torch.Tensor, tokens: int) -> tuple[int, ...]:
    """cu_seqlens as whole numbers, without empty documents.

    Raises:
        ValueError: where they do not ascend from 0 to `tokens`.
    """
    return whole_bounds(cu_seqlens.tolist(), tokens)


def whole_bounds(bounds: list[int], tokens: int) -> tuple[int, ...]:
    """The documents' cumulative lengths, without empty documents.

    Raises:
        ValueError: where they do not ascend from 0 to `tokens`.
    """
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        shown = bounds if len(bounds) < 9 else f"{bounds[:4]}...{bounds[-1:]}"
        raise ValueError(
            f"cu_seqlens={shown}: must ascend from 0 to the {tokens} tokens; pass the documents' "
            "cumulative lengths"
        )
    return (0, *(b for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a))


@lru_cache(maxsize=64)
def on_device(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Such bounds as an int32 tensor, made once for all layers of a step."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def register_operator(
    name: str, run: Callable, fake: Callable, schema: str | None = None
) -> torch.library.CustomOpDef:
    """`run` as an operator longgen::`name` that changes none of its arguments; `fake` gives shapes.

    An export folder's copies of these files may be loaded beside the originals: each keeps its own
    operators.
    """
    while hasattr(torch.ops.longgen, name):
        name += "_copy"
    operator = torch.library.custom_op(f"longgen::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator

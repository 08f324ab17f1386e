"""What serving does between a layer's products, one kernel each: norm, gate, RoPE and cache write.

On a GPU by Triton, elsewhere by torch; the kernels never wait for the device.

Shapes: T tokens, D hidden, F width of the gate, C = (N + 2 G) * H columns of a QKV projection,
N query heads, G KV heads, H head dim, B rows of a cache, S slots, P heads whose slots differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .hardware import triton_failure


def _kernels_serve(x: torch.Tensor) -> bool:
    return triton_failure(x.device, x.dtype) is None


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """x += delta, in place; x / rms(x) in float32, then times the weight in x's dtype: [T, D]."""
    if _kernels_serve(x_TD):
        from . import pointwise_kernels

        return pointwise_kernels.add_rms_norm(x_TD, delta_TD, weight_D, eps)
    if delta_TD is not None:
        x_TD += delta_TD
    wide = x_TD.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * wide.to(x_TD.dtype)


def swiglu(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 F], gate before up: [T, F]."""
    if _kernels_serve(gate_up_TF):
        from . import pointwise_kernels

        return pointwise_kernels.swiglu(gate_up_TF)
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_and_store(
    qkv_TC: torch.Tensor,
    kv_heads: int,
    rotation_TH: tuple[torch.Tensor, torch.Tensor] | None,
    cached_BGSH: tuple[torch.Tensor, torch.Tensor] | None,
    slots_PT: torch.Tensor | None,
    head_dim: int,
) -> None:
    """Queries and keys under RoPE, in place; keys and values into a cache's slots.

    Args:
        qkv_TC: all query heads, then all keys, then all values of each token; contiguous.
        rotation_TH: cosines and sines, float32 [T, H / 2]; None: they are under RoPE.
        cached_BGSH: keys and values, of equal strides, H contiguous; None: nothing is stored. With
            B = T each token has a row of its own, with B = 1 all have that one.
        slots_PT: int64; -1 for what is not stored. No two of a row may be the same.
    """
    if _kernels_serve(qkv_TC):
        from . import pointwise_kernels

        pointwise_kernels.rotate_and_store(
            qkv_TC, kv_heads, rotation_TH, cached_BGSH, slots_PT, head_dim
        )
        return
    tokens = qkv_TC.shape[0]
    qkv = qkv_TC.view(tokens, -1, head_dim)
    heads = qkv.shape[1] - 2 * kv_heads
    if rotation_TH is not None:
        cos, sin = (x[:, None] for x in rotation_TH)
        turned = qkv[:, : heads + kv_heads]
        left, right = turned.float().chunk(2, dim=-1)
        turned.copy_(torch.cat((left * cos - right * sin, right * cos + left * sin), -1))
    if cached_BGSH is not None:
        each = cached_BGSH[0].shape[0] == tokens
        rows = (torch.arange if each else torch.zeros)(tokens, device=qkv_TC.device)
        slots = slots_PT.expand(kv_heads, -1)
        head, token = (slots >= 0).nonzero(as_tuple=True)
        for held, first in zip(cached_BGSH, (heads, heads + kv_heads), strict=True):
            new = qkv[token, first + head]
            held[rows.long()[token], head, slots[head, token]] = new

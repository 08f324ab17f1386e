"""The oracle: attention over a pattern by its definition, in float32, for small inputs.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

import torch

from .pattern import Pattern


def reference_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    pattern: Pattern,
    cu_seqlens: torch.Tensor,
    *,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with a mask of size T x T, differentiable, in float32 (float64 stays float64).

    Returns:
        out [T, N, H] and the natural-log LSE [N, T].
    """
    dtype = torch.promote_types(q_TNH.dtype, torch.float32)
    tokens, heads, head_dim = q_TNH.shape
    kv_heads = k_TGH.shape[1]
    total = total_kv_heads or kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    starts = cu_seqlens.to(q_TNH.device).long()
    index = torch.arange(tokens, device=q_TNH.device)
    document = torch.searchsorted(starts[1:], index, right=True)
    position = index - starts[document]
    same = document[:, None] == document[None, :]
    outs, lses = [], []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        mask = same & pattern.visible(
            position[:, None], position[None, :], first_kv_head + kv_head, total
        )
        scores = q_TNH[:, head].to(dtype) @ k_TGH[:, kv_head].to(dtype).T * scale
        scores = scores.masked_fill(~mask, float("-inf"))
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v_TGH[:, kv_head].to(dtype))
    return torch.stack(outs, 1), torch.stack(lses)

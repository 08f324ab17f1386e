"""Attention over disjoint sets of keys, merged into attention over their union.

Shapes: P parts, T queries, N query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def merge_partials(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax-weighted sum of partial results (FlashAttention's recurrence, arXiv 2205.14135).

    Args:
        outs: P partial results [T, N, H], each attention over its own set of keys.
        lses: their natural-log LSEs [N, T]; -inf where a query saw no key of the set, and what
            `outs` holds there, be it NaN, is not looked at.

    Returns:
        (out [T, N, H] in the dtype of outs, LSE [N, T] float32), differentiable in all arguments.
        A query that saw no key at all gets zeros and -inf.

    Raises:
        ValueError: where the parts do not fit together.
    """
    expected = [(x.shape[1], x.shape[0]) if x.dim() == 3 else None for x in outs]
    same = len({x.shape for x in outs}) == 1
    if not same or [tuple(x.shape) for x in lses] != expected:
        shapes = [tuple(x.shape) for x in outs], [tuple(x.shape) for x in lses]
        raise ValueError(
            f"outs {shapes[0]} and lses {shapes[1]}: must be as many [T, N, H] as [N, T], all of "
            "one T, N and H; pass the results of return_lse=True"
        )
    lse_PTN = torch.stack([lse.float().T for lse in lses])
    seen_PTN = lse_PTN > float("-inf")
    highest_TN = lse_PTN.detach().amax(0)
    # Subtracted from -inf, -inf would give NaN.
    highest_TN = highest_TN.where(seen_PTN.any(0), 0)
    weight_PTN = (lse_PTN - highest_TN).exp()
    total_TN = weight_PTN.sum(0)
    out_TNH = torch.zeros(outs[0].shape, dtype=torch.float32, device=outs[0].device)
    some_TN = total_TN > 0
    # A logarithm or a quotient of 0 would have no gradient, even where it is not taken.
    divisor_TN = total_TN.where(some_TN, 1)
    for out, weight_TN, seen_TN in zip(outs, weight_PTN, seen_PTN, strict=True):
        share = (weight_TN / divisor_TN)[..., None]
        out_TNH = out_TNH + share * out.float().where(seen_TN[..., None], 0)
    lse_TN = (divisor_TN.log() + highest_TN).where(some_TN, float("-inf"))
    return out_TNH.to(outs[0].dtype), lse_TN.T

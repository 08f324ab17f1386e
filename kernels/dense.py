"""Full layers: causal attention of packed documents, each document its own call of torch's SDPA.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F

log = logging.getLogger("longgen.kernels")


@cache
def _say_once(device: str) -> None:
    log.info("full layers on %s run by torch SDPA, a call per document", device)


def dense_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    cu_seqlens: list[int],
    *,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Causal attention within each document; `cu_seqlens` on the host, from 0 to T.

    Returns:
        out [T, N, H] in the inputs' dtype.
    """
    _say_once(q_TNH.device.type)
    ratio = q_TNH.shape[1] // k_TGH.shape[1]
    on_gpu = q_TNH.is_cuda
    if ratio > 1 and not on_gpu:
        # On the CPU enable_gqa takes the path that materialises the L x L scores.
        k_TGH, v_TGH = (x.repeat_interleave(ratio, dim=1) for x in (k_TGH, v_TGH))
    outs = []
    for start, stop in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_TNH, k_TGH, v_TGH))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=ratio > 1 and on_gpu
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]

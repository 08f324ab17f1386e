"""Attention of new tokens over a cache's slots, by the kernels on a GPU and by torch elsewhere.

Shapes: B rows, L new tokens, N query heads, G KV heads, R = N / G, P heads whose positions differ
(1 or G), S slots, H head dim.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F

from .call import DTYPES, triton_head_dim_failure
from .hardware import describe_skipped, triton_failure
from .pattern import Pattern

log = logging.getLogger("longgen.kernels")

# Entries of the mask of one tile of queries, where torch attends: bounds its memory.
MASK_ENTRIES = 2**25


@cache
def _unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why decode.py and chunk.py cannot run on such queries; None where they can. Logged once."""
    reason = triton_failure(device, dtype) or triton_head_dim_failure(head_dim)
    if reason is None and dtype not in DTYPES:
        reason = f"{dtype} is not one of {', '.join(map(str, DTYPES))}"
    if reason is not None and device.type == "cuda":
        log.warning(
            "attention over a cache on cuda run by PyTorch, slowly%s",
            describe_skipped([("triton", reason)]),
        )
    return reason


def kernels_serve(q_BLNH: torch.Tensor) -> bool:
    """Whether decode.py and chunk.py take such queries."""
    return _unsupported(q_BLNH.device, q_BLNH.dtype, q_BLNH.shape[-1]) is None


def cached_attention(
    q_BLNH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    pattern: Pattern,
    q_positions_BL: torch.Tensor | None = None,
    k_positions_BPS: torch.Tensor | None = None,
    *,
    slots_used_B: torch.Tensor | None = None,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
) -> torch.Tensor:
    """out [B, L, N, H]; at padding (a query's position below 0) anything but NaN.

    The arguments are decode_attention's, for any number of queries and any head dim. On a GPU
    nothing waits for the device.

    Raises:
        ValueError: for one of the two positions without the other, or what the kernels refuse.
    """
    if (q_positions_BL is None) != (k_positions_BPS is None):
        missing = "q_positions_BL" if q_positions_BL is None else "k_positions_BPS"
        raise ValueError(f"{missing} is missing: pass positions of both queries and slots, or none")
    (batch, new_tokens, heads), (kv_heads, slots) = q_BLNH.shape[:3], k_BGSH.shape[1:3]
    shard = {"first_kv_head": first_kv_head, "total_kv_heads": total_kv_heads}
    tensors, served = (q_BLNH, k_BGSH, v_BGSH), kernels_serve(q_BLNH)
    if served:
        from .decode import MOST_QUERIES, decode_attention

        if new_tokens * heads // kv_heads <= MOST_QUERIES:
            where = q_positions_BL, k_positions_BPS
            options = {"slots_used_B": slots_used_B, **shard}
            return decode_attention(*tensors, pattern, *where, **options)[0]
    if k_positions_BPS is None:
        # A query behind all slots sees all of them.
        pattern = Pattern.full()
        k_positions_BPS = torch.arange(slots, device=k_BGSH.device).expand(batch, 1, -1)
        q_positions_BL = k_positions_BPS.new_full((batch, new_tokens), slots)
    if slots_used_B is not None:
        beyond = torch.arange(slots, device=k_BGSH.device) >= slots_used_B[:, None, None]
        k_positions_BPS = k_positions_BPS.masked_fill(beyond, -1)
    where = q_positions_BL, k_positions_BPS
    if served:
        from .chunk import chunk_attention

        return chunk_attention(*tensors, pattern, *where, **shard)[0]
    total = kv_heads if total_kv_heads is None else total_kv_heads
    return _by_torch(*tensors, pattern, *where, slots_used_B, first_kv_head, total)


def _by_torch(
    q_BLNH, k_BGSH, v_BGSH, pattern, q_positions_BL, k_positions_BPS, used_B, first, total
) -> torch.Tensor:
    """The same by torch's SDPA under a mask, some queries at a time."""
    (batch, columns, _, head_dim), groups = q_BLNH.shape, k_BGSH.shape[1]
    if used_B is not None:
        # What no row uses is not read.
        most = max(1, int(used_B.max()))
        k_BGSH, v_BGSH = k_BGSH[:, :, :most], v_BGSH[:, :, :most]
        k_positions_BPS = k_positions_BPS[..., :most]
    # The query heads of a KV head stand side by side as queries: keys are never repeated.
    q_BGRLH = q_BLNH.view(batch, columns, groups, -1, head_dim).permute(0, 2, 3, 1, 4)
    ratio = q_BGRLH.shape[2]
    tile = max(1, MASK_ENTRIES // max(1, k_positions_BPS.numel() * ratio))
    k = k_positions_BPS[:, :, None]
    kv_head = first + torch.arange(k.shape[1], device=k.device).view(1, -1, 1, 1)
    outs = []
    for start in range(0, columns, tile):
        q_tile = q_BGRLH[:, :, :, start : start + tile]
        q = q_positions_BL[:, None, start : start + tile, None]
        mask = (pattern.visible(q, k, kv_head, total) & (k >= 0)) | (q < 0)
        # What sees nothing sees all: a row of the mask without any key would give NaN.
        mask = mask | ~mask.any(-1, keepdim=True)
        mask = mask[:, :, None].expand(-1, -1, ratio, -1, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(q_tile.flatten(2, 3), k_BGSH, v_BGSH, mask)
        outs.append(out.view(q_tile.shape))
    return torch.cat(outs, dim=3).permute(0, 3, 1, 2, 4).reshape(q_BLNH.shape)

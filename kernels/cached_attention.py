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
    q_positions_BL: torch.Tensor,
    k_positions_BPS: torch.Tensor | None,
    *,
    slots_used_B: torch.Tensor | None = None,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
) -> torch.Tensor:
    """out [B, L, N, H]; at padding (a query's position below 0) anything but NaN.

    The arguments are decode_attention's, but for k_positions_BPS: None where the slots of a full
    pattern are the positions, and slots_used_B says how many there are. On a GPU nothing waits for
    the device.
    """
    if k_positions_BPS is None:
        k_positions_BPS = torch.arange(k_BGSH.shape[2], device=k_BGSH.device)
        k_positions_BPS = k_positions_BPS.expand(k_BGSH.shape[0], 1, -1)
    new_tokens, heads = q_BLNH.shape[1:3]
    shard = {"first_kv_head": first_kv_head, "total_kv_heads": total_kv_heads}
    if not kernels_serve(q_BLNH):
        total = k_BGSH.shape[1] if total_kv_heads is None else total_kv_heads
        where = q_positions_BL, k_positions_BPS
        return _by_torch(
            q_BLNH, k_BGSH, v_BGSH, pattern, *where, slots_used_B, first_kv_head, total
        )
    from .chunk import chunk_attention
    from .decode import MOST_QUERIES, decode_attention

    where = q_positions_BL, k_positions_BPS
    if new_tokens * heads // k_BGSH.shape[1] > MOST_QUERIES:
        return chunk_attention(q_BLNH, k_BGSH, v_BGSH, pattern, *where, **shard)[0]
    if pattern.is_full and new_tokens == 1 and slots_used_B is not None:
        # One token sees every slot in use: no position is read.
        where = None, None
    shard["slots_used_B"] = slots_used_B
    return decode_attention(q_BLNH, k_BGSH, v_BGSH, pattern, *where, **shard)[0]


def _by_torch(
    q_BLNH, k_BGSH, v_BGSH, pattern, q_positions_BL, k_positions_BPS, used_B, first, total
) -> torch.Tensor:
    """The same by torch's SDPA under a mask, some queries at a time."""
    (batch, columns, _, head_dim), groups = q_BLNH.shape, k_BGSH.shape[1]
    if used_B is not None:
        most = int(used_B.max())
        k_BGSH, v_BGSH = k_BGSH[:, :, :most], v_BGSH[:, :, :most]
        k_positions_BPS = k_positions_BPS[..., :most]
        beyond = torch.arange(most, device=used_B.device) >= used_B[:, None, None]
        k_positions_BPS = k_positions_BPS.masked_fill(beyond, -1)
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
        # Padding sees all: a row of the mask without any key would give NaN.
        mask = (pattern.visible(q, k, kv_head, total) & (k >= 0)) | (q < 0)
        mask = mask[:, :, None].expand(-1, -1, ratio, -1, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(q_tile.flatten(2, 3), k_BGSH, v_BGSH, mask)
        outs.append(out.view(q_tile.shape))
    return torch.cat(outs, dim=3).permute(0, 3, 1, 2, 4).reshape(q_BLNH.shape)

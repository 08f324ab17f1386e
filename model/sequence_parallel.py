"""Ulysses (arXiv 2309.14509): rows sharded by position become whole rows sharded by head, and back.

Rank u of the group's U holds positions u * S / U ... (u + 1) * S / U of every row: contiguous
shards, so that positions, labels and documents need no reordering.
Shapes: S row length, B rows of the micro-batch, N heads, H head dim, U size of the group.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch.distributed import ProcessGroup


def shard_heads(x_SBNH: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """[S / U, B, N, H] of this rank's positions -> [S, B, N / U, H] of this rank's heads.

    Fewer heads than ranks (KV heads) are replicated: neighbouring ranks get the same head, and
    backward sums its gradients. N must be a multiple or a divisor of U.
    """
    size = group.size()
    if size == 1:
        return x_SBNH
    local, rows, heads, head_dim = x_SBNH.shape
    if heads < size:
        x_SBNH = x_SBNH.repeat_interleave(size // heads, dim=2)
    x = x_SBNH.reshape(local, rows, size, -1, head_dim).permute(2, 0, 1, 3, 4)
    return all_to_all(group, x).reshape(size * local, rows, -1, head_dim)


def shard_sequence(x_SBNH: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """[S, B, N / U, H] of this rank's heads -> [S / U, B, N, H] of this rank's positions."""
    size = group.size()
    if size == 1:
        return x_SBNH
    rows, batch, _, head_dim = x_SBNH.shape
    x = all_to_all(group, x_SBNH).view(size, rows // size, batch, -1, head_dim)
    return x.permute(1, 2, 0, 3, 4).reshape(rows // size, batch, -1, head_dim)


def first_kv_head(kv_heads: int, tensor: ProcessGroup, ulysses: ProcessGroup) -> int:
    """Which of the whole model's KV heads is the first that this rank attends with.

    Args:
        kv_heads: KV heads of one tensor-parallel rank, before `shard_heads`.
    """
    return tensor.rank() * kv_heads + ulysses.rank() * kv_heads // ulysses.size()

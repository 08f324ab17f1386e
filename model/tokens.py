"""How one forward's tokens lie and attend: as whole documents, or after cached keys.

Shapes: B rows, L columns, T packed tokens, N query heads, G KV heads, H head dim, S key slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .cache import LongGenCache
from .cached_attention import cached_attention
from .pattern import Pattern
from .sparse_attention import sparse_attention


@dataclass
class PackedTokens:
    """Tokens of one forward as documents one after another, none of them met before.

    `index` [T] is where each token lies among the B * L columns, None where there is no padding.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    index: torch.Tensor | None
    shape: tuple[int, int]
    cache: LongGenCache | None

    @classmethod
    def from_lengths(
        cls,
        lengths: torch.Tensor,
        real: torch.Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        cache: LongGenCache | None,
    ) -> PackedTokens:
        """From the documents' lengths on the host and, with padding, the mask [B, L] of tokens."""
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        starts = cu_seqlens[:-1].repeat_interleave(lengths).to(device)
        positions = torch.arange(int(cu_seqlens[-1]), device=device) - starts
        index = None if real is None else real.flatten().nonzero()[:, 0]
        return cls(positions, cu_seqlens.to(torch.int32), index, shape, cache)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] to [T, ...]."""
        x = x.flatten(0, 1)
        return x if self.index is None else x[self.index]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] to [B, L, ...], zeros at padding."""
        if self.index is None:
            return x.unflatten(0, self.shape)
        columns = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return columns.index_put((self.index,), x).unflatten(0, self.shape)

    def attend(
        self,
        layer: int,
        pattern: Pattern,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
    ) -> torch.Tensor:
        """Attention within each document, [T, N, H]; the cache takes what it will need."""
        if self.cache is not None:
            k_BGLH, v_BGLH = (self.unpack(x).transpose(1, 2) for x in (k_TGH, v_TGH))
            self.cache.update(k_BGLH, v_BGLH, layer)
        return sparse_attention(q_TNH, k_TGH, v_TGH, pattern, self.cu_seqlens)


@dataclass
class CachedTokens:
    """Tokens of one forward that continue cached rows; T = B * L, padding among them."""

    positions: torch.Tensor
    shape: tuple[int, int]
    cache: LongGenCache

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] to [T, ...]."""
        return x.flatten(0, 1)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] to [B, L, ...]."""
        return x.unflatten(0, self.shape)

    def attend(
        self,
        layer: int,
        pattern: Pattern,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
    ) -> torch.Tensor:
        """Attention over the cached keys and the new ones, [T, N, H]; garbage at padding."""
        cache = self.cache
        k_BGLH, v_BGLH = (self.unpack(x).transpose(1, 2) for x in (k_TGH, v_TGH))
        k_BGSH, v_BGSH = cache.update(k_BGLH, v_BGLH, layer)
        step, device = cache.shared.steps[pattern], q_TNH.device
        where = cache.query_positions.to(device), step.key_positions.to(device)
        if pattern.is_full and self.shape[1] == 1:
            # One new token sees every slot in use: no position is read.
            where = None, None
        out_BLNH = cached_attention(
            self.unpack(q_TNH),
            k_BGSH,
            v_BGSH,
            pattern,
            *where,
            slots_used_B=None if step.used is None else step.used.to(device),
            first_kv_head=cache.first_kv_head,
            total_kv_heads=cache.total_kv_heads,
        )
        return out_BLNH.flatten(0, 1)

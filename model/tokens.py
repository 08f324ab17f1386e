"""How one forward's tokens lie and attend: as whole documents, or after cached keys.

Shapes: B rows, L columns, T packed tokens, N query heads, G KV heads, R = N / G, H head dim,
S key slots, P heads whose positions differ (1 or G).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .cache import LongGenCache
from .pattern import Pattern
from .sparse_attention import sparse_attention

# Entries of the mask of one tile of queries, where queries meet cached keys: bounds its memory.
MASK_ENTRIES = 2**25


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
        k_BGLH, v_BGLH = (self.unpack(x).transpose(1, 2) for x in (k_TGH, v_TGH))
        k_BGSH, v_BGSH = self.cache.update(k_BGLH, v_BGLH, layer)
        (batch, columns), groups = self.shape, k_BGSH.shape[1]
        # The query heads of a KV head stand side by side as queries: keys are never repeated.
        q_BGRLH = q_TNH.view(batch, columns, groups, -1, q_TNH.shape[-1]).permute(0, 2, 3, 1, 4)
        k_positions = self.cache.key_positions[pattern]
        tile = columns
        if k_positions is not None:
            tile = max(1, MASK_ENTRIES // (k_positions.numel() * q_BGRLH.shape[2]))
        outs = []
        for start in range(0, columns, tile):
            q_tile = q_BGRLH[:, :, :, start : start + tile]
            mask = None
            if k_positions is not None:
                mask = self._visible(pattern, start, start + tile, k_positions, groups)
                mask = mask[:, :, None].expand(-1, -1, q_tile.shape[2], -1, -1).flatten(2, 3)
            out = F.scaled_dot_product_attention(q_tile.flatten(2, 3), k_BGSH, v_BGSH, mask)
            outs.append(out.view(q_tile.shape))
        return torch.cat(outs, dim=3).permute(0, 3, 1, 2, 4).reshape(q_TNH.shape)

    def _visible(
        self, pattern: Pattern, start: int, stop: int, k_positions: torch.Tensor, groups: int
    ) -> torch.Tensor:
        """The mask [B, P, stop - start, S] of these columns."""
        q = self.cache.query_positions[:, None, start:stop, None]
        k = k_positions[:, :, None]
        heads = torch.arange(k_positions.shape[1], device=k.device).view(1, -1, 1, 1)
        # Padding sees all: a row of the mask without any key would give NaN.
        return (pattern.visible(q, k, heads, groups) & (k >= 0)) | (q < 0)

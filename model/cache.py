"""A KV cache that holds of each layer only the keys that its pattern lets later tokens see.

Keys are kept after RoPE at their absolute positions, so they are never rotated again. Rows may have
different lengths (padding is not kept), and so may KV heads (phase="per_head"): every layer
allocates the longest of them, and empty slots are masked.

Shapes: B rows, L columns of one forward, G KV heads, P heads whose positions differ (1 or G),
S slots, H head dim. Positions are int64, -1 for padding or an empty slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, CacheLayerMixin

from .pattern import Pattern


@dataclass
class _Shared:
    """What the cache tells its layers.

    An object of its own: were it the cache, the two would hold each other, and a cache that is no
    longer used would keep its memory until Python's cycle collector comes by.
    """

    columns: int = 0
    keep: dict[Pattern, torch.Tensor | None] = field(default_factory=dict)


class LongGenCacheLayer(CacheLayerMixin):
    """The keys and values [B, G, S, H] of one layer; which slots stay is the cache's to say."""

    def __init__(self, shared: _Shared, pattern: Pattern) -> None:
        super().__init__()
        self.shared = shared
        self.pattern = pattern

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start from no slots."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, G, L, H]; return all keys and values, then keep only the live ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat((self.keys, key_states), dim=2)
        values = torch.cat((self.values, value_states), dim=2)
        keep = self.shared.keep[self.pattern]
        self.keys, self.values = keys, values
        if keep is not None:
            batch, groups, _, head_dim = keys.shape
            index = keep[..., None].expand(batch, groups, keep.shape[2], head_dim)
            self.keys, self.values = keys.gather(2, index), values.gather(2, index)
        return keys, values

    def reset(self) -> None:
        """Forget every key."""
        self.keys = self.values = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.shared.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over all columns."""
        return self.shared.columns + query_length, 0


class LongGenCache(Cache):
    """The cache of all layers.

    Each forward first calls `advance` once, which decides for every pattern what to keep, then
    every layer's `update`.

    Args:
        patterns: the pattern of each layer.
        kv_heads: the model's KV heads.

    Attributes:
        lengths: tokens seen so far of each row, int64 [B] on the host; None before the first.
        query_positions: positions of the last forward's tokens [B, L], on its device.
        key_positions: for each pattern, positions [B, P, S + L] of the keys that `update` returns;
            None where every key is visible to every query.
        shared.keep: for each pattern, indices [B, P, S'] of those that are kept; None for all.
    """

    def __init__(self, patterns: Sequence[Pattern], kv_heads: int) -> None:
        self.shared = _Shared()
        super().__init__(layers=[LongGenCacheLayer(self.shared, p) for p in patterns])
        self.kv_heads = kv_heads
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.shared.columns = 0
        self.shared.keep.clear()
        self.lengths: torch.Tensor | None = None
        self.query_positions: torch.Tensor | None = None
        self.key_positions: dict[Pattern, torch.Tensor | None] = {}
        self._slots: dict[Pattern, torch.Tensor] = {}

    @property
    def columns(self) -> int:
        """Columns seen so far, padding included (what transformers counts)."""
        return self.shared.columns

    def advance(self, real: torch.Tensor) -> None:
        """Take in the next columns: bool [B, L], True for tokens, False for padding."""
        device, real = real.device, real.cpu()
        batch = real.shape[0]
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int64)
            for pattern in {layer.pattern for layer in self.layers}:
                heads = self.kv_heads if pattern.heads_differ else 1
                self._slots[pattern] = torch.empty(batch, heads, 0, dtype=torch.int64)
        elif len(self.lengths) != batch:
            raise ValueError(
                f"{batch} rows: the cache holds {len(self.lengths)}; pass that many, or a new cache"
            )
        new = (self.lengths[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
        self.lengths = self.lengths + real.sum(1)
        self.shared.columns += real.shape[1]
        self.query_positions = new.to(device)
        for pattern, slots in self._slots.items():
            keys = torch.cat((slots, new[:, None].expand(-1, slots.shape[1], -1)), dim=2)
            keep = self._live_indices(pattern, keys)
            all_visible = pattern.is_full and new.shape[1] == 1 and bool((keys >= 0).all())
            self.key_positions[pattern] = None if all_visible else keys.to(device)
            self._slots[pattern], self.shared.keep[pattern] = keys, None
            if keep is not None:
                kept = keys.gather(2, keep.clamp(min=0)).masked_fill(keep < 0, -1)
                self._slots[pattern] = kept
                self.shared.keep[pattern] = keep.clamp(min=0).to(device)

    def _live_indices(self, pattern: Pattern, keys: torch.Tensor) -> torch.Tensor | None:
        """Where the live positions lie in keys [B, P, S + L]: [B, P, S'], -1 for empty slots."""
        if pattern.is_full and bool((keys >= 0).all()):
            return None
        indices = []
        for row, length in zip(keys, self.lengths.tolist(), strict=True):
            for head, positions in enumerate(row):
                filled = (positions >= 0).nonzero()[:, 0]
                live = pattern.live(length, head, self.kv_heads)
                indices.append(filled[torch.searchsorted(positions[filled], live)])
        return pad_sequence(indices, True, -1).view(*keys.shape[:2], -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        return self.columns

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.lengths is None:
            return
        for layer in self.layers:
            layer.keys = layer.keys[rows.to(layer.keys.device)]
            layer.values = layer.values[rows.to(layer.values.device)]
        rows = rows.cpu()
        self.lengths = self.lengths[rows]
        self._slots = {pattern: slots[rows] for pattern, slots in self._slots.items()}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was (beam search)."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after another."""
        if self.lengths is not None:
            self._select_rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the keys that earlier tokens would need are gone."""
        raise ValueError(
            f"crop({tokens_to_remove}): a LongGenCache drops keys for good and cannot go back; "
            "generate without an assistant model or prompt lookup"
        )

    def activate_past_recording(self) -> None:
        """Refused: see `crop`."""
        self.crop(0)

    def live_bytes(self, layer: int | None = None) -> int:
        """Bytes of the keys and values that are held, of one layer or of all."""
        if layer is None:
            return sum(self.live_bytes(index) for index in range(len(self.layers)))
        held = self.layers[layer]
        if not held.is_initialized:
            return 0
        slots = self._slots[held.pattern]
        keys = int((slots >= 0).sum()) * self.kv_heads // slots.shape[1]
        return 2 * keys * held.keys.shape[3] * held.keys.element_size()

    def allocated_bytes(self, layer: int | None = None) -> int:
        """Bytes of the storage behind the keys and values, of one layer or of all."""
        if layer is None:
            return sum(self.allocated_bytes(index) for index in range(len(self.layers)))
        held = self.layers[layer]
        if not held.is_initialized:
            return 0
        return held.keys.untyped_storage().nbytes() + held.values.untyped_storage().nbytes()

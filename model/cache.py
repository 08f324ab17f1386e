"""A KV cache that holds of each layer only the keys that its pattern lets later tokens see.

Keys are kept after RoPE at their absolute positions, so they are never rotated again, in slots that
slots.py assigns: memory is reserved for as many tokens as are to come, and a token moves nothing
but itself. Rows may have different lengths (padding is not kept). Lengths and positions are on the
device: a step of decoding waits for nothing.

Shapes: B rows, L columns of one forward, G KV heads, P heads whose positions differ (1 or G),
S slots, H head dim. Positions are -1 for padding or an empty slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .pattern import Pattern
from .slots import Slots

# Where single tokens outgrow what was reserved, room for this share more, and at least so many.
GROWTH, LEAST_GROWTH = 8, 64


@dataclass
class Step:
    """How the layers of one pattern take one forward's keys.

    slots: int64 [B, P, L], -1 for keys that have none. kept: (rows, heads, columns, slots) of those
    that have one; None where a single column is written without asking. order: of the slots held
    before, [B, P, S] by position, where attention needs those and the new keys side by side, since
    new keys take slots that queries still see; else None. key_positions: [B, P, K] of the keys that
    `update` returns. used: slots in use from the first on, [B]; None for all.
    """

    slots: torch.Tensor
    kept: tuple[torch.Tensor, ...] | None
    order: torch.Tensor | None
    key_positions: torch.Tensor
    used: torch.Tensor | None


@dataclass
class _Shared:
    """What the cache tells its layers.

    An object of its own: were it the cache, the two would hold each other, and a cache that is no
    longer used would keep its memory until Python's cycle collector comes by.
    """

    columns: int = 0
    slots: dict[Pattern, Slots] = field(default_factory=dict)
    steps: dict[Pattern, Step] = field(default_factory=dict)


class LongGenCacheLayer(CacheLayerMixin):
    """The keys and values [B, G, S, H] of one layer."""

    def __init__(self, shared: _Shared, pattern: Pattern) -> None:
        super().__init__()
        self.shared = shared
        self.pattern = pattern

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve the slots, empty."""
        batch, groups, _, head_dim = key_states.shape
        shape = batch, groups, self.shared.slots[self.pattern].count, head_dim
        # Zeros: what an empty slot holds is multiplied with a weight of zero, and may not be NaN.
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take [B, G, L, H]; all keys and values [B, G, K, H] that their queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step, found = self.shared.steps[self.pattern], []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            if step.order is not None and step.order.shape[2]:
                order = step.order.to(held.device)[..., None]
                before = held.gather(2, order.expand(*held.shape[:2], -1, held.shape[3]))
                found.append(torch.cat((before, new), dim=2))
            elif step.order is not None:
                found.append(new)
            self._write(held, new, step)
        return tuple(found) or (self.keys, self.values)

    @staticmethod
    def _write(held: torch.Tensor, new: torch.Tensor, step: Step) -> None:
        if step.kept is None:
            slots = step.slots.to(held.device)[..., None].expand_as(new)
            there = slots.clamp(min=0)
            held.scatter_(2, there, torch.where(slots >= 0, new, held.gather(2, there)))
            return
        rows, heads, columns, slots = (x.to(held.device) for x in step.kept)
        if step.slots.shape[1] == 1:
            held[rows, :, slots] = new[rows, :, columns]
        else:
            held[rows, heads, slots] = new[rows, heads, columns]

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

    Each forward first calls `advance` once, which says for every pattern where keys go, then every
    layer's `update`.

    Args:
        patterns: the pattern of each layer.
        kv_heads: KV heads of this shard; `first_kv_head` and following of `total_kv_heads`.
        tokens: how many to reserve memory for, padding included; more are taken, at the price of a
            copy.

    Attributes:
        lengths: tokens seen so far of each row, int64 [B] on the device; None before the first.
        started: whether any row has a token.
        query_positions: positions of the last forward's tokens [B, L], on its device.
        positions: for each pattern that is not full, those of the slots, int32 [B, P, S]. Of a full
            one slot and position are the same.
        shared.slots: for each pattern, its slots. shared.steps: what the last forward wrote.
    """

    def __init__(
        self,
        patterns: Sequence[Pattern],
        kv_heads: int,
        *,
        first_kv_head: int = 0,
        total_kv_heads: int | None = None,
        tokens: int = 0,
    ) -> None:
        self.shared = _Shared()
        super().__init__(layers=[LongGenCacheLayer(self.shared, p) for p in patterns])
        self.kv_heads, self.first_kv_head = kv_heads, first_kv_head
        self.total_kv_heads = kv_heads if total_kv_heads is None else total_kv_heads
        self.tokens = tokens
        self.reset()

    def reset(self) -> None:
        """Forget every token and give the memory back."""
        super().reset()
        self.shared.columns = 0
        self.shared.steps.clear()
        self._set_slots(self.tokens)
        self.lengths: torch.Tensor | None = None
        self.started = False
        self.query_positions: torch.Tensor | None = None
        self.positions: dict[Pattern, torch.Tensor] = {}

    @property
    def columns(self) -> int:
        """Columns seen so far, padding included (what transformers counts)."""
        return self.shared.columns

    def _set_slots(self, tokens: int) -> None:
        self.tokens = tokens
        shard = self.kv_heads, self.first_kv_head, self.total_kv_heads
        for layer in self.layers:
            self.shared.slots[layer.pattern] = Slots(layer.pattern, tokens, *shard)

    def start(self, batch: int, device: torch.device) -> None:
        """Make the rows, empty."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        for pattern, slots in self.shared.slots.items():
            if not pattern.is_full:
                shape = batch, slots.heads, slots.count
                self.positions[pattern] = torch.full(shape, -1, dtype=torch.int32, device=device)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens of each row; what is held is copied there."""
        if tokens <= self.tokens:
            return
        before = dict(self.shared.slots)
        self._set_slots(tokens)
        if self.lengths is None:
            return
        moves = {pattern: self._move(pattern, slots) for pattern, slots in before.items()}
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            old = layer.keys, layer.values
            layer.lazy_initialization(*old)
            for held, kept in zip((layer.keys, layer.values), old, strict=True):
                if layer.pattern.is_full:
                    held[:, :, : kept.shape[2]] = kept
                else:
                    layer._write(held, kept, moves[layer.pattern])

    def _move(self, pattern: Pattern, before: Slots) -> Step | None:
        """What writes old slots into new ones, as if they were columns; moves the positions."""
        if pattern.is_full:
            return None
        old, slots = self.positions[pattern], self.shared.slots[pattern]
        batch, heads, _ = old.shape
        # Of keys that lie in a ring already, none takes another's slot.
        places = slots.place(old.long())
        places = places[torch.arange(heads), :, torch.arange(heads)].transpose(0, 1)
        kept = _kept(places)
        self.positions[pattern] = old.new_full((batch, heads, slots.count), -1)
        self.positions[pattern][kept[0], kept[1], kept[3]] = old[kept[0], kept[1], kept[2]]
        return Step(places, kept, None, old, None)

    def advance(self, real: torch.Tensor) -> None:
        """Take in the next columns: bool [B, L], True for tokens, False for padding."""
        batch, columns = real.shape
        if self.lengths is None:
            needed = columns
        elif len(self.lengths) != batch:
            raise ValueError(
                f"{batch} rows: the cache holds {len(self.lengths)}; pass that many, or a new cache"
            )
        else:
            needed = self.columns + columns
        if needed > self.tokens:
            more = max(needed // GROWTH, LEAST_GROWTH) if columns == 1 else 0
            self.reserve(needed + more)
        if self.lengths is None:
            self.start(batch, real.device)
        new = (self.lengths[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
        self.lengths = self.lengths + real.sum(1)
        self.shared.columns += columns
        self.query_positions = new
        for pattern, slots in self.shared.slots.items():
            self.shared.steps[pattern] = self._step(pattern, slots, new)
        # A row that began in an earlier forward is not asked for again: that would be waiting.
        self.started = self.started or bool(real.any())

    def _step(self, pattern: Pattern, slots: Slots, new: torch.Tensor) -> Step:
        """What to write where; the positions are noted."""
        places = slots.place(new, self.lengths[:, None]).transpose(0, 1)
        kept = _kept(places) if new.shape[1] > 1 else None
        used = slots.used(self.lengths)
        if pattern.is_full:
            held = torch.arange(slots.count, device=new.device)
            held = held.masked_fill(held >= self.lengths[:, None], -1)[:, None]
            return Step(places, kept, None, held, used)
        table, order = self.positions[pattern], None
        entries = new[:, None].expand(-1, slots.heads, -1)
        if new.shape[1] > 1:
            order = table.argsort(dim=2) if self.started else table.new_empty(*table.shape[:2], 0)
            order = order.long()
            # A copy: the table itself goes on to what is held after this forward.
            seen = torch.cat((table.gather(2, order), entries.to(table.dtype)), dim=2)
            used = None
        else:
            seen = table
        if kept is None:
            there = places.clamp(min=0)
            old = table.gather(2, there)
            table.scatter_(2, there, torch.where(places >= 0, entries.to(table.dtype), old))
        else:
            rows, heads, columns, at = kept
            table[rows, heads, at] = entries[rows, heads, columns].to(table.dtype)
        return Step(places, kept, order, seen, used)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        return self.columns

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.lengths is None:
            return
        for layer in self.layers:
            layer.keys = layer.keys[rows.to(layer.keys.device)]
            layer.values = layer.values[rows.to(layer.values.device)]
        rows = rows.to(self.lengths.device)
        self.lengths = self.lengths[rows]
        self.positions = {pattern: table[rows] for pattern, table in self.positions.items()}

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
        """Bytes of the held keys and values that a next token sees, of one layer or of all."""
        if layer is None:
            return sum(self.live_bytes(index) for index in range(len(self.layers)))
        held = self.layers[layer]
        if not held.is_initialized:
            return 0
        if held.pattern.is_full:
            keys = int(self.lengths.sum()) * self.kv_heads
        else:
            table = self.positions[held.pattern]
            heads = torch.arange(table.shape[1], device=table.device)[:, None] + self.first_kv_head
            next_ = self.lengths[:, None, None]
            seen = held.pattern.visible(next_, table, heads, self.total_kv_heads) & (table >= 0)
            keys = int(seen.sum()) * self.kv_heads // table.shape[1]
        return 2 * keys * held.keys.shape[3] * held.keys.element_size()

    def allocated_bytes(self, layer: int | None = None) -> int:
        """Bytes of the storage behind the keys and values, of one layer or of all."""
        if layer is None:
            return sum(self.allocated_bytes(index) for index in range(len(self.layers)))
        held = self.layers[layer]
        if not held.is_initialized:
            return 0
        return held.keys.untyped_storage().nbytes() + held.values.untyped_storage().nbytes()


def _kept(places: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(rows, heads, columns, slots) of those places [B, P, L] that are slots."""
    found = (places >= 0).nonzero(as_tuple=True)
    return *found, places[found]


def cache_bytes(
    patterns: Sequence[Pattern], kv_heads: int, head_dim: int, itemsize: int, tokens: int
) -> int:
    """Bytes of the keys and values of one row of so many tokens, without a cache."""
    counts = {p: Slots(p, tokens, kv_heads).count for p in set(patterns)}
    return 2 * kv_heads * head_dim * itemsize * sum(counts[p] for p in patterns)

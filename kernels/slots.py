"""In which slot of a cache a key lies: a ring for the window, then what every later token sees.

A key that every later token sees (a sink token, one of a strided block, any key of a full pattern)
is a lasting one; lasting keys lie one behind another. The others pass: they take turns in a ring of
at most `window` slots, by their number among the passing keys. That is arithmetic on positions, on
whatever device they are: nothing is looked up, moved or waited for.

Shapes: P heads whose slots differ (1 or G), [...] any shape of positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .pattern import Pattern


@dataclass(frozen=True)
class Slots:
    """The slots of one layer's cache for rows of at most `tokens` tokens.

    Args:
        pattern: which keys later tokens see.
        tokens: the most tokens of a row.
        kv_heads: KV heads of this shard; `first_kv_head` and following of the whole model's
            `total_kv_heads` (None: they are the whole).

    All slots together hold `Pattern.live` of every length up to `tokens` and the key of the token
    at that length; beyond that at most the strided keys within the window, whose ring slots older
    keys keep, and what KV heads of another phase need more.
    """

    pattern: Pattern
    tokens: int
    kv_heads: int = 1
    first_kv_head: int = 0
    total_kv_heads: int | None = None

    @property
    def heads(self) -> int:
        """P: 1 where all heads keep the same positions."""
        return self.kv_heads if self.pattern.heads_differ else 1

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        if self.pattern.is_full:
            return 0
        passing = self.tokens - int(self.lasting_before(torch.tensor(self.tokens)).min())
        return min(self.pattern.window, passing)

    @property
    def count(self) -> int:
        """All slots."""
        return self.ring + int(self.lasting_before(torch.tensor(self.tokens)).max())

    def _phases(self, like: torch.Tensor) -> torch.Tensor | int:
        """First block of each head's strided ones, [P, 1, ...] for positions `like`."""
        if not self.pattern.heads_differ:
            return 0
        heads = torch.arange(self.kv_heads, device=like.device) + self.first_kv_head
        phases = heads * self.pattern.stride // (self.total_kv_heads or self.kv_heads)
        return phases.view(-1, *(1,) * like.dim())

    def lasting_before(self, positions: torch.Tensor) -> torch.Tensor:
        """How many keys before each position [...] last: [P, ...]."""
        pattern = self.pattern
        if pattern.is_full:
            return positions[None]
        sinks = positions.clamp(max=pattern.sink_tokens)
        if pattern.stride is None:
            return sinks[None]
        phases = self._phases(positions)

        def strided_before(limit: torch.Tensor) -> torch.Tensor:
            period = pattern.stride * pattern.block
            rest = limit % period - phases * pattern.block
            return limit // period * pattern.block + rest.clamp(0, pattern.block)

        lasting = sinks + strided_before(positions) - strided_before(sinks)
        return lasting.expand(self.heads, *positions.shape)

    def place(self, positions: torch.Tensor, stop: torch.Tensor | int | None = None):
        """The slot of the key at each position [...]: [P, ...], int64.

        Args:
            positions: -1 for padding.
            stop: tokens of the row once all of these have come, of a shape that broadcasts with
                [...]. Keys whose ring slot another of them will take then have none.

        Returns:
            slots; -1 for padding and for keys without one.
        """
        before = self.lasting_before(positions)
        if self.pattern.is_full:
            return before
        lasts = self.lasting_before(positions + 1) > before
        number = positions - before
        slots = torch.where(lasts, self.ring + before, number % self.pattern.window)
        absent = (positions < 0).expand(slots.shape)
        if stop is not None:
            stop = torch.as_tensor(stop, device=positions.device)
            stop = stop.expand(torch.broadcast_shapes(stop.shape, positions.shape))
            passing = stop - self.lasting_before(stop)
            absent = absent | (~lasts & (number < passing - self.pattern.window))
        return slots.masked_fill(absent, -1)

    def used(self, lengths: torch.Tensor) -> torch.Tensor:
        """How many slots, from the first, rows of so many tokens [...] reach into: [...]."""
        return self.ring + self.lasting_before(lengths).amax(0)

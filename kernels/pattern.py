"""Which key does a query see: the one definition that masks, kernels, caches and FLOPs derive from.

Positions are relative to the document (or, without a document mask, to the row): a document's first
token has position 0. KV head indices are the whole model's, whatever the sharding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

PHASES = ("shared", "per_head")


@dataclass(frozen=True)
class KeyRanges:
    """The keys that a tile of queries walks, as disjoint runs in ascending order of position.

    `runs` are half-open intervals [start, stop). `strided` is None or (first, stop, step, start,
    limit): the blocks first, first + step, ... below stop, in units of the pattern's block, of
    which only the tokens in [start, limit) belong to the run (the rest lies in `runs`).
    """

    runs: tuple[tuple[int, int], ...]
    strided: tuple[int, int, int, int, int] | None
    block: int

    def positions(self) -> np.ndarray:
        """Every key of the tile, ascending, int64, each exactly once."""
        parts = [np.arange(start, stop, dtype=np.int64) for start, stop in self.runs]
        if self.strided is not None:
            first, stop, step, start, limit = self.strided
            blocks = np.arange(first, stop, step, dtype=np.int64) * self.block
            # A block may be larger than the text.
            keys = (blocks[:, None] + np.arange(min(self.block, limit), dtype=np.int64)).ravel()
            parts.append(keys[(keys >= start) & (keys < limit)])
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)


@dataclass(frozen=True)
class Pattern:
    """A causal attention pattern of sink tokens, a window and, optionally, strided blocks.

    Key k is visible to query q of the same document when k <= q and any of
    k < sink_tokens; q - k < window; (k // block) % stride == phase.

    Args:
        sink_tokens: tokens at the document's start that every later token sees. 0 or more.
        window: the nearest tokens, the query itself among them. 1 or more; None sees every key.
        block: tokens of a strided block. 1 or more.
        stride: every stride-th block is visible; None for none.
        phase: "shared": block 0 of each stride for all heads; "per_head": KV head h of G takes
            block h * stride // G, so that the heads together cover more of the text.

    Source: LongGen (arXiv 2410.01485), section 3; per-head phases after S2-Attention's sharding.
    """

    sink_tokens: int = 64
    window: int | None = 2048
    block: int = 64
    stride: int | None = None
    phase: str = "shared"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("sink_tokens", self.sink_tokens, 0),
            ("window", self.window, 1),
            ("block", self.block, 1),
            ("stride", self.stride, 1),
        ):
            optional = name in ("window", "stride")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                legal = f"a whole number of at least {least}" + (" or null" if optional else "")
                raise ValueError(f"pattern.{name}={value!r}: must be {legal}; set pattern.{name}")
        if self.phase not in PHASES:
            raise ValueError(
                f"pattern.phase={self.phase!r}: must be one of {', '.join(PHASES)}; "
                "set pattern.phase"
            )

    @classmethod
    def full(cls) -> Pattern:
        """Every earlier key is visible (plain causal attention)."""
        return cls(sink_tokens=0, window=None)

    @property
    def is_full(self) -> bool:
        """True where every earlier key is visible to every query."""
        return self.window is None or self.stride == 1

    @property
    def heads_differ(self) -> bool:
        """True where the KV heads of one layer may see different keys."""
        return self.stride is not None and self.phase == "per_head" and not self.is_full

    def phase_of(self, kv_head: int, total_kv_heads: int) -> int:
        """The phase, in blocks, of KV head `kv_head` of the model's `total_kv_heads`."""
        if not 0 <= kv_head < total_kv_heads:
            raise ValueError(
                f"kv_head={kv_head}: must be from 0 to total_kv_heads - 1 = {total_kv_heads - 1}; "
                "pass the index within the whole model"
            )
        if self.stride is None or self.phase == "shared":
            return 0
        return kv_head * self.stride // total_kv_heads

    def visible(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        kv_head: int | torch.Tensor = 0,
        total_kv_heads: int = 1,
    ) -> torch.Tensor:
        """The definition: a boolean tensor of the broadcast shape of positions `q` and `k`.

        `kv_head` is an int or an integer tensor that broadcasts with q and k.
        """
        seen = q - k < self.window if self.window is not None else torch.ones_like(q - k).bool()
        seen = seen | (k < self.sink_tokens)
        if self.stride is not None:
            if isinstance(kv_head, int):
                phase = self.phase_of(kv_head, total_kv_heads)
            else:
                per_head = self.phase == "per_head"
                phase = kv_head * self.stride // total_kv_heads if per_head else 0
            seen = seen | ((k // self.block) % self.stride == phase)
        return seen & (k <= q)

    def key_ranges(
        self, first_query: int, stop_query: int, kv_head: int = 0, total_kv_heads: int = 1
    ) -> KeyRanges:
        """The keys that any of the queries [first_query, stop_query) sees, as runs.

        The union over the tile: which query sees which of them is `visible`'s to say.
        """
        if not 0 <= first_query < stop_query:
            raise ValueError(
                f"queries [{first_query}, {stop_query}): must be a non-empty range from 0 on; "
                "pass positions within the document"
            )
        if self.is_full:
            return KeyRanges(((0, stop_query),), None, self.block)
        near = max(0, first_query - self.window + 1)
        sinks = min(self.sink_tokens, stop_query)
        if near <= sinks:
            return KeyRanges(((0, stop_query),), None, self.block)
        runs = ((0, sinks), (near, stop_query)) if sinks else ((near, stop_query),)
        strided = None
        if self.stride is not None:
            phase = self.phase_of(kv_head, total_kv_heads)
            skipped = -(-(sinks // self.block - phase) // self.stride)
            first = phase + max(0, skipped) * self.stride
            stop = -(-near // self.block)
            if first < stop:
                strided = (first, stop, self.stride, sinks, near)
        return KeyRanges(runs, strided, self.block)

    def live(self, length: int, kv_head: int = 0, total_kv_heads: int = 1) -> torch.Tensor:
        """Positions k < length that a query at position `length` sees: what a cache must hold.

        Ascending int64. A position that is absent here is absent for every greater length.
        """
        if length == 0:
            return torch.empty(0, dtype=torch.int64)
        keys = self.key_ranges(length, length + 1, kv_head, total_kv_heads).positions()
        return torch.from_numpy(keys[keys < length])

    def _strided_below(self, limit: np.ndarray, phase: int) -> np.ndarray:
        """Number of keys k < limit in blocks of this phase (elementwise)."""
        period = self.stride * self.block
        rest = limit % period - phase * self.block
        return limit // period * self.block + np.clip(rest, 0, self.block)

    def _seen(self, q: np.ndarray, phase: int) -> np.ndarray:
        """Number of keys that a query at position q sees (elementwise)."""
        if self.is_full:
            return q + 1
        sinks = np.minimum(q + 1, self.sink_tokens)
        near = np.maximum(np.maximum(0, q - self.window + 1), sinks)
        count = sinks + q + 1 - near
        if self.stride is not None:
            count += self._strided_below(near, phase) - self._strided_below(sinks, phase)
        return count

    def pairs(self, document_lengths: Sequence[int], kv_heads: int = 1) -> int:
        """Number of (query, key) pairs in these documents, summed over `kv_heads` KV heads.

        FLOPs of the two products of attention, forward: 4 * head_dim * (heads / kv_heads) * pairs.
        """
        lengths = np.asarray(list(document_lengths), dtype=np.int64)
        if lengths.size == 0:
            return 0
        if lengths.min() < 0:
            raise ValueError(f"document length {lengths.min()}: must be 0 or more")
        positions = np.arange(lengths.max(), dtype=np.int64)
        total = 0
        phases = [self.phase_of(head, kv_heads) for head in range(kv_heads)]
        for phase in set(phases):
            seen = self._seen(positions, phase)
            up_to = np.concatenate([[0], np.cumsum(seen)])
            total += int(up_to[lengths].sum()) * phases.count(phase)
        return total

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


# Other descriptions of a packed row, which trainers pass beside cu_seq_lens_q.
PACKED = ("max_length_q", "max_length_k", "seq_idx")


def lay_out(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    cache: LongGenCache | None = None,
    cu_seqlens: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **others: torch.Tensor | int | None,
) -> PackedTokens | CachedTokens:
    """Lay out the [B, L] columns of one forward; the arguments are LongGenForCausalLM.forward's.

    Raises:
        ValueError: where mask, cache, bounds or positions do not fit the columns or each other.
        TypeError: for an argument that is not known.
    """
    others = {name: value for name, value in others.items() if value is not None}
    position_ids = _same("position_ids", position_ids, "cache_position", others)
    cu_seqlens = _same("cu_seqlens", cu_seqlens, "cu_seq_lens_q", others)
    if cu_seqlens is not None:
        _same("cu_seq_lens_q", cu_seqlens, "cu_seq_lens_k", others)
        others = {name: value for name, value in others.items() if name not in PACKED}
    if others:
        raise TypeError(f"a LongGen model takes no {', '.join(sorted(others))}; leave it out")
    if cache is not None and not isinstance(cache, LongGenCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: must be a LongGenCache, which drops "
            "what sparse layers never see again; pass model.new_cache() or none"
        )
    if position_ids is not None:
        position_ids = position_ids.to(device).expand(shape)
    if cu_seqlens is not None:
        tokens = _one_row(shape, device, attention_mask, cache, cu_seqlens.cpu().long())
    else:
        tokens = _rows(shape, device, attention_mask, cache, position_ids)
    if position_ids is not None:
        given = tokens.pack(position_ids)
        if bool(((given != tokens.positions) & (tokens.positions >= 0)).any()):
            raise ValueError(
                "position_ids must count the tokens of each document, or of a row and its cache, "
                "from 0, as patterns do; pass such positions, or none"
            )
    return tokens


def _same(name: str, value: torch.Tensor | None, alias: str, others: dict) -> torch.Tensor | None:
    """A value that may be given under another name as well."""
    other = others.pop(alias, None)
    if other is None or value is None:
        return value if other is None else other
    if not torch.equal(value.flatten().cpu().long(), other.flatten().cpu().long()):
        raise ValueError(f"{name} and {alias} differ: must be the same; pass one of them")
    return value


def _one_row(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None,
    cache: LongGenCache | None,
    bounds: torch.Tensor,
) -> PackedTokens:
    padded = attention_mask is not None and not bool(attention_mask.all())
    if shape[0] != 1 or cache is not None or padded or int(bounds[-1]) != shape[1]:
        raise ValueError(
            f"cu_seqlens ending at {int(bounds[-1])} with {shape[0]} rows of {shape[1]}: must "
            "describe one packed row, without cache or padding; pass rows one by one"
        )
    return PackedTokens.from_lengths(bounds.diff(), None, shape, device, None)


def _rows(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None,
    cache: LongGenCache | None,
    position_ids: torch.Tensor | None,
) -> PackedTokens | CachedTokens:
    seen = 0 if cache is None else cache.columns
    real = None
    if attention_mask is not None:
        if attention_mask.shape != (shape[0], seen + shape[1]):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)}: must be "
                f"{(shape[0], seen + shape[1])}, rows x columns (cached and new), 1 for tokens and "
                "0 for padding; pass the tokenizer's"
            )
        real = attention_mask[:, seen:].bool()
    fresh = cache is None or not cache.started
    if fresh and real is not None:
        # A step of decoding does not ask: that would be waiting for the device.
        real = None if bool(real.all()) else real
    every = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real
    lengths = None
    if fresh and bool(every.any()):
        lengths = every.sum(1).cpu()
        if position_ids is not None:
            lengths = _documents(position_ids[every].cpu(), lengths, cache)
    if cache is not None:
        cache.advance(every)
    if lengths is not None:
        return PackedTokens.from_lengths(lengths, real, shape, device, cache)
    if cache is None:
        raise ValueError(
            f"attention_mask of {tuple(shape)} has no token; pass at least one 1 in it"
        )
    return CachedTokens(cache.query_positions.flatten(), shape, cache)


def _documents(
    positions: torch.Tensor, rows: torch.Tensor, cache: LongGenCache | None
) -> torch.Tensor:
    """Lengths of the documents of rows of these lengths: each begins at position 0."""
    starts = positions == 0
    # A row that does not begin at 0 is refused for its positions.
    starts[F.pad(rows.cumsum(0), (1, 0))[:-1][rows > 0]] = True
    lengths = F.pad(starts.nonzero()[:, 0], (0, 1), value=len(positions)).diff()
    if cache is not None and len(lengths) > int((rows > 0).sum()):
        raise ValueError(
            f"position_ids of {len(lengths)} documents in {len(rows)} rows: must be one for each "
            "row where there is a cache; pass use_cache=False, or rows one by one"
        )
    return rows if cache is not None else lengths

"""One forward over a LongGenCache: a chunk of a row's prompt, or a token of every row.

Decoding is made of kernels that read lengths on the device and never wait for it, so that a CUDA
graph may hold it. A chunk of a prompt is as many tokens as its activations are to have; where keys
go is worked out on the host, from positions that the host knows.

Shapes: B rows, T tokens, D hidden, V vocabulary, N query heads, G KV heads, H head dim, S slots,
P heads whose positions differ (1 or G); N and G are this rank's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from kernels.cached_attention import cached_attention
from kernels.dense import dense_continuation
from kernels.pattern import Pattern
from kernels.pointwise import add_rms_norm, rotate_and_store, swiglu
from kernels.sparse_attention import sparse_attention
from model.cache import LongGenCache
from model.engine_weights import EngineWeights, LayerWeights, Shard
from model.modeling_longgen import LongGenConfig
from model.rope import inverse_frequencies


@dataclass
class _Places:
    """Where the keys of one pattern go, and which slots stand before a chunk.

    slots: int64 [P, T]. held: [P, S'] slots of the keys that the chunk's first token sees before
    it, by position; their positions and the chunk's [1, P, S' + T]; None where there are none, and
    for full patterns, whose slots are positions.
    """

    slots: torch.Tensor
    held: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class Decoder:
    """The model's layers over a cache.

    Args:
        group: the tensor-parallel ranks; None where there is one.
        dense_backend: a name of kernels.dense.BACKENDS; None: the first that fits.
    """

    def __init__(
        self,
        config: LongGenConfig,
        weights: EngineWeights,
        shard: Shard,
        group: dist.ProcessGroup | None = None,
        dense_backend: str | None = None,
    ) -> None:
        self.config, self.weights, self.shard, self.group = config, weights, shard, group
        self.dense_backend = dense_backend
        self.patterns = config.layer_patterns()
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self.kv_heads = config.num_key_value_heads // shard.size
        self.heads = config.num_attention_heads // shard.size
        self.first_kv_head = shard.rank * self.kv_heads
        ropes = {True: config.rope, False: config.sparse_rope}
        # Where both kinds of layers have the same, it is computed once.
        self.kinds = [kind or config.rope == config.sparse_rope for kind in config.is_full]
        self.frequencies = {
            kind: inverse_frequencies(config.head_dim, ropes[kind]).to(self.device)
            for kind in set(self.kinds)
        }
        # Multiplies the tokens of a decode step; the engine takes what is fastest.
        self.linears = dict.fromkeys(("qkv", "out", "gate_up", "down", "head"), F.linear)

    def new_cache(self, tokens: int) -> LongGenCache:
        """An empty cache of this rank's KV heads for rows of so many tokens."""
        return LongGenCache(
            self.patterns,
            self.kv_heads,
            first_kv_head=self.first_kv_head,
            total_kv_heads=self.config.num_key_value_heads,
            tokens=tokens,
        )

    @property
    def _whole(self) -> dict[str, int]:
        """Where this rank's KV heads lie."""
        total = self.config.num_key_value_heads
        return {"first_kv_head": self.first_kv_head, "total_kv_heads": total}

    def _rotations(self, positions_T: torch.Tensor) -> dict[bool, tuple[torch.Tensor, ...]]:
        """Cosines and sines [T, H / 2] in float32, of full and of sparse layers."""
        found = {}
        for kind, frequencies in self.frequencies.items():
            angles = positions_T[:, None].float() * frequencies
            found[kind] = angles.cos(), angles.sin()
        return found

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' parts, added up."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def _split(self, qkv_TC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views [T, N, H], [T, G, H], [T, G, H]."""
        heads = qkv_TC.view(qkv_TC.shape[0], -1, self.config.head_dim)
        return heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)

    def logits(self, x_BD: torch.Tensor, linear=F.linear) -> torch.Tensor:
        """[B, V] of the last norm's output."""
        logits = linear(x_BD, self.weights.head)
        if logits.shape[1] == self.config.vocab_size:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.shard.size)]
        dist.all_gather(parts, logits, group=self.group)
        return torch.cat(parts, dim=1)

    def _mlp(self, y_TD: torch.Tensor, layer: LayerWeights, linears: dict) -> torch.Tensor:
        gated = swiglu(linears["gate_up"](y_TD, layer.gate_up))
        return self._sum(linears["down"](gated, layer.down))

    def _enter(
        self, pattern: Pattern, cache: LongGenCache, row: int, start: int, stop: int
    ) -> _Places:
        """Give a chunk of a row its slots, and note its positions."""
        slots = cache.shared.slots[pattern]
        new = torch.arange(start, stop)
        places = slots.place(new, stop)
        if pattern.is_full:
            return _Places(places.to(self.device))
        heads, tokens = (places >= 0).nonzero(as_tuple=True)
        at = [x.to(self.device) for x in (heads, places[heads, tokens], new[tokens].int())]
        cache.positions[pattern][row, at[0], at[1]] = at[2]
        if start == 0:
            return _Places(places.to(self.device))
        # Keys that only older tokens see are left behind.
        kv_heads = range(self.first_kv_head, self.first_kv_head + slots.heads)
        live = [pattern.live(start, head, slots.total_kv_heads) for head in kv_heads]
        held = [slots.place(keys)[head] for head, keys in enumerate(live)]
        # What a head has less is in front, so that the others are in order of position.
        held, live = (
            pad_sequence([x.flip(0) for x in each], True, filled).flip(1)
            for each, filled in ((held, 0), (live, -1))
        )
        positions = torch.cat((live, new.expand(slots.heads, -1)), 1)[None]
        return _Places(*(x.to(self.device) for x in (places, held, positions)))

    @torch.no_grad()
    def prefill(
        self, ids_T: torch.Tensor, cache: LongGenCache, row: int, start: int, last: int = 1
    ) -> torch.Tensor:
        """Take in the tokens [start, start + T) of a row, whose earlier ones are in the cache.

        Returns:
            the last norm's output [last, D] at the last tokens, for `logits`.
        """
        stop = start + len(ids_T)
        rotations = self._rotations(torch.arange(start, stop, device=self.device))
        places = {p: self._enter(p, cache, row, start, stop) for p in set(self.patterns)}
        q_positions = torch.arange(start, stop, device=self.device)[None]
        x_TD, delta = F.embedding(ids_T, self.weights.embed), None
        eps, linears = self.config.rms_norm_eps, dict.fromkeys(self.linears, F.linear)
        for index, layer in enumerate(self.weights.layers):
            pattern, kind = self.patterns[index], self.kinds[index]
            held = cache.layers[index]
            cached = held.keys[row : row + 1], held.values[row : row + 1]
            y_TD = add_rms_norm(x_TD, delta, layer.input_norm, eps)
            qkv_TC = F.linear(y_TD, layer.qkv)
            out_TNH = self._attend_chunk(
                pattern, qkv_TC, rotations[kind], cached, places[pattern], q_positions, stop
            )
            delta = self._sum(F.linear(out_TNH.flatten(1), layer.out))
            y_TD = add_rms_norm(x_TD, delta, layer.post_norm, eps)
            delta = self._mlp(y_TD, layer, linears)
        cache.lengths[row] = stop
        x_TD, delta = x_TD[-last:].clone(), delta[-last:].contiguous()
        return add_rms_norm(x_TD, delta, self.weights.norm, eps)

    def _attend_chunk(
        self, pattern, qkv_TC, rotation, cached, places: _Places, q_positions, stop: int
    ) -> torch.Tensor:
        store = rotation, cached, places.slots
        if pattern.is_full:
            self._rotate_and_store(qkv_TC, *store)
            keys, values = (x[0, :, :stop].transpose(0, 1) for x in cached)
            q_TNH = self._split(qkv_TC)[0]
            return dense_continuation(q_TNH, keys, values, backend=self.dense_backend)
        self._rotate_and_store(qkv_TC, rotation, None, None)
        q_TNH, k_TGH, v_TGH = self._split(qkv_TC)
        if places.held is None:
            bounds = torch.tensor([0, stop], dtype=torch.int32)
            out_TNH = sparse_attention(q_TNH, k_TGH, v_TGH, pattern, bounds, **self._whole)
        else:
            # New keys take slots that the first of these queries still see: held ones go beside.
            index = places.held[None, ..., None]
            sides = []
            for slots, new_TGH in zip(cached, (k_TGH, v_TGH), strict=True):
                before = slots.gather(2, index.expand(*slots.shape[:2], -1, slots.shape[3]))
                sides.append(torch.cat((before, new_TGH.transpose(0, 1)[None]), dim=2))
            where = q_positions, places.positions
            out_TNH = cached_attention(q_TNH[None], *sides, pattern, *where, **self._whole)[0]
        self._rotate_and_store(qkv_TC, None, cached, places.slots)
        return out_TNH

    def _rotate_and_store(self, qkv_TC, rotation, cached, slots) -> None:
        head_dim = self.config.head_dim
        rotate_and_store(qkv_TC, self.kv_heads, rotation, cached, slots, head_dim)

    @torch.no_grad()
    def step(self, ids_B: torch.Tensor, cache: LongGenCache) -> torch.Tensor:
        """Take in one more token of every row: logits [B, V]. Nothing waits for the device."""
        lengths = cache.lengths
        rotations = self._rotations(lengths)
        slots, used = {}, {}
        for pattern in set(self.patterns):
            own = cache.shared.slots[pattern]
            slots[pattern] = own.place(lengths).contiguous()
            used[pattern] = own.used(lengths + 1).int()
            if not pattern.is_full:
                new = lengths.int()[:, None, None].expand(-1, own.heads, -1)
                cache.positions[pattern].scatter_(2, slots[pattern].T[..., None], new)
        x_BD, delta = F.embedding(ids_B, self.weights.embed), None
        eps, linears = self.config.rms_norm_eps, self.linears
        for index, layer in enumerate(self.weights.layers):
            pattern, kind = self.patterns[index], self.kinds[index]
            cached = cache.layers[index].keys, cache.layers[index].values
            y_BD = add_rms_norm(x_BD, delta, layer.input_norm, eps)
            qkv_BC = linears["qkv"](y_BD, layer.qkv)
            self._rotate_and_store(qkv_BC, rotations[kind], cached, slots[pattern])
            out_BLNH = cached_attention(
                self._split(qkv_BC)[0][:, None],
                *cached,
                pattern,
                # Of a full pattern the new token sees every slot in use: no position is read.
                None if pattern.is_full else lengths[:, None],
                None if pattern.is_full else cache.positions[pattern],
                slots_used_B=used[pattern],
                **self._whole,
            )
            delta = self._sum(linears["out"](out_BLNH.flatten(1), layer.out))
            y_BD = add_rms_norm(x_BD, delta, layer.post_norm, eps)
            delta = self._mlp(y_BD, layer, linears)
        logits = self.logits(add_rms_norm(x_BD, delta, self.weights.norm, eps), linears["head"])
        lengths += 1
        return logits

"""Megatron-core's transformer layer over a pattern, and what it keeps for its backward.

A layer may keep its input and its attention's output alone and compute the rest again: its norms,
projections and MLP cost little beside their memory, attention costs much and keeps little.

Shapes: S row length, or this rank's share, B rows of the micro-batch, T = B * whole row length,
N query heads, G KV heads of this rank in attention, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from .fused import split_and_rotate, swiglu
from .kept import KeptTensors


@dataclass
class LayerMemory:
    """What layers keep, the same object for all of them.

    recompute: none keeps all that autograd saves; attention keeps a layer's input, its attention's
    output and LSE; full its input. mlp_tile: tokens of this rank that the MLP's backward works on
    at a time; None: all. The MLP's weight gradients are then summed tile by tile in their dtype.
    """

    recompute: str = "none"
    mlp_tile: int | None = None
    kept: KeptTensors = field(default_factory=lambda: KeptTensors(offload=False))


@dataclass(frozen=True)
class Row:
    """What a layer is told of its rows: cos, sin float32 [S, B, 1, H], and the documents' bounds,
    int32 on the host."""

    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor


class HybridLayer(TransformerLayer):
    """h1 = h + attention(norm(h)), then h1 + MLP(norm(h1)), recomputed as `memory` says."""

    # Set by the model, the same for all its layers.
    memory: LayerMemory

    def forward(
        self, hidden_states: torch.Tensor, *args, rotary_pos_emb, packed_seq_params, **unused
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [S, B, hidden] -> the same, and no context.

        Args:
            rotary_pos_emb: float32 [2, 2, S, B, 1, H]: of full and sparse layers, cos and sin.
        """
        cos, sin = rotary_pos_emb[self.self_attention.rope_kind]
        row = Row(cos, sin, packed_seq_params.cu_seqlens_q)
        if self.memory.recompute == "none" or not torch.is_grad_enabled():
            core = self.self_attention.core_attention
            out_TNH = core.attend(*self.query_key_value(hidden_states, row), row.cu_seqlens)
            x, h1 = self.before_mlp(out_TNH, hidden_states)
            return h1 + self.feed_forward(x), None
        return _Recomputed.apply(hidden_states, self, row), None

    def query_key_value(
        self, h: torch.Tensor, row: Row
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, N, H], k and v [T, G, H] of this rank's heads, after RoPE."""
        attention = self.self_attention
        mixed, _ = attention.linear_qkv(self.input_layernorm(h))
        kv_heads = attention.num_query_groups_per_partition
        head_dim = attention.hidden_size_per_attention_head
        heads = split_and_rotate(mixed, row.cos, row.sin, kv_heads, head_dim)
        return attention.core_attention.whole_rows(*heads)

    def before_mlp(
        self, out_TNH: torch.Tensor, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the MLP's input, the residual h1), both [S, B, hidden]."""
        attention = self.self_attention
        own = attention.core_attention.own_positions(out_TNH, h.shape[1])
        h1 = h + attention.linear_proj(own)[0]
        return self.pre_mlp_layernorm(h1), h1

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """SwiGLU MLP of x [S, B, hidden]."""
        return self.mlp.linear_fc2(swiglu(self.mlp.linear_fc1(x)[0]))[0]

    def tiles(self, x: torch.Tensor) -> Iterator[slice]:
        """The positions of x [S, B, hidden] that the MLP works on at a time."""
        rows, batch = x.shape[:2]
        step = max(1, (self.memory.mlp_tile or rows * batch) // batch)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


class _Recomputed(torch.autograd.Function):
    """A layer that keeps little.

    Gradients of its weights accumulate while its backward runs, as under Megatron's and torch's
    re-entrant checkpointing.
    """

    @staticmethod
    def forward(ctx, h: torch.Tensor, layer: HybridLayer, row: Row) -> torch.Tensor:
        core, kept = layer.self_attention.core_attention, layer.memory.kept
        ctx.layer, ctx.row = layer, row
        # As early as may be: a copy to the host runs beside what follows.
        ctx.tickets = [kept.put(h.detach())]
        out_TNH, lse_NT = core.attend_with_lse(*layer.query_key_value(h, row), row.cu_seqlens)
        if layer.memory.recompute == "attention":
            ctx.tickets.append(kept.put(out_TNH))
            ctx.lse_NT = lse_NT
        x, h1 = layer.before_mlp(out_TNH, h)
        for tile in layer.tiles(x):
            h1[tile] += layer.feed_forward(x[tile])
        return h1

    @staticmethod
    def backward(ctx, d_h2: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        layer, row = ctx.layer, ctx.row
        core, kept = layer.self_attention.core_attention, layer.memory.kept
        h, *out_TNH = (kept.get(ticket) for ticket in ctx.tickets)
        if out_TNH:
            (out_TNH,), lse_NT = out_TNH, ctx.lse_NT
        else:
            out_TNH, lse_NT = core.attend_with_lse(*layer.query_key_value(h, row), row.cu_seqlens)
        d_out_TNH, d_residual = _mlp_gradients(layer, out_TNH, h, d_h2)
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            heads = layer.query_key_value(h, row)
        gradients = core.gradients(
            d_out_TNH, *(x.detach() for x in heads), out_TNH, lse_NT, row.cu_seqlens
        )
        del d_out_TNH, out_TNH, lse_NT
        torch.autograd.backward(heads, gradients)
        return h.grad.add_(d_residual), None, None


def _mlp_gradients(
    layer: HybridLayer, out_TNH: torch.Tensor, h: torch.Tensor, d_h2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a layer's attention output and of its input, from behind the attention on."""
    with torch.enable_grad():
        out_TNH, h = (x.detach().requires_grad_() for x in (out_TNH, h))
        x, h1 = layer.before_mlp(out_TNH, h)
    d_x = torch.empty_like(x)
    weights = list(layer.mlp.parameters())
    for tile in layer.tiles(x):
        # DeepSpeed takes a weight's gradient when it is told that no more is to come.
        for weight in weights:
            weight.ds_grad_is_ready = tile.stop == len(x)
        with torch.enable_grad():
            part = x[tile].detach().requires_grad_()
            torch.autograd.backward(layer.feed_forward(part), d_h2[tile])
        d_x[tile] = part.grad
    torch.autograd.backward((x, h1), (d_x, d_h2))
    return out_TNH.grad, h.grad

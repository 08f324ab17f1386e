"""Megatron-core's core attention, by a Pattern: one instance per layer.

Shapes: S row length, B rows of the micro-batch, N query heads, G KV heads, H head dim, U size of
the Ulysses group.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule

from kernels.pattern import Pattern
from kernels.sparse_attention import sparse_attention

from .sequence_parallel import first_kv_head, shard_heads, shard_sequence


class PatternAttention(MegatronModule):
    """Attention of packed rows over `pattern`; documents come as packed_seq_params.cu_seqlens_q.

    cu_seqlens_q covers the B whole rows one after another, int32 on the host, from 0 to B * S: a
    document never spans two rows.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        cp_comm_type=None,
        softmax_scale: float | None = None,
        pg_collection=None,
        *,
        pattern: Pattern,
    ) -> None:
        super().__init__(config=config)
        self.pattern = pattern
        self.softmax_scale = softmax_scale
        self.tensor_group, self.ulysses_group = pg_collection.tp, pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ) -> torch.Tensor:
        """query [S / U, B, N, H], key, value [S / U, B, G, H] after RoPE -> [S / U, B, N * H]."""
        kv_heads, head_dim = key.shape[2:]
        query, key, value = (shard_heads(x, self.ulysses_group) for x in (query, key, value))
        rows, batch, heads, _ = query.shape
        q_TNH, k_TGH, v_TGH = (
            x.transpose(0, 1).reshape(batch * rows, -1, head_dim) for x in (query, key, value)
        )
        out = sparse_attention(
            q_TNH,
            k_TGH,
            v_TGH,
            self.pattern,
            packed_seq_params.cu_seqlens_q,
            first_kv_head=first_kv_head(kv_heads, self.tensor_group, self.ulysses_group),
            total_kv_heads=self.tensor_group.size() * kv_heads,
            softmax_scale=self.softmax_scale,
        )
        out = shard_sequence(
            out.view(batch, rows, heads, head_dim).transpose(0, 1), self.ulysses_group
        )
        return out.flatten(2)

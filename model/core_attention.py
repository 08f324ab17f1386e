"""Megatron-core's core attention, by a Pattern: one instance per layer.

Shapes: S row length, B rows of the micro-batch, T = B * S, N query heads, G KV heads, H head dim, U
size of the Ulysses group.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule

from kernels.pattern import Pattern
from kernels.sparse_attention import attention_gradients, sparse_attention

from .sequence_parallel import first_kv_head, shard_heads, shard_sequence


class PatternAttention(MegatronModule):
    """Attention of packed rows over `pattern`: whole rows in, `attend`, this rank's positions out.

    cu_seqlens covers the B whole rows one after another, int32 on the host, from 0 to B * S: a
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
        self.kv_heads = config.num_query_groups // pg_collection.tp.size()

    def whole_rows(
        self, q_SBNH: torch.Tensor, k_SBGH: torch.Tensor, v_SBGH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, N, H], k and v [T, G, H] of whole rows, one after another, and this rank's heads.

        Args:
            q_SBNH, k_SBGH, v_SBGH: of this rank's positions, [S / U, B, heads, H], after RoPE.
        """
        heads = (shard_heads(x, self.ulysses_group) for x in (q_SBNH, k_SBGH, v_SBGH))
        return tuple(x.transpose(0, 1).reshape(-1, *x.shape[2:]) for x in heads)

    def own_positions(self, out_TNH: torch.Tensor, batch: int) -> torch.Tensor:
        """The output of this rank's positions and all their heads, [S / U, B, N * H]."""
        out = out_TNH.view(batch, -1, *out_TNH.shape[1:]).transpose(0, 1)
        return shard_sequence(out, self.ulysses_group).flatten(2)

    def _options(self) -> dict:
        return {
            "first_kv_head": first_kv_head(self.kv_heads, self.tensor_group, self.ulysses_group),
            "total_kv_heads": self.tensor_group.size() * self.kv_heads,
            "softmax_scale": self.softmax_scale,
        }

    def attend(self, q_TNH, k_TGH, v_TGH, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """out [T, N, H], differentiable; cu_seqlens int32 on the host, over the B whole rows."""
        return sparse_attention(q_TNH, k_TGH, v_TGH, self.pattern, cu_seqlens, **self._options())

    def attend_with_lse(
        self, q_TNH, k_TGH, v_TGH, cu_seqlens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [T, N, H], LSE [N, T] float32), as `gradients` takes them."""
        options = {**self._options(), "return_lse": True}
        return sparse_attention(q_TNH, k_TGH, v_TGH, self.pattern, cu_seqlens, **options)

    def gradients(
        self, d_out_TNH, q_TNH, k_TGH, v_TGH, out_TNH, lse_NT, cu_seqlens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) without running the attention again."""
        kept = (q_TNH, k_TGH, v_TGH, out_TNH, lse_NT)
        return attention_gradients(d_out_TNH, *kept, self.pattern, cu_seqlens, **self._options())

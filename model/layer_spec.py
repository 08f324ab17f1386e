"""Per-layer Megatron specs of the hybrid: which pattern and which RoPE each layer has."""

from __future__ import annotations

import copy
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from .config import ModelConfig
from .core_attention import PatternAttention
from .hybrid_layer import HybridLayer
from .norm import RMSNorm

# Where DocumentRope stacks what is of each kind of layer.
FULL, SPARSE = 0, 1


class HybridSelfAttention(SelfAttention):
    """Self-attention that knows which RoPE is its own: of full or of sparse layers."""

    def __init__(self, *args, rope_kind: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rope_kind = rope_kind


class DocumentRope(torch.nn.Module):
    """Takes the place of GPTModel's rotary embedding: RoPE by position within the document.

    GPTModel asks for that of rows 0 ... S - 1; the positions of the batch at hand are set
    beforehand by `set_positions`, since GPTModel ignores its position_ids.
    """

    def __init__(self, full: torch.Tensor, sparse: torch.Tensor) -> None:
        super().__init__()
        # Not a buffer: the engine casts buffers to bfloat16, and 128K positions need float32.
        self.frequencies = torch.stack((full, sparse)).float()
        self.positions_BS: torch.Tensor | None = None

    def set_positions(self, positions_BS: torch.Tensor) -> None:
        """positions_BS: int64 [B, S], of this rank's share of the rows."""
        self.positions_BS = positions_BS

    def get_rotary_seq_len(self, *args) -> int:
        """Row length, for GPTModel."""
        return self.positions_BS.shape[1]

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """cos and sin of each kind of layer's angles, float32 [2, 2, S, B, 1, H]."""
        positions_SB = self.positions_BS.t().float()
        self.frequencies = frequencies = self.frequencies.to(positions_SB.device)
        half = positions_SB[None, :, :, None, None] * frequencies[:, None, None, None, :]
        angles = torch.cat((half, half), dim=-1)
        return torch.stack((angles.cos(), angles.sin()), dim=1)


def hybrid_layer_specs(config: ModelConfig) -> TransformerBlockSubmodules:
    """One spec per layer, with its pattern and its kind of RoPE."""
    specs = []
    for layer in range(config.num_layers):
        spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
        attention = spec.submodules.self_attention
        attention.module = HybridSelfAttention
        attention.params = {
            **(attention.params or {}),
            "rope_kind": FULL if config.is_full[layer] else SPARSE,
        }
        attention.submodules.core_attention = partial(
            PatternAttention, pattern=config.pattern_of(layer)
        )
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.mlp.params = {"ffn_hidden_size": config.ffn_hidden_size}
        spec.module = HybridLayer
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)

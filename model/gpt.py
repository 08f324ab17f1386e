"""The trained model: megatron-core's GPTModel with the hybrid's layers, RoPE and loss.

Shapes: B rows of the micro-batch, S row length, or this rank's share of it under Ulysses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from .config import ModelConfig
from .hybrid_layer import LayerMemory
from .layer_spec import DocumentRope, hybrid_layer_specs
from .loss import LossOutputLayer
from .rope import inverse_frequencies
from .sharding import padded_vocab


def transformer_config(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    tensor: int = 1,
    ulysses: int = 1,
    sequence_parallel: bool = False,
    initialize: bool = True,
) -> TransformerConfig:
    """Megatron's configuration of a Llama; every fusion that needs apex or TE is off.

    Args:
        initialize: draw random weights; without, they are whatever memory holds, to be filled.
    """
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tensor,
        context_parallel_size=ulysses,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=initialize,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # The default, "full", is deprecated and becomes this.
        cuda_graph_scope=[],
    )


class HybridGPT(GPTModel):
    """GPTModel over packed rows: forward(tokens, positions, cu_seqlens, labels) -> losses."""

    def __init__(
        self,
        config: ModelConfig,
        megatron: TransformerConfig,
        row_length: int,
        memory: LayerMemory | None = None,
    ) -> None:
        super().__init__(
            config=megatron,
            transformer_layer_spec=hybrid_layer_specs(config),
            vocab_size=padded_vocab(config.vocab_size, megatron.tensor_model_parallel_size),
            max_sequence_length=row_length,
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="rope",
        )
        # On the host wherever the weights are made: powers differ in their last bits by device.
        with torch.device("cpu"):
            self.rotary_pos_emb = DocumentRope(
                inverse_frequencies(config.head_dim, config.rope),
                inverse_frequencies(config.head_dim, config.sparse_rope),
            )
        for parameter in self.parameters():
            # Megatron marks sharded weights while it initializes them. Without the mark a gradient
            # norm would count one rank's shards alone.
            if parameter.dim() > 1:
                parameter.tensor_model_parallel = True
        # GPTModel builds the output layer itself; this one differs in its forward alone.
        self.output_layer.__class__ = LossOutputLayer
        self.output_layer.valid_vocab = config.vocab_size
        self.memory = memory or LayerMemory()
        for layer in self.decoder.layers:
            layer.memory = self.memory

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        cu_seqlens: torch.Tensor,
        labels_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Losses [B, S] in nats with labels, else logits [B, S, vocab].

        What an earlier forward kept for its backward is forgotten where layers recompute.

        Args:
            positions_BS: int64, each token's position within its document.
            cu_seqlens: int32 on the host, documents of all whole rows one after another, from 0.
            labels_BS: int64, model.loss.IGNORED where there is nothing to predict.
        """
        if torch.is_grad_enabled():
            self.memory.kept.clear()
        self.rotary_pos_emb.set_positions(positions_BS)
        packed = PackedSeqParams(
            qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens
        )
        return super().forward(
            tokens_BS, positions_BS, None, labels=labels_BS, packed_seq_params=packed
        )

    def _postprocess(self, hidden_states, input_ids, position_ids, labels, *args, **kwargs):
        if labels is None:
            return super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, **kwargs
            )
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else None
        )
        return self.output_layer(hidden_states, weight=weight, labels=labels)

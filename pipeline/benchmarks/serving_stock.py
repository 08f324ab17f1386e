"""Stock transformers as the outside reference: its Llama, its static cache, SDPA, no graph.

Shapes: B rows, L tokens.
"""

from __future__ import annotations

import torch

from model.engine_weights import EngineWeights
from model.modeling_longgen import LongGenConfig


class StockLlama:
    """transformers' LlamaForCausalLM on an engine's own weights, which it only looks at.

    Attributes:
        cache: the static cache of the rows; None before `reserve`.
    """

    def __init__(self, config: LongGenConfig, weights: EngineWeights) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.config = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=weights.head is weights.embed,
            rope_parameters=dict(config.rope),
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.model = LlamaForCausalLM(self.config)
        self.model.load_state_dict(_named(config, weights), assign=True)
        self.model.tie_weights()
        self.device = weights.embed.device
        self.model.model.rotary_emb = LlamaRotaryEmbedding(self.config).to(self.device)
        self.model.eval().requires_grad_(False)
        self.cache = None

    def reserve(self, tokens: int) -> None:
        """A cache for rows of so many tokens; its memory comes with the first of them."""
        from transformers import StaticCache

        self.cache = None
        self.cache = StaticCache(config=self.config, max_cache_len=tokens)

    def cache_bytes(self) -> int:
        """Bytes of the storage behind keys and values."""
        layers = self.cache.layers
        return sum(x.untyped_storage().nbytes() for n in layers for x in (n.keys, n.values))

    @torch.no_grad()
    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The likeliest next token of each row, [B, 1]."""
        found = self.model(ids_BL, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1:].argmax(-1)


def _named(config: LongGenConfig, weights: EngineWeights) -> dict[str, torch.Tensor]:
    """Views of the fused weights by Hugging Face's names."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    named = {
        "model.embed_tokens.weight": weights.embed,
        "model.norm.weight": weights.norm,
        "lm_head.weight": weights.head,
    }
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split((queries, keys, keys))
        gate, up = layer.gate_up.chunk(2)
        own = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.out,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
            "input_layernorm": layer.input_norm,
            "post_attention_layernorm": layer.post_norm,
        }
        named |= {f"model.layers.{index}.{name}.weight": x for name, x in own.items()}
    return named

"""Tiny random models for tests, as Hugging Face's and as Megatron's."""

from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kernels.pattern import Pattern
from model.config import ModelConfig

PATTERNS = {
    "sink": Pattern(sink_tokens=4, window=16, block=8),
    "strided": Pattern(sink_tokens=4, window=12, block=8, stride=3),
    "per_head": Pattern(sink_tokens=4, window=12, block=8, stride=4, phase="per_head"),
}


def tiny_config(
    kv_heads=2, heads=4, tied=False, is_full=(True,) * 4, pattern=PATTERNS["sink"], **changes
):
    """A ModelConfig with heads of 16 dimensions, vocabulary 97."""
    config = ModelConfig(
        num_layers=len(is_full),
        hidden_size=64,
        ffn_hidden_size=96,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        vocab_size=97,
        max_positions=4096,
        norm_eps=1e-5,
        tie_embeddings=tied,
        rope={"rope_type": "default", "rope_theta": 1e4},
        sparse_rope={"rope_type": "default", "rope_theta": 1e4},
        is_full=is_full,
        pattern=pattern,
    )
    return replace(config, **changes)


def tiny_llama(config: ModelConfig, seed=0, **changes) -> LlamaForCausalLM:
    """transformers' Llama of this shape with random weights, norms among them, in float32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            rope_parameters=dict(config.rope),
            initializer_range=0.2,
            **changes,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def tiny_gpt(
    config: ModelConfig, llama: LlamaForCausalLM | None = None, row_length=64, memory=None, **kwargs
):
    """HybridGPT on one process, with the weights of `llama`; needs the `layout` fixture."""
    from model.gpt import HybridGPT, transformer_config
    from model.mapping import megatron_to_hf_names, merge

    megatron = transformer_config(config, torch.float32, **kwargs)
    model = HybridGPT(config, megatron, row_length, memory)
    if llama is not None:
        theirs = llama.state_dict()
        ours = dict(model.named_parameters())
        for name, sources in megatron_to_hf_names(config).items():
            merged = merge(name, tuple(theirs[s] for s in sources), config)
            ours.pop(name).data.copy_(merged)
        assert not ours
    return model

"""Small random models and patterns that the tests of the exported class share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.modeling_longgen import LongGenConfig, LongGenForCausalLM

VOCAB = 97
PATTERNS = {
    "window": dict(sink_tokens=3, window=8, block=4),
    "shared": dict(sink_tokens=3, window=8, block=4, stride=3),
    "per_head": dict(sink_tokens=2, window=7, block=2, stride=4, phase="per_head"),
    "full": dict(sink_tokens=0, window=None),
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def small_model(pattern: dict, is_full=(False, True, False), **overrides) -> LongGenForCausalLM:
    """A hybrid of three layers, float32, whose weights are wide enough for attention to matter."""
    values = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(is_full),
        num_attention_heads=4,
        num_key_value_heads=2,
        pattern=pattern,
        is_full=list(is_full),
        rope={"rope_type": "default", "rope_theta": 5e4},
        sparse_rope={"rope_type": "default", "rope_theta": 1e4},
        eos_token_id=None,
    )
    torch.manual_seed(5)
    model = LongGenForCausalLM(LongGenConfig(**{**values, **overrides})).eval()
    widen(model)
    return model


def llama_and_ours(kv_heads: int = 2, tied: bool = False, rope: dict = ROPE):
    """transformers' Llama and our class, every layer full, on the same weights by names alone."""
    shape = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        rms_norm_eps=1e-3,
        tie_word_embeddings=tied,
        eos_token_id=None,
    )
    llama = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=dict(rope))).eval()
    widen(llama)
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ours = LongGenForCausalLM(LongGenConfig(**shape, rope=rope)).eval()
    ours.load_state_dict(llama.state_dict(), strict=True)
    return llama, ours


def widen(model: torch.nn.Module) -> None:
    """Weights of unit gain, so that what a query sees decides its logits."""
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            gain = 1.0 if "embed" in name or "lm_head" in name else 2.0
            torch.nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def in_chunks(model: LongGenForCausalLM, tokens: torch.Tensor, chunk: int):
    """Logits of all columns and the cache, `chunk` columns at a time."""
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(x, past_key_values=cache).logits for x in tokens.split(chunk, 1)]
    return torch.cat(parts, 1), cache

"""LongGen for transformers: a Llama whose layers are full or sparse, each by a `Pattern`.

One class for export, evaluation, serving and as the oracle that training is compared with.
Parameters are named as in transformers' LlamaForCausalLM. Positions count from a document's first
token: a row is one document, or several where `cu_seqlens` says so; padding has no position.

Shapes: B rows, L columns, T packed tokens, D hidden, N query heads, G KV heads, H head dim,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import LongGenCache
from .pattern import Pattern
from .rope import inverse_frequencies, rotate
from .tokens import CachedTokens, PackedTokens

# New tokens for which generate's cache has room from the start.
MOST_RESERVED = 2048


class LongGenConfig(PreTrainedConfig):
    """Llama's fields and the hybrid's.

    pattern: fields of `Pattern`, for the sparse layers. is_full: for each layer, whether it is
    full (None: all). rope, sparse_rope: rope parameters of full and of sparse layers, as in rope.py
    (sparse_rope None: those of `rope`).
    """

    model_type = "longgen"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    pattern: dict | None = None
    is_full: list | None = None
    rope: dict | None = None
    sparse_rope: dict | None = None

    def __post_init__(self, **kwargs) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.pattern = asdict(Pattern(**(self.pattern or {})))
        self.is_full = [True] * self.num_hidden_layers if self.is_full is None else self.is_full
        self.is_full = [bool(kind) for kind in self.is_full]
        self.rope = self.rope or {"rope_type": "default", "rope_theta": 1e4}
        self.sparse_rope = self.sparse_rope or self.rope
        if len(self.is_full) != self.num_hidden_layers:
            raise ValueError(
                f"is_full has {len(self.is_full)} entries: must have one for each of the "
                f"{self.num_hidden_layers} layers; correct config.json"
            )
        super().__post_init__(**kwargs)

    def layer_patterns(self) -> list[Pattern]:
        """The pattern of each layer."""
        sparse, full = Pattern(**self.pattern), Pattern.full()
        return [full if kind else sparse for kind in self.is_full]


class LongGenRMSNorm(nn.Module):
    """x / rms(x) in float32, then times the weight in x's dtype (as Llama does)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LongGenMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LongGenConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LongGenAttention(nn.Module):
    """Grouped-query attention over the layer's pattern."""

    def __init__(self, config: LongGenConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.pattern = config.layer_patterns()[layer]
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x_TD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        tokens: PackedTokens | CachedTokens,
    ) -> torch.Tensor:
        """[T, D] to [T, D]; `rotation` holds the cosines and sines [T, 1, H]."""
        heads = (-1, self.head_dim)
        q_TNH = rotate(self.q_proj(x_TD).unflatten(-1, heads), *rotation)
        k_TGH = rotate(self.k_proj(x_TD).unflatten(-1, heads), *rotation)
        v_TGH = self.v_proj(x_TD).unflatten(-1, heads)
        out_TNH = tokens.attend(self.layer, self.pattern, q_TNH, k_TGH, v_TGH)
        return self.o_proj(out_TNH.flatten(1))


class LongGenDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm, each added to the stream."""

    def __init__(self, config: LongGenConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = LongGenAttention(config, layer)
        self.mlp = LongGenMLP(config)
        self.input_layernorm = LongGenRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LongGenRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        tokens: PackedTokens | CachedTokens,
    ) -> torch.Tensor:
        """[T, D] to [T, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, tokens)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class LongGenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes."""

    config_class = LongGenConfig
    base_model_prefix = "model"
    _no_split_modules = ["LongGenDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]


class LongGenModel(LongGenPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: LongGenConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LongGenDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LongGenRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def _rotation(
        self, positions: torch.Tensor, rope: dict, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, H] of positions [T]: angles in float32, then `dtype`."""
        inverse = inverse_frequencies(self.config.head_dim, rope).to(positions.device)
        angles = positions[:, None, None].float() * inverse.repeat(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x_BLD: torch.Tensor, tokens: PackedTokens | CachedTokens) -> torch.Tensor:
        """Embeddings [B, L, D] to the final norm's output [B, L, D]."""
        x_TD = tokens.pack(x_BLD)
        ropes = {True: self.config.rope, False: self.config.sparse_rope}
        rotations = {
            kind: self._rotation(tokens.positions, ropes[kind], x_TD.dtype)
            for kind in set(self.config.is_full)
        }
        for layer, kind in zip(self.layers, self.config.is_full, strict=True):
            x_TD = layer(x_TD, rotations[kind], tokens)
        return tokens.unpack(self.norm(x_TD))


class LongGenForCausalLM(LongGenPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongGenConfig) -> None:
        super().__init__(config)
        self.model = LongGenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, tokens: int = 0) -> LongGenCache:
        """An empty cache for this model, with memory for rows of so many tokens, padding included.

        More are taken too, at the price of a copy of what is held.
        """
        patterns = self.config.layer_patterns()
        return LongGenCache(patterns, self.config.num_key_value_heads, tokens=tokens)

    def _tokens(
        self,
        shape: tuple[int, int],
        device: torch.device,
        attention_mask: torch.Tensor | None,
        cache: LongGenCache | None,
        cu_seqlens: torch.Tensor | None,
    ) -> PackedTokens | CachedTokens:
        """Lay out the columns of one forward."""
        batch, columns = shape
        if cu_seqlens is not None:
            bounds = cu_seqlens.cpu().long()
            padded = attention_mask is not None and not bool(attention_mask.all())
            if batch != 1 or cache is not None or padded or int(bounds[-1]) != columns:
                raise ValueError(
                    f"cu_seqlens ending at {int(bounds[-1])} with {batch} rows of {columns}: must "
                    "describe one packed row, without cache or padding; pass rows one by one"
                )
            return PackedTokens.from_lengths(bounds.diff(), None, shape, device, None)
        if cache is not None and not isinstance(cache, LongGenCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: must be a LongGenCache, which drops "
                "what sparse layers never see again; pass model.new_cache() or none"
            )
        seen = 0 if cache is None else cache.columns
        real = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, seen + columns):
                raise ValueError(
                    f"attention_mask {tuple(attention_mask.shape)}: must be "
                    f"{(batch, seen + columns)}, rows x columns (cached and new), 1 for tokens and "
                    "0 for padding; pass the tokenizer's"
                )
            real = attention_mask[:, seen:].bool()
        fresh = cache is None or not cache.started
        if fresh and real is not None:
            # A step of decoding does not ask: that would be waiting for the device.
            real = None if bool(real.all()) else real
        every = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real
        if cache is not None:
            cache.advance(every)
        if fresh and bool(every.any()):
            return PackedTokens.from_lengths(every.sum(1).cpu(), real, shape, device, cache)
        if cache is None:
            raise ValueError(
                f"attention_mask of {tuple(shape)} has no token; pass at least one 1 in it"
            )
        return CachedTokens(cache.query_positions.flatten(), shape, cache)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: LongGenCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seqlens: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits and, with labels, the loss.

        Args:
            input_ids: [B, L]; or inputs_embeds [B, L, D].
            attention_mask: [B, cached columns + L], 1 for tokens and 0 for padding (on any side).
            past_key_values: what earlier tokens left; with use_cache, made where it is None.
            labels: [B, L], -100 for none. The loss is the mean of -log p(labels[t + 1] | ..t) in
                nats over the pairs of neighbours that lie within one document.
            logits_to_keep: only the last so many columns' logits, or these columns'; 0 for all.
            cu_seqlens: document bounds [documents + 1], from 0 to L, of one packed row (B = 1).

        Raises:
            ValueError: where mask, cache, cu_seqlens or labels do not fit the tokens.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need every column's logits; pass logits_to_keep=0")
        x_BLD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self.new_cache() if use_cache and past_key_values is None else past_key_values
        shape = tuple(x_BLD.shape[:2])
        tokens = self._tokens(shape, x_BLD.device, attention_mask, cache, cu_seqlens)
        x_BLD = self.model(x_BLD, tokens)
        kept = logits_to_keep
        kept = slice(-kept if kept else None, None) if isinstance(kept, int) else kept
        logits = self.lm_head(x_BLD[:, kept])
        loss = None
        if labels is not None:
            target = self._targets(labels, attention_mask, cu_seqlens).flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def _targets(
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """What each column but the last should predict, [B, L - 1]; -100 across documents."""
        target = labels[:, 1:].clone()
        if attention_mask is not None:
            real = attention_mask[:, -labels.shape[1] :].bool()
            target[~(real[:, 1:] & real[:, :-1])] = -100
        if cu_seqlens is not None:
            first = cu_seqlens[1:-1].to(target.device).long()
            target[:, first[first < labels.shape[1]] - 1] = -100
        return target

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        chunk: int = 1024,
    ) -> torch.Tensor:
        """-log p(token t + 1 | ..t) in nats, float32 [B, L - 1]; 0 across documents and at padding.

        `chunk` columns' logits exist at a time, so that long rows fit.
        """
        x_BLD = self.model.embed_tokens(input_ids)
        tokens = self._tokens(
            tuple(input_ids.shape), x_BLD.device, attention_mask, None, cu_seqlens
        )
        x_BLD = self.model(x_BLD, tokens)[:, :-1]
        target = self._targets(input_ids, attention_mask, cu_seqlens)
        parts = [
            F.cross_entropy(self.lm_head(x).float().transpose(1, 2), t, reduction="none")
            for x, t in zip(x_BLD.split(chunk, 1), target.split(chunk, 1), strict=True)
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        chunk: int,
        attention_mask: torch.Tensor | None = None,
        past_key_values: LongGenCache | None = None,
    ) -> tuple[LongGenCache, torch.Tensor]:
        """Take in a prompt `chunk` columns at a time; attention_mask as in `forward`.

        Returns:
            the cache and the last column's logits [B, V].
        """
        cache = self.new_cache() if past_key_values is None else past_key_values
        cache.reserve(cache.columns + input_ids.shape[1])
        for ids in input_ids.split(chunk, dim=1):
            stop = cache.columns + ids.shape[1]
            mask = None if attention_mask is None else attention_mask[:, :stop]
            logits = self(ids, mask, past_key_values=cache, logits_to_keep=1).logits
        return cache, logits[:, -1]

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """generate's hook: what stop strings need a tokenizer for is no business of `forward`."""
        kwargs.pop("tokenizer", None)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, *args, **kwargs
    ) -> None:
        """generate's hook: our cache, with room for the whole text, for transformers' own."""
        given = model_kwargs.get("past_key_values")
        if given is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: must be unset, "
                "since sparse layers need a LongGenCache; remove it from generate's arguments"
            )
        # The last token is never fed back; a text that may become long takes memory as it does.
        tokens, mask = generation_config.max_length - 1, model_kwargs.get("attention_mask")
        if mask is not None:
            tokens = min(tokens, mask.shape[1] + MOST_RESERVED)
        model_kwargs["past_key_values"] = self.new_cache(tokens)

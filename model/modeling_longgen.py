"""LongGen for transformers: a Llama whose layers are full or sparse, each by a `Pattern`.

One class for export, evaluation, serving and as the oracle that training is compared with.
Parameters are named as in transformers' LlamaForCausalLM. Positions count from a document's first
token: a row is one document, or several where `cu_seqlens` says so; padding has no position.

Shapes: B rows, L columns, T packed tokens, D hidden, N query heads, G KV heads, H head dim,
V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache import LongGenCache
from .configuration_longgen import LongGenConfig
from .rope import inverse_frequencies, rotate
from .tokens import CachedTokens, PackedTokens, lay_out

# New tokens for which generate's cache has room from the start.
MOST_RESERVED = 2048


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


class LongGenDecoderLayer(GradientCheckpointingLayer):
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
    supports_gradient_checkpointing = True


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

    def new_cache(self, tokens: int = 0) -> LongGenCache:
        """An empty cache for this model, with memory for rows of so many tokens, padding included.

        More are taken too, at the price of a copy of what is held.
        """
        patterns = self.config.layer_patterns()
        return LongGenCache(patterns, self.config.num_key_value_heads, tokens=tokens)

    def lay_out(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: LongGenCache | None,
        use_cache: bool | None,
        **others,
    ) -> PackedTokens | CachedTokens:
        """Lay out one forward's tokens, with a new cache where use_cache asks for one."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("must have either input_ids or inputs_embeds; pass one of them")
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            # A layer that is computed again would write its keys again.
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values with gradient checkpointing: must be None in training; leave "
                    "it out, or call model.eval()"
                )
            use_cache = False
        cache = self.new_cache() if use_cache and past_key_values is None else past_key_values
        given = input_ids if inputs_embeds is None else inputs_embeds
        shape = given.shape[0], given.shape[1]
        return lay_out(shape, given.device, attention_mask, cache, **others)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: LongGenCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        tokens: PackedTokens | CachedTokens | None = None,
        **others,
    ) -> BaseModelOutputWithPast:
        """The final norm's output; the arguments are LongGenForCausalLM's.

        Args:
            tokens: what lay_out made of the others before.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions=True: must be False, since attention never holds its "
                "probabilities; leave it out"
            )
        if tokens is None:
            tokens = self.lay_out(
                input_ids, inputs_embeds, attention_mask, past_key_values, use_cache, **others
            )
        x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x_TD = tokens.pack(x_BLD)
        ropes = {True: self.config.rope, False: self.config.sparse_rope}
        rotations = {
            kind: self._rotation(tokens.positions, ropes[kind], x_TD.dtype)
            for kind in set(self.config.is_full)
        }
        wants_all = output_hidden_states
        wants_all = self.config.output_hidden_states if wants_all is None else wants_all
        states = []
        for layer, kind in zip(self.layers, self.config.is_full, strict=True):
            if wants_all:
                states.append(tokens.unpack(x_TD))
            x_TD = layer(x_TD, rotations[kind], tokens)
        x_BLD = tokens.unpack(self.norm(x_TD))
        return BaseModelOutputWithPast(
            last_hidden_state=x_BLD,
            past_key_values=tokens.cache,
            hidden_states=(*states, x_BLD) if wants_all else None,
        )


class LongGenForCausalLM(LongGenPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # transformers' Trainer then passes num_items_in_batch.
    accepts_loss_kwargs = True

    def __init__(self, config: LongGenConfig) -> None:
        super().__init__(config)
        self.model = LongGenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, tokens: int = 0) -> LongGenCache:
        """An empty cache, with memory for rows of so many tokens: see LongGenModel.new_cache."""
        return self.model.new_cache(tokens)

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
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **others,
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
            position_ids: [B or 1, L], from 0 at each document's start, several of which may lie in
                a row. None: a row is a document, or those of cu_seqlens.
            output_hidden_states: also return the embeddings, the output of each layer but the last,
                and the final norm's, L + 1 of [B, L, D]; output_attentions must not be True.
            num_items_in_batch: divides the loss's sum, in place of the number of pairs.
            others: cu_seq_lens_q and what goes with it, other names of cu_seqlens; cache_position,
                another of position_ids.

        Raises:
            ValueError: where mask, cache, bounds, positions or labels do not fit the tokens.
            TypeError: for an argument that is not known.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need every column's logits; pass logits_to_keep=0")
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        others |= {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
        tokens = self.model.lay_out(
            **given,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **others,
        )
        found = self.model(
            **given,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            tokens=tokens,
        )
        kept = logits_to_keep
        kept = slice(-kept if kept else None, None) if isinstance(kept, int) else kept
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            target = self._targets(labels, tokens).flatten()
            counted = {} if num_items_in_batch is None else {"reduction": "sum"}
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target, **counted)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    @staticmethod
    def _targets(labels: torch.Tensor, tokens: PackedTokens | CachedTokens) -> torch.Tensor:
        """What each column but the last should predict, [B, L - 1]; -100 across documents."""
        # From 1 at a document's start; 0 at padding.
        place = tokens.unpack(tokens.positions + 1)
        neighbours = (place[:, 1:] == place[:, :-1] + 1) & (place[:, :-1] > 0)
        return labels[:, 1:].masked_fill(~neighbours, -100)

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
        shape = input_ids.shape[0], input_ids.shape[1]
        tokens = lay_out(shape, input_ids.device, attention_mask, None, cu_seqlens)
        x_BLD = self.model(input_ids, tokens=tokens).last_hidden_state[:, :-1]
        target = self._targets(input_ids, tokens)
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

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs
    ) -> dict:
        """generate's hook; that it names inputs_embeds lets generate take them."""
        # Stop strings need it, `forward` does not.
        kwargs.pop("tokenizer", None)
        if not is_first_iteration:
            # generate counts on, as the cache does: to compare would be waiting for the device.
            kwargs.pop("position_ids", None)
        return super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

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

"""A model's weights as serving multiplies them: fused by layer, a shard of them on each rank.

Tensors are asked for one at a time, by Hugging Face's names, from wherever they are: a folder, a
model in memory, a random generator. A rank reads its own slices only.

Shapes: D hidden, F width of the MLP, V vocabulary, H head dim, N query heads and G KV heads of the
whole model; n, g, f those of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.modeling_longgen import LongGenConfig

# (name, slices of its first dimensions) -> that part of the tensor, on any device.
Read = Callable[[str, tuple[slice, ...]], torch.Tensor]


class ServingError(ValueError):
    """What cannot be served; the message names the value, what is legal and the remedy."""


@dataclass(frozen=True)
class Shard:
    """Which of `size` tensor-parallel ranks this is."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """This rank's part of `count` things."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def check(self, config: LongGenConfig) -> None:
        """Refuse a model that does not divide.

        Raises:
            ServingError: naming the key and the sizes that would do.
        """
        for key in ("num_key_value_heads", "intermediate_size"):
            value = getattr(config, key)
            if value % self.size:
                legal = [n for n in range(1, value + 1) if value % n == 0][:8]
                raise ServingError(
                    f"tensor parallelism over {self.size} processes: must divide {key}={value}; "
                    f"start {', '.join(map(str, legal))}, ..."
                )


@dataclass
class LayerWeights:
    """qkv [(n + 2 g) H, D]: queries, keys, values; out [D, n H]; gate_up [2 f, D]; down [D, f]."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    input_norm: torch.Tensor
    post_norm: torch.Tensor


@dataclass
class EngineWeights:
    """embed [V, D], whole on each rank; head [V or V / size, D]; norm [D]."""

    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes on this rank; a head that is the embedding counts once."""
        tensors = [self.embed, self.norm] + [x for w in self.layers for x in vars(w).values()]
        tensors += [] if self.head is self.embed else [self.head]
        return sum(x.nbytes for x in tensors)


def load_weights(
    read: Read,
    config: LongGenConfig,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = Shard(),  # noqa: B008
    told: Callable[[int, int], None] = lambda done, layers: None,
) -> EngineWeights:
    """This rank's weights on the device; `told(done, layers)` hears of each layer.

    Raises:
        ServingError: for a tensor of another shape than the configuration's, or a model that the
            shard does not divide.
    """
    shard.check(config)
    hidden, head_dim, width = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim

    def part(name: str, *shape: int, split: int | None = None) -> torch.Tensor:
        within = [slice(0, count) for count in shape]
        if split is not None:
            within[split] = shard.of(shape[split])
        found = read(f"{name}.weight", tuple(within))
        wanted = tuple(bounds.stop - bounds.start for bounds in within)
        if tuple(found.shape) != wanted:
            raise ServingError(
                f"{name}.weight: a part of shape {tuple(found.shape)} where the configuration has "
                f"{wanted}; export the model again, or correct its config.json"
            )
        return found

    def stacked(*parts: tuple[str, int]) -> torch.Tensor:
        rows = [count // shard.size for _, count in parts]
        fused = torch.empty(sum(rows), hidden, dtype=dtype, device=device)
        for target, (name, count) in zip(fused.split(rows), parts, strict=True):
            target.copy_(part(name, count, hidden, split=0))
        return fused

    def alone(name: str, *shape: int, split: int | None = None) -> torch.Tensor:
        return part(name, *shape, split=split).to(device, dtype).contiguous()

    layers = []
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}"
        attention = (("q", queries), ("k", keys), ("v", keys))
        layers.append(
            LayerWeights(
                qkv=stacked(*((f"{at}.self_attn.{x}_proj", rows) for x, rows in attention)),
                out=alone(f"{at}.self_attn.o_proj", hidden, queries, split=1),
                gate_up=stacked((f"{at}.mlp.gate_proj", width), (f"{at}.mlp.up_proj", width)),
                down=alone(f"{at}.mlp.down_proj", hidden, width, split=1),
                input_norm=alone(f"{at}.input_layernorm", hidden),
                post_norm=alone(f"{at}.post_attention_layernorm", hidden),
            )
        )
        told(index + 1, config.num_hidden_layers)
    embed = alone("model.embed_tokens", config.vocab_size, hidden)
    split = shard.size > 1 and config.vocab_size % shard.size == 0
    if not config.tie_word_embeddings:
        head = alone("lm_head", config.vocab_size, hidden, split=0 if split else None)
    else:
        head = embed[shard.of(config.vocab_size)] if split else embed
    return EngineWeights(embed, layers, alone("model.norm", hidden), head)


def random_reader(device: torch.device, seed: int, deviation: float = 0.02) -> Read:
    """Weights drawn on the device, norms of ones; each rank draws its own, so sharding matters."""
    generator = torch.Generator(device).manual_seed(seed)

    def read(name: str, within: tuple[slice, ...]) -> torch.Tensor:
        size = [part.stop - part.start for part in within]
        if len(size) == 1:
            return torch.ones(size, device=device)
        drawn = torch.empty(size, dtype=torch.bfloat16, device=device)
        return drawn.normal_(0, deviation, generator=generator)

    return read


def model_reader(model: torch.nn.Module) -> Read:
    """The weights of a model in memory, such as LongGenForCausalLM."""
    tensors = model.state_dict()
    return lambda name, within: tensors[name][within]

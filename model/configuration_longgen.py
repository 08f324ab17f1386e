"""The configuration of a LongGen model for transformers, and the version that the model needs."""

from __future__ import annotations

from dataclasses import asdict

import transformers

from .pattern import Pattern

# The oldest that an export was loaded, run and saved again with.
MIN_TRANSFORMERS = (5, 17)

if tuple(map(int, transformers.__version__.split(".")[:2])) < MIN_TRANSFORMERS:
    raise ImportError(
        f"transformers {transformers.__version__} cannot load a LongGen model: must be "
        "{}.{} or newer; pip install --upgrade transformers".format(*MIN_TRANSFORMERS)
    )


class LongGenConfig(transformers.PreTrainedConfig):
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

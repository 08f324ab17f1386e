import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.mapping import (
    EMBEDDING,
    OUTPUT,
    MappingError,
    config_from_hf,
    hf_shapes,
    megatron_shape,
    megatron_to_hf_names,
    merge,
    split,
)
from model.sharding import Block, fragment_blocks, padded_vocab, shard_blocks, shard_shape
from tests.closeness import assert_close_by_norm, relative_error

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
SHAPES = {
    "mha": {"num_key_value_heads": 8, "tie_word_embeddings": False},
    "gqa": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "gqa_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_attention_heads": 8,
        # Not hidden_size / heads, and a vocabulary that neither 2 nor 4 divides.
        "head_dim": 8,
        "vocab_size": 101,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**values | changes)).eval()


@pytest.fixture(scope="module", params=SHAPES)
def case(request) -> tuple[LlamaForCausalLM, ModelConfig]:
    model = llama(**SHAPES[request.param])
    return model, config_from_hf(model.config.to_dict())


def to_megatron(model: LlamaForCausalLM, config: ModelConfig) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {
        name: merge(name, [state[source] for source in sources], config)
        for name, sources in megatron_to_hf_names(config).items()
    }


def logits(model: LlamaForCausalLM, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a model of the same shape with these weights (tied embeddings given once)."""
    other = LlamaForCausalLM(model.config).eval()
    if model.config.tie_word_embeddings:
        state = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    other.load_state_dict(state)
    ids = torch.arange(20).reshape(1, -1) * 5
    with torch.no_grad():
        return other(ids).logits


def test_names_and_shapes_are_those_of_transformers(case):
    model, config = case
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    assert hf_shapes(config) == shapes
    assert (OUTPUT in megatron_to_hf_names(config)) != config.tie_embeddings


def within(block: Block) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(block.offsets, block.sizes, strict=True))


def tp_shard(name, whole, rank, size, config) -> torch.Tensor:
    """What a rank holds, zeros where it holds nothing of the whole."""
    flat = torch.zeros(shard_shape(name, config, size)).flatten()
    for block in shard_blocks(name, config, rank, size):
        part = whole[within(block)].flatten()
        flat[block.start : block.start + len(part)] = part
    return flat.view(shard_shape(name, config, size))


def tp_unshard(name, shards, config) -> torch.Tensor:
    """The whole, of fragments of 97 elements of every rank's shard."""
    whole = torch.full(megatron_shape(name, config), float("nan"))
    for rank, shard in enumerate(shards):
        blocks = shard_blocks(name, config, rank, len(shards))
        for start in range(0, shard.numel(), 97):
            fragment = shard.flatten()[start : start + 97]
            for block in fragment_blocks(blocks, start, start + len(fragment)):
                count = whole[within(block)].numel()
                part = fragment[block.start : block.start + count]
                whole[within(block)] = part.view(block.sizes)
    return whole


@pytest.mark.parametrize("size", [1, 2, 4])
def test_round_trip_is_bit_exact(case, size):
    model, config = case
    found = {}
    for name, tensor in to_megatron(model, config).items():
        shards = [tp_shard(name, tensor, rank, size, config) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        found |= split(name, tp_unshard(name, shards, config), config)
    state = model.state_dict()
    assert set(found) == set(hf_shapes(config))
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_projection_as_megatron_reads_it(case, size):
    """Each rank's output, viewed per KV group as [its query heads, k, v], is transformers' own."""
    model, config = case
    x = torch.randn(5, config.hidden_size)
    attention = model.model.layers[1].self_attn
    whole = to_megatron(model, config)[QKV]
    head, groups = config.head_dim, config.num_kv_heads // size
    queries, keys, values = [], [], []
    for rank in range(size):
        mixed = x @ tp_shard(QKV, whole, rank, size, config).T
        q, k, v = mixed.view(5, groups, -1).split(
            [mixed.shape[1] // groups - 2 * head, head, head], -1
        )
        queries.append(q.reshape(5, -1))
        keys.append(k.reshape(5, -1))
        values.append(v.reshape(5, -1))
    for found, projection in (
        (queries, attention.q_proj),
        (keys, attention.k_proj),
        (values, attention.v_proj),
    ):
        assert_close_by_norm(torch.cat(found, 1), projection(x), 1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_mlp_and_row_parallel_shards_sum_to_the_whole(case, size):
    model, config = case
    x = torch.randn(5, config.hidden_size)
    megatron = to_megatron(model, config)
    fc2, proj = FC1.replace("fc1", "fc2"), QKV.replace("qkv", "proj")
    total = 0
    for rank in range(size):
        gate, up = (x @ tp_shard(FC1, megatron[FC1], rank, size, config).T).chunk(2, -1)
        total = total + silu(gate) * up @ tp_shard(fc2, megatron[fc2], rank, size, config).T
    assert_close_by_norm(total, model.model.layers[0].mlp(x), 1e-5)
    shape = tp_shard(proj, megatron[proj], 0, size, config).shape
    assert shape == (config.hidden_size, config.num_heads * config.head_dim // size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_is_padded_with_zeros_to_a_multiple_of_the_ranks_only(case, size):
    model, config = case
    embedding = to_megatron(model, config)[EMBEDDING]
    rows = torch.cat([tp_shard(EMBEDDING, embedding, rank, size, config) for rank in range(size)])
    assert len(rows) == padded_vocab(101, size) == {1: 101, 2: 102, 4: 104}[size]
    assert not rows[101:].any()


@pytest.mark.parametrize("wrong", ["none", "plain_stack", "interleaved_rope", "swapped_fc1"])
def test_negative_controls_change_the_logits(case, wrong):
    """A wrong order of rows survives every check of shapes: only the logits tell."""
    model, config = case
    right = logits(model, {k: v for k, v in model.state_dict().items() if k in hf_shapes(config)})
    state = model.state_dict()
    converted = {}
    for name, sources in megatron_to_hf_names(config).items():
        parts = [state[source] for source in sources]
        tensor = merge(name, parts, config)
        if wrong == "plain_stack" and "linear_qkv" in name:
            tensor = torch.cat(parts)
        if wrong == "interleaved_rope" and "linear_qkv" in name:
            half = config.head_dim // 2
            q, k = (
                p.view(-1, 2, half, p.shape[1]).transpose(1, 2).reshape(p.shape) for p in parts[:2]
            )
            tensor = merge(name, [q, k, parts[2]], config)
        if wrong == "swapped_fc1" and "linear_fc1" in name:
            tensor = torch.cat(parts[::-1])
        converted |= split(name, tensor, config)
    found = logits(model, converted)
    if wrong == "none":
        assert torch.equal(found, right)
    else:
        assert relative_error(found, right) > 0.05


def test_refusals_name_value_and_remedy(case):
    model, config = case
    tensor = to_megatron(model, config)[QKV]
    parts = [model.state_dict()[source] for source in megatron_to_hf_names(config)[QKV]]
    with pytest.raises(MappingError, match=r"KV heads \(\d\) must be a multiple.*parallel.tensor"):
        tp_shard(QKV, tensor, 0, 16, config)
    with pytest.raises(MappingError, match="ffn_hidden_size .*70.* must be a multiple"):
        tp_shard(QKV, tensor, 0, 4, dataclasses.replace(config, ffn_hidden_size=70))
    with pytest.raises(MappingError, match="rank 2: must be from 0 to 1"):
        tp_shard(QKV, tensor, 2, 2, config)
    with pytest.raises(MappingError, match="no such Megatron tensor"):
        shard_blocks("decoder.layers.2.mlp.linear_fc1.weight", config, 0, 1)
    with pytest.raises(MappingError, match=r"shape \(\d+, 47\); must be"):
        split(QKV, tensor[:, 1:], config)
    with pytest.raises(MappingError, match=r"parts of shapes .*; must be"):
        merge(QKV, [parts[0][1:], *parts[1:]], config)


def test_parts_of_several_dtypes_keep_every_bit(case):
    """Merged models may have them: q in float16, k and v in bfloat16, say."""
    model, config = case
    state, sources = model.state_dict(), megatron_to_hf_names(config)[QKV]
    dtypes = (torch.float16, torch.bfloat16, torch.bfloat16)
    parts = [state[source].to(dtype) for source, dtype in zip(sources, dtypes, strict=True)]
    found = split(QKV, merge(QKV, parts, config), config)
    for source, part in zip(sources, parts, strict=True):
        assert torch.equal(found[source].to(part.dtype), part)
    assert merge(QKV, [part.bfloat16() for part in parts], config).dtype == torch.bfloat16


HF = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
FREQ = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {"factor": 8.0, **FREQ, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "keys, rope",
    [
        ({}, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_theta": 500000}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
        # Added by hand to what transformers 5 has written: the older key goes first, whole.
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", "factor": 8.0, **FREQ}},
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                **FREQ,
                "original_max_position_embeddings": 2048,
            },
        ),
    ],
)
def test_rope_of_new_and_older_keys(keys, rope):
    config = config_from_hf(HF | keys)
    assert config.rope == config.sparse_rope == rope
    assert config.rope is not config.sparse_rope
    # What transformers itself makes of the same keys.
    theirs = LlamaConfig(**copy.deepcopy(HF | keys)).rope_parameters
    assert {key: theirs[key] for key in rope} == rope


def test_defaults_are_those_of_transformers():
    config, theirs = config_from_hf(HF), LlamaConfig(**HF)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == theirs.head_dim
    assert config.max_positions == theirs.max_position_embeddings
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.is_full == (True, True)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "mistral"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"pretraining_tp": 2},
        {"quantization_config": {"bits": 4}},
        {"vocab_size": None},
        {"hidden_size": "64"},
        {"transformers_weights": "other.safetensors"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_theta": 1e4}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_config_refusals(keys):
    value = list(keys.values())[0]
    shown = repr(list(value.values())[0] if isinstance(value, dict) else value)
    with pytest.raises(MappingError, match="must be|needs") as error:
        config_from_hf(HF | keys)
    assert shown in str(error.value)
    assert "config.json" in str(error.value)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(MappingError, match="num_attention_heads=4: must be a multiple"):
        config_from_hf(HF | {"num_key_value_heads": 3})

"""Decoding over a cache's slots against the definition; Triton's interpreter where no GPU is."""

import pytest
import torch

import kernels.decode
from kernels.decode import SETTINGS, decode_attention, decode_attention_kernel
from kernels.pattern import Pattern
from tests.kernels.over_slots import (
    DEVICE,
    FIRST,
    PATTERNS,
    PLANTS,
    TOTAL,
    assert_close,
    attention_over_slots,
    tensors,
)

SHARD = {"first_kv_head": FIRST, "total_kv_heads": TOTAL}


def positions(pattern, new_tokens, kv_heads, slots, seed=0, dtype=torch.int64):
    """Two rows of different lengths in rings: slots in no order, a fifth of them empty."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads if pattern.heads_differ else 1
    k_positions = torch.stack(
        [torch.randperm(slots, generator=generator) for _ in range(2 * heads)]
    )
    k_positions = k_positions.view(2, heads, slots)
    k_positions[torch.rand(k_positions.shape, generator=generator) < 0.2] = -1
    q_positions = torch.arange(new_tokens) + torch.tensor([[slots - new_tokens], [slots // 3]])
    if new_tokens > 1:
        q_positions[1, 1] = -1
    return q_positions.to(DEVICE, dtype), k_positions.to(DEVICE, dtype)


def assert_matches(pattern, new_tokens, heads, kv_heads, head_dim, plant=None, tamper=None):
    q, k, v = tensors(2, new_tokens, heads, kv_heads, slots := 141, head_dim)
    where = positions(pattern, new_tokens, kv_heads, slots)
    asked, first = plant(pattern, FIRST) if plant else (pattern, FIRST)
    found = decode_attention(q, k, v, asked, *where, first_kv_head=first, total_kv_heads=TOTAL)
    found = tamper(*found) if tamper else found
    assert_close(found, attention_over_slots(q, k, v, pattern, *where))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("new_tokens", "heads", "kv_heads", "head_dim"), [(1, 2, 2, 32), (1, 6, 2, 80), (5, 4, 1, 96)]
)
def test_matches_the_definition(name, new_tokens, heads, kv_heads, head_dim):
    assert_matches(PATTERNS[name], new_tokens, heads, kv_heads, head_dim)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_off_by_one_is_caught(plant):
    with pytest.raises(AssertionError, match="out"):
        assert_matches(PATTERNS["per_head"], 5, 4, 2, 64, PLANTS[plant])


@pytest.mark.parametrize(
    "tamper",
    [lambda out, lse: (out, lse * 1.4427), lambda out, lse: (out, lse + 0.01)],
    ids=["base two", "a key"],
)
def test_a_wrong_lse_is_caught(tamper):
    with pytest.raises(AssertionError, match="LSE"):
        assert_matches(PATTERNS["strided"], 1, 2, 2, 64, tamper=tamper)


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_splits_are_merged_and_the_bits_are_the_same_again(monkeypatch, new_tokens):
    """Of 5 splits over 3 tiles some have no slot, and most have no visible key."""
    monkeypatch.setattr(kernels.decode, "LEAST_SLOTS", 28)
    pattern = PATTERNS["no_sinks"]
    q, k, v = tensors(2, new_tokens, 4, 2, slots := 141, 128)
    q_positions, _ = positions(pattern, new_tokens, 2, slots)
    k_positions = torch.arange(slots, device=DEVICE).expand(2, 1, -1)
    found = decode_attention(q, k, v, pattern, q_positions, k_positions, **SHARD)
    assert_close(found, attention_over_slots(q, k, v, pattern, q_positions, k_positions))
    again = decode_attention(q, k, v, pattern, q_positions, k_positions, **SHARD)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("least_slots", [32, 1000])
def test_slots_beyond_those_in_use_are_not_read(monkeypatch, least_slots):
    monkeypatch.setattr(kernels.decode, "LEAST_SLOTS", least_slots)
    q, k, v = tensors(3, 1, 4, 2, slots := 141, 64)
    used = torch.tensor([64, 0, 999], device=DEVICE)
    there = torch.arange(slots, device=DEVICE) < used[:, None]
    k[~there[:, None].expand(-1, 2, -1)] = float("nan")
    v[~there[:, None].expand(-1, 2, -1)] = float("nan")
    found = decode_attention(q, k, v, PATTERNS["no_sinks"], slots_used_B=used.int())
    # Without positions all slots in use are visible, whatever the pattern.
    k, v = k.nan_to_num(), v.nan_to_num()
    k_positions = torch.where(there, 0, -1)[:, None]
    q_positions = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    full = Pattern.full()
    assert_close(found, attention_over_slots(q, k, v, full, q_positions, k_positions))


def test_any_layout_with_whole_vectors_and_either_kind_of_positions():
    """Slots outside heads, as a projection leaves them; int32 positions; a scale of its own."""
    pattern = PATTERNS["strided"]
    q, k, v = tensors(2, 1, 4, 2, slots := 141, 64)
    where = positions(pattern, 1, 2, slots, dtype=torch.int32)
    expected = attention_over_slots(q * 3, k, v, pattern, *where)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q = q.transpose(1, 3).contiguous().transpose(1, 3)
    found = decode_attention(q, k, v, pattern, *where, softmax_scale=3 * 64**-0.5, **SHARD)
    assert_close(found, expected)


def test_bfloat16():
    pattern = PATTERNS["sinks_window"]
    q, k, v = tensors(2, 1, 4, 2, slots := 141, 64, torch.bfloat16)
    where = positions(pattern, 1, 2, slots)
    found = decode_attention(q, k, v, pattern, *where, **SHARD)
    assert found[0].dtype == torch.bfloat16
    assert_close(found, attention_over_slots(q, k, v, pattern, *where), tolerance=1e-2)


def call(**changes):
    """A small legal call's arguments, some of them changed."""
    q, k, v = tensors(2, 1, 4, 2, 40, 64)
    q_positions = torch.full((2, 1), 39, device=DEVICE)
    k_positions = torch.arange(40, device=DEVICE).expand(2, 1, -1)
    values = dict(q=q, k=k, v=v, q_positions=q_positions, k_positions=k_positions, used=None)
    values |= {name: change(values) for name, change in changes.items()}
    return values


def decode(q, k, v, q_positions, k_positions, used, **others):
    where = q_positions, k_positions
    return decode_attention(q, k, v, PATTERNS["strided"], *where, slots_used_B=used, **others)


REFUSED = {
    "N a multiple of G": {"q": lambda c: c["q"][:, :, :3]},
    "none of them empty": {"k": lambda c: c["k"][:, :, :0], "v": lambda c: c["v"][:, :, :0]},
    r"must be \[B, L, N, H\]": {"v": lambda c: c["v"][:, :, 1:]},
    r"q \(2, 4, 64\)": {"q": lambda c: c["q"][:, 0]},
    "head dim 12 is not a multiple of 8 from 16 to 128; use cached_attention": {
        name: (lambda c, name=name: c[name][..., :12].contiguous()) for name in "qkv"
    },
    "the same for all": {"k": lambda c: c["k"].half()},
    "must be one of torch.bfloat16": {
        name: (lambda c, name=name: c[name].double()) for name in "qkv"
    },
    "devices of q, k, v": {"v": lambda c: c["v"].to("meta")},
    "q_positions_BL is missing": {"q_positions": lambda c: None},
    "k_positions_BPS is missing": {"k_positions": lambda c: None},
    r"q_positions_BL \(2, 2\): must be \(2, 1\)": {
        "q_positions": lambda c: c["q_positions"].expand(-1, 2)
    },
    r"k_positions_BPS \(2, 40\): must be \(2, 1, 40\) or \(2, 2, 40\)": {
        "k_positions": lambda c: c["k_positions"][:, 0]
    },
    "of torch.float32 on": {"q_positions": lambda c: c["q_positions"].float()},
    "k_positions_BPS of torch.int16": {"k_positions": lambda c: c["k_positions"].short()},
    r"slots_used_B \(3,\): must be \(2,\)": {"used": lambda c: torch.ones(3, dtype=torch.int32)},
    "33 new tokens of 4 query heads a KV head: at most 128": {
        "q": lambda c: torch.randn(2, 33, 8, 64)
    },
    "first_kv_head=1 with 2 KV heads": {"first_kv_head": lambda c: 1},
    "first_kv_head=-1": {"first_kv_head": lambda c: -1},
    "softmax_scale=0": {"softmax_scale": lambda c: 0.0},
    "k has strides": {"k": lambda c: torch.randn(2, 2, 40, 66, device=DEVICE)[..., :64]},
    "from byte 4": {
        "v": lambda c: torch.randn(2 * 2 * 40 * 64 + 1, device=DEVICE)[1:].view(2, 2, 40, 64)
    },
    "pass a contiguous tensor": {"v": lambda c: c["v"].mT.contiguous().mT},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    arguments = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
        for name, x in call(**REFUSED[message]).items()
    }
    with pytest.raises(ValueError, match=message):
        decode(**arguments)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    """A compiled kernel does not take host memory."""
    import triton

    monkeypatch.setattr(triton, "JITFunction", type(decode_attention_kernel))
    arguments = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in call().items()}
    with pytest.raises(ValueError, match="must be on a CUDA device"):
        decode(**arguments)


def test_it_is_a_custom_op():
    arguments = call()
    q, k, v, *where = (arguments[n] for n in ("q", "k", "v", "q_positions", "k_positions"))
    op = torch.ops.longgen.decode_attention
    flat = (q, k, v, *where, None, 3, 19, 8, 4, "shared", 0, 2, 0.125)
    torch.library.opcheck(op, flat, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="autograd"):
        decode(**{**arguments, "q": q.requires_grad_()})[0].sum().backward()


def test_every_number_of_queries_has_settings():
    assert sorted(SETTINGS) == sorted(kernels.decode.WIDE_SETTINGS) == [16, 32, 64, 128]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["full", "window", "strided", "per_head"])
@pytest.mark.parametrize(
    ("new_tokens", "heads", "kv_heads", "head_dim"),
    [(1, 32, 32, 128), (1, 64, 8, 128), (4, 9, 3, 64), (16, 64, 8, 128), (5, 8, 8, 80)],
)
def test_large_on_the_gpu(name, new_tokens, heads, kv_heads, head_dim):
    pattern = {
        "full": Pattern.full(),
        "window": Pattern(64, 2048),
        "strided": Pattern(64, 1024, 64, 16),
        "per_head": Pattern(64, 1024, 64, 16, "per_head"),
    }[name]
    q, k, v = tensors(2, new_tokens, heads, kv_heads, slots := 5003, head_dim, torch.bfloat16)
    where = positions(pattern, new_tokens, kv_heads, slots)
    shard = {"first_kv_head": 1, "total_kv_heads": kv_heads + 3}
    found = decode_attention(q, k, v, pattern, *where, **shard)
    assert_close(found, attention_over_slots(q, k, v, pattern, *where, *shard.values()), 5e-3)


@pytest.mark.gpu
def test_one_compilation_and_one_graph_serve_a_growing_cache():
    capacity = 3000
    q, k, v = tensors(1, 1, 8, 2, capacity, 128, torch.bfloat16)
    used = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    pattern = Pattern.full()
    decode_attention(q, k, v, pattern, slots_used_B=used)
    compiled = decode_attention_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(compiled)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(q, k, v, pattern, slots_used_B=used)
    for length in (1, 63, 64, 777, capacity):
        used.fill_(length)
        graph.replay()
        alone = decode_attention(q, k[:, :, :length], v[:, :, :length], pattern)
        zeros = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        cut = k[:, :, :length], v[:, :, :length], pattern, zeros, zeros.expand(1, 1, length)
        assert_close(found, attention_over_slots(q, *cut), 5e-3)
        assert_close(alone, attention_over_slots(q, *cut), 5e-3)
    # One more: the kernel without slots_used_B.
    assert len(compiled) <= before + 1

"""Serving's kernels against torch; by Triton's interpreter where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F

import kernels.skinny_linear as skinny
from kernels import pointwise, pointwise_kernels
from tests.closeness import assert_close_by_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def close(found, wanted, tolerance=1e-6):
    assert_close_by_norm(found, wanted, tolerance)


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_and_norm(size, dtype):
    x, delta, weight = randn(3, size, dtype=dtype), randn(3, size, seed=1, dtype=dtype), randn(size)
    weight, tolerance = weight.to(dtype), 1e-6 if dtype == torch.float32 else 2e-2
    for added in (delta, None):
        ours, wanted = x.clone(), (x if added is None else x + delta)
        out = pointwise_kernels.add_rms_norm(ours, added, weight, 1e-3)
        close(ours, wanted, tolerance)
        by_torch = x.cpu().clone()
        expected = pointwise.add_rms_norm(
            by_torch, None if added is None else added.cpu(), weight.cpu(), 1e-3
        )
        close(out.cpu(), expected, tolerance)
        close(ours.cpu(), by_torch, tolerance)
        close(out, F.rms_norm(wanted.float(), (size,), weight.float(), 1e-3), tolerance)


def test_gate():
    x = randn(3, 2 * 1100)
    gate, up = x.chunk(2, -1)
    close(pointwise_kernels.swiglu(x), F.silu(gate) * up)
    close(pointwise.swiglu(x.cpu()), (F.silu(gate) * up).cpu())


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(18, 3, 16), (2, 2, 24)])
def test_rope_and_cache(kernel, per_head, rows, heads, kv_heads, head_dim):
    """In place and in slots: in one call, and in two; what has no slot is written nowhere."""
    device = DEVICE if kernel else "cpu"
    call = pointwise_kernels.rotate_and_store if kernel else pointwise.rotate_and_store
    qkv = randn(5, (heads + 2 * kv_heads) * head_dim).to(device)
    angle = randn(5, head_dim // 2, seed=1).to(device)
    rotation = angle.cos(), angle.sin()
    slots = torch.stack([torch.randperm(9)[:5] for _ in range(kv_heads if per_head else 1)])
    slots[:, 2] = -1
    slots = slots.to(device)
    q, k, v = qkv.view(5, -1, head_dim).split((heads, kv_heads, kv_heads), 1)
    cos, sin = (x.repeat(1, 2)[:, None] for x in rotation)
    q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (q, k))
    wanted = torch.full((2, rows, kv_heads, 9, head_dim), 7.0, device=device)
    for token in (0, 1, 3, 4):
        for head in range(kv_heads):
            at = token if rows > 1 else 0, head, slots[head if per_head else 0, token]
            wanted[0][at], wanted[1][at] = k[token, head], v[token, head]
    for together in (True, False):
        ours, cached = qkv.clone(), torch.full_like(wanted, 7.0)
        if together:
            call(ours, kv_heads, rotation, tuple(cached), slots, head_dim)
        else:
            call(ours, kv_heads, rotation, None, None, head_dim)
            assert (cached == 7).all()
            call(ours, kv_heads, None, tuple(cached), slots, head_dim)
        close(ours.view(5, -1, head_dim), torch.cat((q, k, v), 1))
        close(cached, wanted)
        assert (cached == 7).sum() == (wanted == 7).sum()


@pytest.mark.parametrize("size", [(130, 700), (64, 512)])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_skinny_linear(tokens, size):
    x, w = randn(tokens, size[1]), randn(*size, seed=1)
    for settings in (skinny.SINGLE if tokens == 1 else skinny.SEVERAL)[::3]:
        close(skinny.skinny_linear(x, w, settings), F.linear(x, w), 1e-3)


def test_without_a_gpu_torch_multiplies():
    weight = torch.randn(8, 16)
    assert skinny.fastest_linear(1, [weight]) == (F.linear, "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_fastest_is_right(tokens):
    weights = [randn(4096, 4096, seed=i, dtype=torch.bfloat16) / 64 for i in range(8)]
    linear, name = skinny.fastest_linear(tokens, weights)
    x = randn(tokens, 4096, dtype=torch.bfloat16)
    close(linear(x, weights[3]), F.linear(x.float(), weights[3].float()), 5e-3)
    print(f"{tokens} tokens: {name}")

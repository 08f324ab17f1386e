"""The kernels of pointwise.py, and their launches, which take what is said there.

Shapes: T tokens, D hidden, F width of the gate, C = (N + 2 G) * H columns of a QKV projection,
N query heads, G KV heads, H head dim, B rows of a cache, S slots, P heads whose slots differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GATE_TILE, ROTATED_HEADS = 1024, 16


@triton.jit
def add_rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, size, eps, ADD: tl.constexpr, PADDED: tl.constexpr
):
    """One token: x += delta; out = x / rms(x) * weight, rounded where the model rounds."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    there = at < size
    x = tl.load(x_ptr + token * size + at, mask=there, other=0.0)
    wide = x.to(tl.float32)
    if ADD:
        delta = tl.load(delta_ptr + token * size + at, mask=there, other=0.0)
        x = (wide + delta.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + token * size + at, x, mask=there)
        wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * size + at, (weight * normed).to(x.dtype), mask=there)


@triton.jit
def swiglu_kernel(x_ptr, out_ptr, size, TILE: tl.constexpr):
    """A tile of one token: silu(gate) * up."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = at < size
    gate = tl.load(x_ptr + token * 2 * size + at, mask=there, other=0.0)
    up = tl.load(x_ptr + token * 2 * size + size + at, mask=there, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    out = wide / (1.0 + tl.exp(-wide)) * up
    tl.store(out_ptr + token * size + at, out.to(gate.dtype), mask=there)


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    tokens,
    heads,
    kv_heads,
    stride_b: tl.int64,
    stride_g: tl.int64,
    stride_s: tl.int64,
    ROTATE: tl.constexpr,
    STORE: tl.constexpr,
    ROW_EACH: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some heads of one token: queries and keys under RoPE in place; keys and values to slots."""
    token = tl.program_id(0).to(tl.int64)
    head_R = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED)
    there = (head_R < heads + 2 * kv_heads)[:, None] & (dims < HALF)[None, :]
    columns = (heads + 2 * kv_heads) * 2 * HALF
    at = qkv_ptr + token * columns + head_R[:, None] * (2 * HALF) + dims[None, :]
    left = tl.load(at, mask=there, other=0.0)
    right = tl.load(at + HALF, mask=there, other=0.0)
    if ROTATE:
        in_half = dims < HALF
        cos = tl.load(cos_ptr + token * HALF + dims, mask=in_half, other=0.0)[None, :]
        sin = tl.load(sin_ptr + token * HALF + dims, mask=in_half, other=0.0)[None, :]
        turned = there & (head_R < heads + kv_heads)[:, None]
        wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
        new_left = (wide_left * cos - wide_right * sin).to(left.dtype)
        new_right = (wide_right * cos + wide_left * sin).to(left.dtype)
        tl.store(at, new_left, mask=turned)
        tl.store(at + HALF, new_right, mask=turned)
        left = tl.where(turned, new_left, left)
        right = tl.where(turned, new_right, right)
    if STORE:
        kv_R = (head_R - heads) % kv_heads
        of_slots = tl.where(head_R < heads, 0, kv_R) if PER_HEAD else head_R * 0
        cached_R = (head_R >= heads) & (head_R < heads + 2 * kv_heads)
        slot_R = tl.load(slots_ptr + of_slots * tokens + token, mask=cached_R, other=-1)
        row = token if ROW_EACH else token * 0
        to = row * stride_b + kv_R.to(tl.int64) * stride_g + slot_R * stride_s
        to = to[:, None] + dims[None, :]
        kept = there & (cached_R & (slot_R >= 0))[:, None]
        is_key = (head_R < heads + kv_heads)[:, None]
        tl.store(k_ptr + to, left, mask=kept & is_key)
        tl.store(k_ptr + to + HALF, right, mask=kept & is_key)
        tl.store(v_ptr + to, left, mask=kept & (is_key == 0))
        tl.store(v_ptr + to + HALF, right, mask=kept & (is_key == 0))


def add_rms_norm(x_TD, delta_TD, weight_D, eps) -> torch.Tensor:
    out = torch.empty_like(x_TD)
    size = x_TD.shape[1]
    delta = x_TD if delta_TD is None else delta_TD
    add_rms_norm_kernel[(x_TD.shape[0],)](
        x_TD,
        delta,
        weight_D,
        out,
        size,
        eps,
        ADD=delta_TD is not None,
        PADDED=triton.next_power_of_2(size),
        num_warps=8,
    )
    return out


def swiglu(gate_up_TF) -> torch.Tensor:
    tokens, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out = gate_up_TF.new_empty(tokens, size)
    grid = tokens, triton.cdiv(size, GATE_TILE)
    swiglu_kernel[grid](gate_up_TF, out, size, TILE=GATE_TILE)
    return out


def rotate_and_store(qkv_TC, kv_heads, rotation_TH, cached_BGSH, slots_PT, head_dim) -> None:
    tokens, columns = qkv_TC.shape
    store, rotate = cached_BGSH is not None, rotation_TH is not None
    keys, values = cached_BGSH if store else (qkv_TC, qkv_TC)
    cos, sin = rotation_TH if rotate else (qkv_TC, qkv_TC)
    heads = columns // head_dim - 2 * kv_heads
    grid = tokens, triton.cdiv(heads + 2 * kv_heads, ROTATED_HEADS)
    rotate_and_store_kernel[grid](
        qkv_TC,
        cos,
        sin,
        slots_PT if store else qkv_TC,
        keys,
        values,
        tokens,
        heads,
        kv_heads,
        *(keys.stride()[:3] if store else (0, 0, 0)),
        ROTATE=rotate,
        STORE=store,
        ROW_EACH=store and keys.shape[0] > 1,
        PER_HEAD=store and slots_PT.shape[0] > 1,
        HALF=head_dim // 2,
        PADDED=triton.next_power_of_2(head_dim // 2),
        TILE=ROTATED_HEADS,
    )

"""Launches the Gluon kernels of the sparse layers: the fast path on Hopper GPUs.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .call import Call, on_device
from .far_keys import add_far_keys
from .hardware import cuda_capability, triton_failure
from .hopper_backward import hopper_bwd_window_kernel
from .hopper_far_dkv import hopper_bwd_far_dkv_kernel
from .hopper_far_dq import hopper_bwd_far_dq_kernel
from .hopper_forward import hopper_fwd_kernel
from .hopper_window import QUERIES
from .triton_attention import far_slot_tiles, far_splits, pattern_arguments, row_delta

HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
LOG2E = 1.4426950408889634
# Rows and columns of what TMA copies at once.
BOX = 64
# Tiles of queries and of keys; the window must hold one.
TILE = 128
FORWARD_STAGES = {64: 4, 128: 2}
BACKWARD_STAGES = 2
# Steps of its walk by which a tile of keys must begin after the next one of its head, so that its
# turns at dQ have come: 2.6 us of 2.35 on an H200.
LAG_STEPS = 1.1
FAR_DQ_STAGES = {64: 4, 128: 3}
FAR_DKV_STAGES = {64: 8, 128: 5}
# Kept clear of the ends of 32 bits, whatever is added.
MOST = 2**30


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def supports(q_TNH: torch.Tensor, call: Call) -> str | None:
    """None, or why this path cannot run the call."""
    pattern = call.pattern
    if cuda_capability(q_TNH.device) != (9, 0):
        return f"{q_TNH.device} is not a Hopper GPU (compute capability 9.0)"
    if failure := triton_failure(q_TNH.device, q_TNH.dtype):
        return failure
    if q_TNH.dtype not in (torch.bfloat16, torch.float16) or q_TNH.shape[2] not in HEAD_DIMS:
        legal = ", ".join(str(dim) for dim in HEAD_DIMS)
        return (
            f"{q_TNH.dtype} with head dim {q_TNH.shape[2]}: must be bfloat16 or float16 with head "
            f"dim {legal}"
        )
    if pattern.window < TILE or pattern.sink_tokens % BOX or pattern.sink_tokens > MOST:
        return (
            f"window={pattern.window}, sink_tokens={pattern.sink_tokens}: must be at least {TILE}, "
            f"and a multiple of {BOX} up to {MOST}"
        )
    blocks_fit = pattern.block % BOX == 0 and pattern.sink_tokens % pattern.block == 0
    blocks_fit = blocks_fit and pattern.block * (pattern.stride or 1) <= MOST
    if pattern.stride is not None and not blocks_fit:
        return (
            f"block={pattern.block} with stride={pattern.stride}: must be a multiple of {BOX} that "
            f"divides sink_tokens={pattern.sink_tokens}, times the stride at most {MOST}"
        )
    return None


def _heads_abreast(x_TNH: torch.Tensor) -> torch.Tensor:
    """x as TMA reads it: a token's heads side by side, rows and base at steps of 16 bytes."""
    head_dim, step = x_TNH.shape[2], 16 // x_TNH.element_size()
    abreast = x_TNH.stride(2) == 1 and x_TNH.stride(1) == head_dim
    if abreast and x_TNH.stride(0) % step == 0 and x_TNH.data_ptr() % 16 == 0:
        return x_TNH
    return x_TNH.contiguous()


def _boxes(x_TNH: torch.Tensor) -> TensorDescriptor:
    """A descriptor of x as [T, N * H], in boxes of 64 x 64."""
    tokens, heads, head_dim = x_TNH.shape
    box = [BOX, BOX]
    layout = gl.NVMMASharedLayout.get_default_for(box, DTYPES[x_TNH.dtype])
    shape, strides = [tokens, heads * head_dim], [x_TNH.stride(0), 1]
    return TensorDescriptor(x_TNH, shape, strides, box, layout)


def _document_arguments(call: Call, device: torch.device) -> dict:
    """What the Gluon kernels are told of the documents."""
    told = pattern_arguments(call, device)
    return {name: told[name] for name in ("cu_seqlens", "documents", "search_steps", "tokens")}


def _pattern_arguments(call: Call) -> dict:
    """What the Gluon kernels that walk special keys are told of the pattern and the shard."""
    pattern = call.pattern
    return {
        "first_kv_head": call.first_kv_head,
        "total_kv_heads": call.total_kv_heads,
        "PATTERN": (
            pattern.sink_tokens,
            min(pattern.window, MOST),
            pattern.block,
            pattern.stride or 0,
            pattern.heads_differ,
        ),
    }


def forward(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, N, H], LSE [N, T] float32)."""
    q, k, v = (_heads_abreast(x) for x in (q_TNH, k_TGH, v_TGH))
    tokens, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    row_tiles = triton.cdiv(tokens, TILE)
    items = row_tiles * heads
    with torch.cuda.device_of(q):
        hopper_fwd_kernel[(min(items, _multiprocessors(q.device)),)](
            q_desc=_boxes(q),
            k_desc=_boxes(k),
            v_desc=_boxes(v),
            out_desc=_boxes(out),
            lse_ptr=lse,
            row_tiles=row_tiles,
            items=items,
            ratio=heads // k.shape[1],
            scale_log2=call.scale * LOG2E,
            HEAD_DIM=head_dim,
            STAGES=FORWARD_STAGES[head_dim],
            num_warps=4,
            **_pattern_arguments(call),
            **_document_arguments(call, q.device),
        )
    return out, lse


def _backward_arguments(tensors: dict, call: Call) -> dict:
    """The arguments that all Gluon kernels of a backward share."""
    q, k = tensors["q"], tensors["k"]
    return {
        **{f"{name}_desc": _boxes(tensors[name]) for name in ("q", "k", "v", "d_out")},
        **{f"{name}_ptr": tensors[name] for name in ("lse", "delta")},
        "ratio": q.shape[1] // k.shape[1],
        "scale": call.scale,
        "HEAD_DIM": q.shape[2],
        **_document_arguments(call, q.device),
    }


def _window_starts(call: Call, device: torch.device) -> torch.Tensor:
    """The first key of each query's window [T] int32, no earlier than its document's."""
    bounds = pattern_arguments(call, device)["cu_seqlens"]
    rows = torch.arange(call.bounds[-1], dtype=torch.int32, device=device)
    starts = bounds[torch.searchsorted(bounds[1:], rows, right=True)]
    return torch.maximum(starts, rows - (min(call.pattern.window, MOST) - 1))


def _heads_at_once(call: Call, ratio: int, programs: int) -> int:
    """KV heads whose tiles of keys so many programs walk side by side in the backward.

    With fewer, tiles wait for turns at dQ; with more, what they share falls out of the L2 cache.
    """
    lengths = np.diff(np.asarray(call.bounds, dtype=np.int64))
    near = np.minimum(lengths, call.pattern.window)
    queries_of_key = (near * (2 * lengths - near + 1) / 2).sum() / max(1, lengths.sum())
    steps = ratio * (queries_of_key / QUERIES.value + 1)
    return max(1, round(LAG_STEPS * programs / steps))


def _window_gradients(tensors: dict, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The window's part: of dq without the scale, in float32, and of dk and dv."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    near = q.new_empty(q.shape, dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    key_tiles = triton.cdiv(tokens, TILE)
    items = key_tiles * kv_heads
    turns = torch.zeros(1 + heads * 2 * key_tiles, dtype=torch.int32, device=q.device)
    programs = min(items, _multiprocessors(q.device))
    hopper_bwd_window_kernel[(programs,)](
        dq_desc=_boxes(near),
        lowest_ptr=_window_starts(call, q.device),
        turn_ptr=turns[1:],
        ticket_ptr=turns,
        dk_ptr=dk,
        dv_ptr=dv,
        dk_stride_t=kv_heads * head_dim,
        key_tiles=key_tiles,
        items=items,
        at_once=_heads_at_once(call, heads // kv_heads, programs),
        WINDOW=min(call.pattern.window, MOST),
        STAGES=BACKWARD_STAGES,
        num_warps=4,
        **_backward_arguments(tensors, call),
    )
    return near, dk, dv


def _far_key_parts(tensors: dict, call: Call) -> tuple[dict, int]:
    """What far queries add to dK and dV of special keys, computed, as the adding kernel takes it.

    Returns:
        (partial_ptr, slot_tiles, slots and splits by name, tiles of BOX special keys).
    """
    q, kv_heads = tensors["q"], tensors["k"].shape[1]
    tokens, heads, head_dim = q.shape
    ratio = heads // kv_heads
    slot_tiles = far_slot_tiles(call.pattern, call.bounds, TILE)
    tiles = slot_tiles[-1]
    splits = far_splits(tiles, heads, tokens)
    shape = kv_heads, splits * ratio, tiles * TILE, 2, head_dim
    far = {
        "partial_ptr": q.new_empty(shape, dtype=torch.float32),
        "slots": tiles * TILE,
        "splits": splits,
    }
    if tiles:
        hopper_bwd_far_dkv_kernel[(tiles, splits * ratio, kv_heads)](
            slot_tiles=on_device(slot_tiles, q.device),
            STAGES=FAR_DKV_STAGES[head_dim],
            num_warps=4,
            **far,
            **_pattern_arguments(call),
            **_backward_arguments(tensors, call),
        )
    boxes = TILE // BOX
    far["slot_tiles"] = on_device(tuple(boxes * tile for tile in slot_tiles), q.device)
    return far, boxes * tiles


def _whole_dq(near_TNH: torch.Tensor, any_far: bool, tensors: dict, call: Call) -> torch.Tensor:
    """dq [T, N, H]: the window's part and the far special keys'."""
    q = tensors["q"]
    tokens, heads, head_dim = q.shape
    dq = q.new_empty(q.shape)
    if not any_far:
        return torch.mul(near_TNH, call.scale, out=dq)
    row_tiles = triton.cdiv(tokens, TILE)
    items = row_tiles * heads
    hopper_bwd_far_dq_kernel[(min(items, _multiprocessors(q.device)),)](
        near_desc=_boxes(near_TNH),
        dq_desc=_boxes(dq),
        row_tiles=row_tiles,
        items=items,
        STAGES=FAR_DQ_STAGES[head_dim],
        num_warps=4,
        **_pattern_arguments(call),
        **_backward_arguments(tensors, call),
    )
    return dq


def backward(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    d_out_TNH: torch.Tensor,
    d_lse_NT: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [T, N, H], dk [T, G, H], dv [T, G, H]); the same inputs give the same bits."""
    inputs = {"q": q_TNH, "k": k_TGH, "v": v_TGH, "d_out": d_out_TNH}
    tensors = {name: _heads_abreast(x) for name, x in inputs.items()}
    tensors["lse"] = lse_NT.contiguous()
    tensors["delta"] = row_delta(out_TNH, tensors["d_out"], d_lse_NT)
    with torch.cuda.device_of(q_TNH):
        near, dk, dv = _window_gradients(tensors, call)
        far, tiles = _far_key_parts(tensors, call)
        if tiles:
            add_far_keys(dk, dv, far, tiles, BOX, call)
        return _whole_dq(near, tiles > 0, tensors, call), dk, dv

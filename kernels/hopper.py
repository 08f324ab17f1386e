"""Launches the Gluon kernels of the sparse layers: the fast path on Hopper GPUs.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .call import Call
from .far_keys import add_far_keys
from .hopper_backward import hopper_bwd_window_kernel
from .hopper_forward import hopper_fwd_kernel
from .triton_attention import backward_arguments, pattern_arguments, row_delta

HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
LOG2E = 1.4426950408889634
# Rows and columns of what TMA copies at once.
BOX = 64
# Tiles of queries and of keys; the window must hold one.
TILE = 128
FORWARD_STAGES = {64: 4, 128: 2}
BACKWARD_STAGES = 2
# Kept clear of the ends of 32 bits, whatever is added.
MOST = 2**30


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def supports(q_TNH: torch.Tensor, call: Call) -> str | None:
    """None, or why this path cannot run the call, with the remedy."""
    pattern = call.pattern
    other = "pass backend='triton'"
    if q_TNH.device.type != "cuda" or _capability(q_TNH.device) != (9, 0):
        return f"{q_TNH.device} is not a Hopper GPU (compute capability 9.0); {other}"
    if q_TNH.dtype not in (torch.bfloat16, torch.float16) or q_TNH.shape[2] not in HEAD_DIMS:
        legal = ", ".join(str(dim) for dim in HEAD_DIMS)
        return (
            f"{q_TNH.dtype} with head dim {q_TNH.shape[2]}: must be bfloat16 or float16 with head "
            f"dim {legal}; {other}"
        )
    if pattern.window < TILE or pattern.sink_tokens % BOX or pattern.sink_tokens > MOST:
        return (
            f"window={pattern.window}, sink_tokens={pattern.sink_tokens}: must be at least {TILE}, "
            f"and a multiple of {BOX} up to {MOST}; {other}"
        )
    blocks_fit = pattern.block % BOX == 0 and pattern.sink_tokens % pattern.block == 0
    blocks_fit = blocks_fit and pattern.block * (pattern.stride or 1) <= MOST
    if pattern.stride is not None and not blocks_fit:
        return (
            f"block={pattern.block} with stride={pattern.stride}: must be a multiple of {BOX} that "
            f"divides sink_tokens={pattern.sink_tokens}, times the stride at most {MOST}; {other}"
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


def _documents(call: Call, device: torch.device) -> dict:
    """What the Gluon kernels are told of the documents."""
    told = pattern_arguments(call, device)
    return {name: told[name] for name in ("cu_seqlens", "documents", "search_steps", "tokens")}


def forward(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, N, H], LSE [N, T] float32)."""
    q, k, v = (_heads_abreast(x) for x in (q_TNH, k_TGH, v_TGH))
    tokens, heads, head_dim = q.shape
    pattern = call.pattern
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
            first_kv_head=call.first_kv_head,
            total_kv_heads=call.total_kv_heads,
            scale_log2=call.scale * LOG2E,
            HEAD_DIM=head_dim,
            PATTERN=(
                pattern.sink_tokens,
                min(pattern.window, MOST),
                pattern.block,
                pattern.stride or 0,
                pattern.heads_differ,
            ),
            STAGES=FORWARD_STAGES[head_dim],
            num_warps=4,
            **_documents(call, q.device),
        )
    return out, lse


def _window_starts(call: Call, device: torch.device) -> torch.Tensor:
    """The first key of each query's window [T] int32, no earlier than its document's."""
    bounds = pattern_arguments(call, device)["cu_seqlens"]
    rows = torch.arange(call.bounds[-1], dtype=torch.int32, device=device)
    starts = bounds[torch.searchsorted(bounds[1:], rows, right=True)]
    return torch.maximum(starts, rows - (min(call.pattern.window, MOST) - 1))


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
    q, k, v, d_out = (_heads_abreast(x) for x in (q_TNH, k_TGH, v_TGH, d_out_TNH))
    lse = lse_NT.contiguous()
    delta = row_delta(out_TNH, d_out, d_lse_NT)
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    near = q.new_empty(q.shape, dtype=torch.float32)
    key_tiles = triton.cdiv(tokens, TILE)
    items = key_tiles * kv_heads
    turn = torch.zeros(heads, 2 * key_tiles, dtype=torch.int32, device=q.device)
    common = backward_arguments(q, k, v, d_out, lse, delta, call)
    with torch.cuda.device_of(q):
        hopper_bwd_window_kernel[(min(items, _multiprocessors(q.device)),)](
            q_desc=_boxes(q),
            d_out_desc=_boxes(d_out),
            k_desc=_boxes(k),
            v_desc=_boxes(v),
            dq_desc=_boxes(near),
            lse_ptr=lse,
            delta_ptr=delta,
            lowest_ptr=_window_starts(call, q.device),
            turn_ptr=turn,
            dk_ptr=dk,
            dv_ptr=dv,
            dk_stride_t=kv_heads * head_dim,
            key_tiles=key_tiles,
            items=items,
            ratio=heads // kv_heads,
            scale=call.scale,
            HEAD_DIM=head_dim,
            WINDOW=min(call.pattern.window, MOST),
            STAGES=BACKWARD_STAGES,
            num_warps=4,
            **_documents(call, q.device),
        )
    return add_far_keys(near, dk, dv, common, call), dk, dv

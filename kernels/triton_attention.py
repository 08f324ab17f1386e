"""Launches the Triton kernels of the sparse layers: the portable path, on every GPU Triton serves.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from .call import Call, on_device, triton_head_dim_failure
from .hardware import triton_failure
from .pattern import Pattern
from .sparse_backward import (
    sparse_attention_bwd_delta_kernel,
    sparse_attention_bwd_dkv_kernel,
    sparse_attention_bwd_dq_kernel,
    sparse_attention_bwd_far_kernel,
)
from .sparse_forward import sparse_attention_fwd_kernel

# Programs among which the far queries are split, and the fewest queries of one.
FAR_PROGRAMS, FAR_QUERIES = 1024, 1024
# With TRITON_INTERPRET=1 kernels run as Python, on the CPU.
INTERPRETED = not isinstance(sparse_attention_fwd_kernel, triton.runtime.JITFunction)
# Tile of queries, tile of keys, warps and stages of each kernel: where a block has at least 160 KB
# of shared memory (A100, H100), elsewhere, and in float32.
LARGE = {
    "fwd": (128, 64, 8, 3),
    "dq": (128, 64, 8, 2),
    "dkv": (64, 128, 8, 2),
    "far": (64, 64, 4, 2),
}
SMALL = {
    "fwd": (64, 64, 4, 2),
    "dq": (64, 64, 4, 1),
    "dkv": (64, 64, 4, 1),
    "far": (64, 64, 4, 1),
}
SINGLE = {
    "fwd": (64, 32, 4, 1),
    "dq": (32, 32, 4, 1),
    "dkv": (32, 32, 4, 1),
    "far": (32, 32, 4, 1),
}
LARGE_SHARED_MEMORY = 160 * 1024


@cache
def _large(device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= LARGE_SHARED_MEMORY


def tiles(kernel: str, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """TILE_M, TILE_K, num_warps and num_stages of one of the kernels fwd, dq, dkv and far."""
    if dtype == torch.float32:
        table = SINGLE
    else:
        table = LARGE if device.type == "cpu" or _large(device) else SMALL
    return dict(zip(("TILE_M", "TILE_K", "num_warps", "num_stages"), table[kernel], strict=True))


@lru_cache(maxsize=64)
def far_slot_tiles(pattern: Pattern, bounds: tuple[int, ...], tile: int) -> tuple[int, ...]:
    """For each document the first of its tiles of `tile` special keys that have far queries."""
    lengths = np.diff(np.asarray(bounds, dtype=np.int64))
    special = np.minimum(lengths, pattern.sink_tokens)
    if pattern.stride is not None:
        special += (lengths // (pattern.stride * pattern.block) + 1) * pattern.block
    special = np.where(lengths > pattern.window, np.minimum(special, lengths), 0)
    return (0, *np.cumsum(-(-special // tile)).tolist())


def far_splits(tiles: int, heads: int, tokens: int) -> int:
    """Parts that the far queries of that many tiles of special keys are cut into."""
    wanted = FAR_PROGRAMS // max(1, tiles * heads)
    return max(1, min(wanted, triton.cdiv(tokens, FAR_QUERIES)))


def supports(q_TNH: torch.Tensor, call: Call) -> str | None:
    """None, or why this path cannot run the call."""
    if not INTERPRETED and (failure := triton_failure(q_TNH.device, q_TNH.dtype)):
        return failure
    if failure := triton_head_dim_failure(q_TNH.shape[2]):
        return failure
    period = call.pattern.block * (call.pattern.stride or 1)
    if period >= 2**31:
        return f"block * stride = {period} is not below 2^31"
    return None


def pattern_arguments(call: Call, device: torch.device) -> dict:
    """What the kernels are told of the pattern, the documents and the shard."""
    documents, tokens = len(call.bounds) - 1, call.bounds[-1]
    return {
        "cu_seqlens": on_device(call.bounds, device),
        "documents": documents,
        "search_steps": max(0, documents - 1).bit_length(),
        "tokens": tokens,
        "first_kv_head": call.first_kv_head,
        "total_kv_heads": call.total_kv_heads,
        "scale": call.scale,
        # No more than there are: sums with what is larger might not fit 32 bits.
        "sink_tokens": min(call.pattern.sink_tokens, tokens),
        "window": min(call.pattern.window, tokens),
        "block": call.pattern.block,
        "stride": call.pattern.stride or 1,
        "STRIDED": call.pattern.stride is not None,
        "PER_HEAD": call.pattern.heads_differ,
    }


def tensor_arguments(q: torch.Tensor) -> dict:
    """What the kernels are told of the tensors' dtype and head dim."""
    compute = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {
        "HEAD_DIM": q.shape[2],
        "PADDED_DIM": triton.next_power_of_2(q.shape[2]),
        # The interpreter multiplies bfloat16 by its bits.
        "COMPUTE": tl.float32 if INTERPRETED else compute[q.dtype],
    }


def run_argument(pattern: Pattern, tile_k: int) -> dict[str, int]:
    """RUN (see whole_special_tiles): where whole tiles of special keys are consecutive keys."""
    block = pattern.block if pattern.stride is not None else tile_k
    return {"RUN": 0 if pattern.sink_tokens % tile_k or block % tile_k else block}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with elements of a row side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def stride_arguments(**tensors: torch.Tensor) -> dict[str, int]:
    """name_stride_t and name_stride_n (or _g) of each tensor."""
    found = {}
    for name, x in tensors.items():
        found[f"{name}_stride_t"] = x.stride(0)
        found[f"{name}_stride_{'g' if name[-1] in 'kv' else 'n'}"] = x.stride(1)
    return found


def forward(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, N, H], LSE [N, T] float32)."""
    q, k, v = _rows(q_TNH), _rows(k_TGH), _rows(v_TGH)
    tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    size = tiles("fwd", q.dtype, q.device)
    with torch.cuda.device_of(q):
        sparse_attention_fwd_kernel[(triton.cdiv(tokens, size["TILE_M"]), heads)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            lse_ptr=lse,
            ratio=heads // k.shape[1],
            **stride_arguments(q=q, k=k, v=v, out=out),
            **pattern_arguments(call, q.device),
            **tensor_arguments(q),
            **run_argument(call.pattern, size["TILE_K"]),
            **size,
        )
    return out, lse


def row_delta(
    out_TNH: torch.Tensor, d_out_TNH: torch.Tensor, d_lse_NT: torch.Tensor | None
) -> torch.Tensor:
    """delta [N, T] float32: sum of out * d_out over the head dim, less the LSE's own gradient.

    With P = exp(S - LSE) the scores' gradient is P * (dP - delta), and dLSE/dS = P.
    """
    tokens, heads, head_dim = out_TNH.shape
    delta = out_TNH.new_empty(heads, tokens, dtype=torch.float32)
    with torch.cuda.device_of(delta):
        sparse_attention_bwd_delta_kernel[(triton.cdiv(tokens, 64), heads)](
            out_ptr=out_TNH,
            d_out_ptr=d_out_TNH,
            delta_ptr=delta,
            tokens=tokens,
            **stride_arguments(out=out_TNH, d_out=d_out_TNH),
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            TILE_M=64,
        )
    return delta if d_lse_NT is None else delta.sub_(d_lse_NT)


def backward_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    call: Call,
) -> dict:
    """The arguments that all kernels of a backward share."""
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "d_out_ptr": d_out,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "ratio": q.shape[1] // k.shape[1],
        **stride_arguments(q=q, k=k, v=v, d_out=d_out),
        **pattern_arguments(call, q.device),
        **tensor_arguments(q),
    }


def far_key_parts(common: dict, call: Call) -> tuple[dict, int, int]:
    """What far queries add to dK and dV of special keys, computed, as the adding kernel takes it.

    Args:
        common: the arguments that all kernels of the backward share.

    Returns:
        (partial_ptr, slot_tiles, slots and splits by name, tiles of special keys, keys of a tile).
    """
    q, kv_heads = common["q_ptr"], common["k_ptr"].shape[1]
    (tokens, heads, head_dim), ratio = q.shape, common["ratio"]
    size = tiles("far", q.dtype, q.device)
    slot_tiles = far_slot_tiles(call.pattern, call.bounds, size["TILE_K"])
    far_tiles = slot_tiles[-1]
    slots = far_tiles * size["TILE_K"]
    splits = far_splits(far_tiles, heads, tokens)
    far = {
        "partial_ptr": q.new_empty(
            kv_heads, splits * ratio, slots, 2, head_dim, dtype=torch.float32
        ),
        "slot_tiles": on_device(slot_tiles, q.device),
        "slots": slots,
        "splits": splits,
    }
    if far_tiles:
        with torch.cuda.device_of(q):
            sparse_attention_bwd_far_kernel[(far_tiles, splits * ratio, kv_heads)](
                **common, **far, **size
            )
    return far, far_tiles, size["TILE_K"]


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
    q, k, v, d_out = (_rows(x) for x in (q_TNH, k_TGH, v_TGH, d_out_TNH))
    lse = lse_NT.contiguous()
    (tokens, heads, _), kv_heads = q.shape, k.shape[1]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = row_delta(_rows(out_TNH), d_out, d_lse_NT)
    common = backward_arguments(q, k, v, d_out, lse, delta, call)
    far, _, slot_tile = far_key_parts(common, call)
    with torch.cuda.device_of(q):
        size = tiles("dq", q.dtype, q.device)
        sparse_attention_bwd_dq_kernel[(triton.cdiv(tokens, size["TILE_M"]), heads)](
            dq_ptr=dq,
            **stride_arguments(dq=dq),
            **common,
            **run_argument(call.pattern, size["TILE_K"]),
            **size,
        )
        size = tiles("dkv", q.dtype, q.device)
        sparse_attention_bwd_dkv_kernel[(triton.cdiv(tokens, size["TILE_K"]), kv_heads)](
            dk_ptr=dk,
            dv_ptr=dv,
            **stride_arguments(dk=dk, dv=dv),
            **common,
            **far,
            SLOT_TILE=slot_tile,
            **size,
        )
    return dq, dk, dv

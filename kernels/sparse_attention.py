"""The public call: attention of packed documents over a pattern, on whatever device they are.

Sparse patterns run through two operators of torch's library, longgen::sparse_attention_fwd and
longgen::sparse_attention_bwd, so that torch.compile and the policies of selective checkpointing see
them. Saved for backward: q, k, v, out, LSE (and cu_seqlens).

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .call import Call, check_heads, check_tensors, host_bounds, register_operator
from .dense import dense_attention, dense_attention_gradients
from .hardware import cuda_capability, describe_skipped
from .pattern import Pattern

log = logging.getLogger("longgen.kernels")


@dataclass(frozen=True)
class Backend:
    """How one backend runs a call.

    supports(q, call) -> None, or the reason why not.
    forward(q, k, v, call) -> (out [T, N, H], natural-log LSE [N, T] float32).
    backward(q, k, v, out, lse, d_out, d_lse or None, call) -> (dq, dk, dv).
    Tensors may be views whose last dim is not contiguous; what is returned is contiguous.
    """

    supports: Callable
    forward: Callable
    backward: Callable


def _hopper() -> Backend:
    from .hopper import backward, forward, supports

    return Backend(supports, forward, backward)


def _triton() -> Backend:
    from .triton_attention import backward, forward, supports

    return Backend(supports, forward, backward)


def _tiled() -> Backend:
    from .tiled import backward, forward, supports

    return Backend(supports, forward, backward)


# Loaded when first used: an export folder runs where there is no Triton.
BACKENDS = {"hopper": _hopper, "triton": _triton, "tiled": _tiled}
# By kind of device, the fastest first: the first one that supports the call runs it. The tiled one
# supports every call on every device.
TILED = "tiled"
FASTEST = {"hopper": ("hopper", "triton"), "cuda": ("triton",)}


@cache
def _log_once(backend: str, device: str, skipped: tuple[tuple[str, str], ...]) -> None:
    # On a GPU the tiled path, which is PyTorch's, is many times slower than a kernel.
    slow = backend == TILED and device == "cuda"
    level, speed = (logging.WARNING, ", slowly") if slow else (logging.INFO, "")
    why = describe_skipped(skipped)
    log.log(level, "sparse layers on %s run by %s%s%s", device, backend, speed, why)


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The backends for this kind of device, the fastest first."""
    kind = "hopper" if cuda_capability(device) == (9, 0) else device.type
    return (*FASTEST.get(kind, ()), TILED)


def _unsupported(name: str, q_TNH: torch.Tensor, call: Call) -> str | None:
    """Why the named backend cannot run the call; None where it can."""
    try:
        backend = BACKENDS[name]()
    except ImportError as error:
        return f"does not import ({error})"
    return backend.supports(q_TNH, call)


def _choose(q_TNH: torch.Tensor, call: Call, name: str | None) -> Backend:
    """The backend of that name, or the fastest that supports the call.

    Raises:
        ValueError: where the named one does not.
    """
    if name is not None:
        if name not in BACKENDS:
            legal = ", ".join(BACKENDS)
            raise ValueError(f"backend={name!r}: must be one of {legal} or None for the fastest")
        reason = _unsupported(name, q_TNH, call)
        if reason is not None:
            raise ValueError(f"backend={name!r}: {reason}; pass backend=None for one that runs")
        _log_once(name, q_TNH.device.type, ())
        return BACKENDS[name]()
    skipped = []
    for candidate in _candidates(q_TNH.device):
        reason = _unsupported(candidate, q_TNH, call)
        if reason is None:
            break
        skipped.append((candidate, reason))
    _log_once(candidate, q_TNH.device.type, tuple(skipped))
    return BACKENDS[candidate]()


def _attend_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sink_tokens: int,
    window: int,
    block: int,
    stride: int | None,
    phase: str,
    first_kv_head: int,
    total_kv_heads: int,
    scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    pattern = Pattern(sink_tokens, window, block, stride, phase)
    bounds = host_bounds(cu_seqlens, q.shape[0])
    call = Call(pattern, bounds, first_kv_head, total_kv_heads, scale)
    return _choose(q, call, backend).forward(q, k, v, call)


def _attend_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    sink_tokens: int,
    window: int,
    block: int,
    stride: int | None,
    phase: str,
    first_kv_head: int,
    total_kv_heads: int,
    scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pattern = Pattern(sink_tokens, window, block, stride, phase)
    bounds = host_bounds(cu_seqlens, q.shape[0])
    call = Call(pattern, bounds, first_kv_head, total_kv_heads, scale)
    return _choose(q, call, backend).backward(q, k, v, out, lse, d_out, d_lse, call)


def _fake_fwd(q, k, v, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _fake_bwd(q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    # A gradient of an output that nobody used stays None.
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_lse):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    found = SPARSE_ATTENTION_BWD(q, k, v, out, lse, d_out, d_lse, cu_seqlens, *ctx.rest)
    return *found, None, *(None for _ in ctx.rest)


SPARSE_ATTENTION_FWD = register_operator("sparse_attention_fwd", _attend_fwd, _fake_fwd)
SPARSE_ATTENTION_BWD = register_operator("sparse_attention_bwd", _attend_bwd, _fake_bwd)
SPARSE_ATTENTION_FWD.register_autograd(_gradients, setup_context=_setup_context)


def sparse_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    pattern: Pattern,
    cu_seqlens: torch.Tensor,
    *,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which each query sees the keys of its document that `pattern` names.

    Args:
        q_TNH: queries [T, N, H] of all documents, one after another, after RoPE; bfloat16, float16
            or float32. Views are read in place where their last dim is contiguous.
        k_TGH, v_TGH: keys and values [T, G, H]; N is a multiple of G.
        pattern: who sees whom; Pattern.full() for a full layer.
        cu_seqlens: int32 [documents + 1], from 0 to T, best on the host (a CUDA tensor is copied,
            which waits for the device).
        first_kv_head, total_kv_heads: where this shard's KV heads lie in the whole model's, which
            decides per-head phases; by default the shard is the whole.
        softmax_scale: above 0; by default 1 / sqrt(H).
        return_lse: return the natural-log LSE too, which merge_partials takes.
        backend: None for the fastest that supports the call. On CUDA "hopper", "triton" or, to
            compare with, "tiled"; on a CPU "tiled" (and "triton" where
            TRITON_INTERPRET=1). For full patterns one of kernels.dense.

    Returns:
        out [T, N, H] in q's dtype, with return_lse (out, LSE [N, T] float32); differentiable in q,
        k and v, through both.

    Raises:
        ValueError: where shapes, dtypes, devices or cu_seqlens do not fit together, or the backend
            does not support them.
    """
    check_tensors(q_TNH, k_TGH, v_TGH, cu_seqlens)
    (tokens, _, head_dim), kv_heads = q_TNH.shape, k_TGH.shape[1]
    total = kv_heads if total_kv_heads is None else total_kv_heads
    check_heads(kv_heads, first_kv_head, total)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not scale > 0:
        raise ValueError(f"softmax_scale={scale}: must be above 0; None takes 1 / sqrt(head dim)")
    if pattern.is_full:
        bounds = list(host_bounds(cu_seqlens, tokens))
        options = {"softmax_scale": scale, "return_lse": return_lse, "backend": backend}
        return dense_attention(q_TNH, k_TGH, v_TGH, bounds, **options)
    out, lse = SPARSE_ATTENTION_FWD(
        q_TNH,
        k_TGH,
        v_TGH,
        cu_seqlens,
        pattern.sink_tokens,
        pattern.window,
        pattern.block,
        pattern.stride,
        pattern.phase,
        first_kv_head,
        total,
        scale,
        backend,
    )
    return (out, lse) if return_lse else out


@torch.no_grad()
def attention_gradients(
    d_out_TNH: torch.Tensor,
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    pattern: Pattern,
    cu_seqlens: torch.Tensor,
    *,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [T, N, H], dk [T, G, H], dv [T, G, H]) from sparse_attention's kept out and LSE.

    For a layer that computes q, k and v again in its backward, but not the attention. The arguments
    are sparse_attention's; d_out_TNH is the gradient of out.
    """
    scale = q_TNH.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    kept = (q_TNH, k_TGH, v_TGH, out_TNH, lse_NT)
    if pattern.is_full:
        bounds = list(host_bounds(cu_seqlens, q_TNH.shape[0]))
        return dense_attention_gradients(
            d_out_TNH, *kept, bounds, softmax_scale=scale, backend=backend
        )
    total = k_TGH.shape[1] if total_kv_heads is None else total_kv_heads
    told = (pattern.sink_tokens, pattern.window, pattern.block, pattern.stride, pattern.phase)
    place = (first_kv_head, total, scale, backend)
    return SPARSE_ATTENTION_BWD(*kept, d_out_TNH, None, cu_seqlens, *told, *place)

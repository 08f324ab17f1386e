"""How each backend of the full layers is called; kernels/dense.py chooses among them.

Shapes: T packed tokens, N query heads, G KV heads, H head dim, L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from itertools import pairwise

import torch
import torch.nn.functional as F

from .call import on_device
from .merge import merge_partials

# Rows of scores that are held at once where LSE has to be computed by itself.
LSE_TILE = 128
# Entries of a mask of queries that continue a document, where torch's SDPA needs one.
MASK_ENTRIES = 2**25

Result = tuple[torch.Tensor, torch.Tensor | None]
# (q_TNH, k_TGH, v_TGH, bounds, softmax scale, whether LSE is wanted) -> (out_TNH, lse_NT or None)
Run = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], float, bool],
    Result,
]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# (d_out_TNH, q_TNH, k_TGH, v_TGH, out_TNH, lse_NT, bounds, softmax scale) -> (dq, dk, dv)
Backward = Callable[..., Gradients]


# (q_LNH, k_SGH, v_SGH, softmax scale) -> out_LNH, of the last L of a document's S tokens
Continue = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def _longest(bounds: tuple[int, ...]) -> int:
    return max(stop - start for start, stop in pairwise(bounds))


def flash_attn_4(q_TNH, k_TGH, v_TGH, bounds, scale, with_lse) -> Result:
    """Compiles by CuTe DSL for some seconds at the first call of a head dim, not of a length."""
    interface = import_module("flash_attn.cute.interface")
    options = {
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_lse": with_lse,
    }
    if len(bounds) == 2:
        out, lse = interface.flash_attn_func(q_TNH[None], k_TGH[None], v_TGH[None], **options)
        return out[0], lse[0] if with_lse else None
    cu_seqlens, longest = on_device(bounds, q_TNH.device), _longest(bounds)
    out, lse = interface.flash_attn_varlen_func(
        q_TNH,
        k_TGH,
        v_TGH,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        **options,
    )
    return out, lse if with_lse else None


def flash_attn_4_continue(q_LNH, k_SGH, v_SGH, scale) -> torch.Tensor:
    # Of fewer queries than keys it takes them for the last ones, as do FlashAttention 3 and 2.
    interface = import_module("flash_attn.cute.interface")
    qkv = (x[None] for x in (q_LNH, k_SGH, v_SGH))
    return interface.flash_attn_func(*qkv, softmax_scale=scale, causal=True, return_lse=False)[0][0]


def flash_attn_4_backward(d_out, q, k, v, out, lse, bounds, scale) -> Gradients:
    backward = import_module("flash_attn.cute.interface")._flash_attn_bwd
    options = {
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if len(bounds) == 2:
        found = backward(*(x[None] for x in (q, k, v, out, d_out, lse)), **options)
        return tuple(x[0] for x in found[:3])
    cu_seqlens, longest = on_device(bounds, q.device), _longest(bounds)
    options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return backward(q, k, v, out, d_out, lse, **options)[:3]


def flash_attn_older(module: str) -> Run:
    """FlashAttention 3 or 2, whose functions differ in what they return."""

    def run(q_TNH, k_TGH, v_TGH, bounds, scale, with_lse) -> Result:
        attend = import_module(module).flash_attn_varlen_func
        cu_seqlens, longest = on_device(bounds, q_TNH.device), _longest(bounds)
        options = {"deterministic": torch.are_deterministic_algorithms_enabled()}
        # Early FlashAttention 3 has no such argument and always returns LSE.
        if with_lse and "return_attn_probs" in signature(attend).parameters:
            options["return_attn_probs"] = True
        found = attend(
            q_TNH,
            k_TGH,
            v_TGH,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            **options,
        )
        out, lse = found[:2] if isinstance(found, tuple) else (found, None)
        return out, lse if with_lse else None

    return run


def flash_attn_older_continue(module: str) -> Continue:
    """FlashAttention 3 or 2."""

    def run(q_LNH, k_SGH, v_SGH, scale) -> torch.Tensor:
        attend = import_module(module).flash_attn_varlen_func
        new, seen = q_LNH.shape[0], k_SGH.shape[0]
        bounds = [on_device((0, stop), q_LNH.device) for stop in (new, seen)]
        options = {"softmax_scale": scale, "causal": True}
        found = attend(q_LNH, k_SGH, v_SGH, *bounds, new, seen, **options)
        return found[0] if isinstance(found, tuple) else found

    return run


def torch_flash(q_TNH, k_TGH, v_TGH, bounds, scale, with_lse) -> Result:
    # torch.nn.attention.varlen wraps this operator, with arguments that change between versions.
    cu_seqlens, longest = on_device(bounds, q_TNH.device), _longest(bounds)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q_TNH, k_TGH, v_TGH),
        *(cu_seqlens, cu_seqlens, longest, longest),
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        scale=scale,
    )
    return out, lse if with_lse else None


def torch_flash_continue(q_LNH, k_SGH, v_SGH, scale) -> torch.Tensor:
    new, seen = q_LNH.shape[0], k_SGH.shape[0]
    bounds = [on_device((0, stop), q_LNH.device) for stop in (new, seen)]
    options = {"dropout_p": 0.0, "is_causal": True, "return_debug_mask": False, "scale": scale}
    operator = torch.ops.aten._flash_attention_forward
    return operator(q_LNH, k_SGH, v_SGH, *bounds, new, seen, **options)[0]


def torch_flash_backward(d_out, q, k, v, out, lse, bounds, scale) -> Gradients:
    cu_seqlens, longest = on_device(bounds, q.device), _longest(bounds)
    # Nothing is dropped out: the state of the generator is not looked at.
    state = torch.empty(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        *(d_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, longest),
        *(0.0, True, *state),
        scale=scale,
    )


def cudnn_document(q_NLH, k_GLH, v_GLH, scale, with_lse) -> Result:
    if q_NLH.shape[1] == 1:
        # cuDNN refuses a backward of a single query and key.
        return sdpa_document(q_NLH, k_GLH, v_GLH, scale, with_lse)
    # The operator under sdpa_kernel(CUDNN_ATTENTION): the public function keeps LSE to itself.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_NLH[None], k_GLH[None], v_GLH[None], None, True, 0.0, True, scale=scale
    )
    return out[0], lse[0].reshape(q_NLH.shape[:2]) if with_lse else None


def cudnn_continue(q_LNH, k_SGH, v_SGH, scale) -> torch.Tensor:
    """cuDNN takes fewer queries for the first ones: what came before them is a call of its own."""
    new, seen = q_LNH.shape[0], k_SGH.shape[0]
    if new == 1:
        return sdpa_continue(q_LNH, k_SGH, v_SGH, scale)
    outs, lses = [], []
    for span, causal in ((slice(seen - new), False), (slice(seen - new, seen), True)):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_LNH, k_SGH[span], v_SGH[span]))
        if k.shape[2]:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].reshape(q.shape[1:3]))
    return merge_partials(outs, lses)[0] if len(outs) > 1 else outs[0]


def cudnn_document_backward(d_out, q, k, v, out, lse, scale) -> Gradients:
    length = q.shape[1]
    if length == 1:
        return _repeated(sdpa_document, d_out, q, k, v, scale)
    # Nothing is dropped out: seed and offset are not looked at.
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    # No bias and no nested tensors.
    absent = (None, None, None)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(x[None] for x in (d_out, q, k, v, out)),
        *(lse[None, ..., None], seed, seed, *absent, length, length, 0.0, True),
        scale=scale,
    )
    return tuple(x[0] for x in found)


def sdpa_document(q_NLH, k_GLH, v_GLH, scale, with_lse) -> Result:
    ratio = q_NLH.shape[0] // k_GLH.shape[0]
    on_gpu = q_NLH.is_cuda
    if ratio > 1 and not on_gpu:
        # On the CPU enable_gqa takes the path that materialises the L x L scores.
        k_GLH, v_GLH = (x.repeat_interleave(ratio, dim=0) for x in (k_GLH, v_GLH))
    q, k, v = (x[None] for x in (q_NLH, k_GLH, v_GLH))
    gqa = ratio > 1 and on_gpu
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return out[0], _lse_by_tiles(q_NLH, k_GLH, scale) if with_lse else None


def sdpa_continue(q_LNH, k_SGH, v_SGH, scale) -> torch.Tensor:
    """Some queries at a time, under a mask: torch takes fewer queries for the first ones."""
    (new, heads, _), seen = q_LNH.shape, k_SGH.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LNH, k_SGH, v_SGH))
    key, first, outs = torch.arange(seen, device=q.device), seen - new, []
    tile = max(1, MASK_ENTRIES // seen)
    for start in range(0, new, tile):
        stop = min(start + tile, new)
        mask = key <= key[first + start : first + stop, None]
        options = {"attn_mask": mask, "scale": scale, "enable_gqa": heads > k.shape[1]}
        outs.append(F.scaled_dot_product_attention(q[:, :, start:stop], k, v, **options)[0])
    return torch.cat(outs, 1).transpose(0, 1)


@torch.no_grad()
def _lse_by_tiles(q_NLH: torch.Tensor, k_GLH: torch.Tensor, scale: float) -> torch.Tensor:
    """The LSE [N, L] that torch's SDPA keeps to itself, some rows of scores at a time."""
    heads, length, _ = q_NLH.shape
    wide = torch.promote_types(q_NLH.dtype, torch.float32)
    keys = k_GLH.to(wide).repeat_interleave(heads // k_GLH.shape[0], dim=0).transpose(1, 2)
    lse = torch.empty(heads, length, dtype=torch.float32, device=q_NLH.device)
    for start in range(0, length, LSE_TILE):
        stop = min(start + LSE_TILE, length)
        scores = q_NLH[:, start:stop].to(wide) @ keys[..., :stop] * scale
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=lse.device).triu(start + 1)
        lse[:, start:stop] = scores.masked_fill_(later, float("-inf")).logsumexp(-1)
    return lse


def by_document(attend: Callable) -> Run:
    """Of a function of one document's (q_NLH, k_GLH, v_GLH), one of a packed row."""

    def run(q_TNH, k_TGH, v_TGH, bounds, scale, with_lse) -> Result:
        outs, lses = [], []
        for start, stop in pairwise(bounds):
            document = (x[start:stop].transpose(0, 1) for x in (q_TNH, k_TGH, v_TGH))
            out_NLH, lse_NL = attend(*document, scale, with_lse)
            outs.append(out_NLH.transpose(0, 1))
            lses.append(lse_NL)
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out, torch.cat(lses, dim=1) if with_lse else None

    return run


def backward_by_document(backward: Callable) -> Backward:
    """Of a function of one document's (d_out, q, k, v, out, lse, scale), one of a packed row."""

    def run(d_out, q, k, v, out, lse, bounds, scale) -> Gradients:
        parts = []
        for start, stop in pairwise(bounds):
            document = (x[start:stop].transpose(0, 1) for x in (d_out, q, k, v, out))
            found = backward(*document, lse[:, start:stop].contiguous(), scale)
            parts.append([x.transpose(0, 1) for x in found])
        return tuple(torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))

    return run


def _repeated(attend: Callable, d_out, q, k, v, *rest) -> Gradients:
    """Gradients of attend(q, k, v, *rest, False), computed once more for them."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = attend(*leaves, *rest, False)
    return torch.autograd.grad(out, leaves, d_out)


def repeated(run: Run) -> Backward:
    """For a backend that gives gradients through its own forward only: runs that again."""

    def backward(d_out, q, k, v, out, lse, bounds, scale) -> Gradients:
        return _repeated(run, d_out, q, k, v, bounds, scale)

    return backward

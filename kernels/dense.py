"""Full layers: causal attention of packed documents by the fastest backend present.

BACKENDS is the whole choice: who needs what, fastest first. None is needed but torch's own SDPA.

Shapes: T packed tokens, N query heads, G KV heads, H head dim, L tokens of one document.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from itertools import pairwise

import torch
import torch.nn.functional as F

from .call import check_qkv, on_device, whole_bounds

log = logging.getLogger("longgen.kernels")

HALF = (torch.bfloat16, torch.float16)
# Rows of scores that are held at once where LSE has to be computed by itself.
LSE_TILE = 128

Result = tuple[torch.Tensor, torch.Tensor | None]
# (q_TNH, k_TGH, v_TGH, bounds, softmax scale, whether LSE is wanted) -> (out_TNH, lse_NT or None)
Run = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], float, bool],
    Result,
]


def _longest(bounds: tuple[int, ...]) -> int:
    return max(stop - start for start, stop in pairwise(bounds))


def _flash_attn_4(q_TNH, k_TGH, v_TGH, bounds, scale, with_lse) -> Result:
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


def _flash_attn_older(module: str) -> Run:
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


def _torch_flash(q_TNH, k_TGH, v_TGH, bounds, scale, with_lse) -> Result:
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


def _cudnn_document(q_NLH, k_GLH, v_GLH, scale, with_lse) -> Result:
    if q_NLH.shape[1] == 1:
        # cuDNN refuses a backward of a single query and key.
        return _sdpa_document(q_NLH, k_GLH, v_GLH, scale, with_lse)
    # The operator under sdpa_kernel(CUDNN_ATTENTION): the public function keeps LSE to itself.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_NLH[None], k_GLH[None], v_GLH[None], None, True, 0.0, True, scale=scale
    )
    return out[0], lse[0].reshape(q_NLH.shape[:2]) if with_lse else None


def _sdpa_document(q_NLH, k_GLH, v_GLH, scale, with_lse) -> Result:
    ratio = q_NLH.shape[0] // k_GLH.shape[0]
    on_gpu = q_NLH.is_cuda
    if ratio > 1 and not on_gpu:
        # On the CPU enable_gqa takes the path that materialises the L x L scores.
        k_GLH, v_GLH = (x.repeat_interleave(ratio, dim=0) for x in (k_GLH, v_GLH))
    q, k, v = (x[None] for x in (q_NLH, k_GLH, v_GLH))
    gqa = ratio > 1 and on_gpu
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return out[0], _lse_by_tiles(q_NLH, k_GLH, scale) if with_lse else None


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


def _by_document(attend: Callable) -> Run:
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


class LseGradient(torch.autograd.Function):
    """Passes an LSE on that came without a gradient, and computes one where it is asked for.

    With P the softmax of the scores, dq = d_lse * scale * P k and dk = P^T (d_lse * scale * q): the
    output, and the gradient of the values, of an attention whose values are the keys.
    """

    @staticmethod
    def forward(ctx, q_TNH, k_TGH, lse_NT, attend, scale):
        ctx.save_for_backward(q_TNH, k_TGH)
        ctx.attend, ctx.scale = attend, scale
        return lse_NT.view_as(lse_NT)

    @staticmethod
    def backward(ctx, d_lse_NT):
        q_TNH, k_TGH = (x.detach() for x in ctx.saved_tensors)
        weight_TN1 = d_lse_NT.T[..., None] * ctx.scale
        with torch.enable_grad():
            values_TGH = k_TGH.clone().requires_grad_()
            out_TNH, _ = ctx.attend(q_TNH, k_TGH, values_TGH)
        dq_TNH = (weight_TN1 * out_TNH.detach()).to(q_TNH.dtype)
        weighted_TNH = (weight_TN1 * q_TNH).to(q_TNH.dtype)
        (dk_TGH,) = torch.autograd.grad(out_TNH, values_TGH, weighted_TNH)
        return dq_TNH, dk_TGH, None, None, None


@dataclass(frozen=True)
class DenseBackend:
    """One way to run a full layer, and what it needs.

    Args:
        name: what `backend=` takes.
        run: the attention itself.
        module: what must be importable; None where torch alone is enough.
        majors: CUDA compute capabilities by their major number; None for any device.
        dtypes: of q, k and v.
        most_dims: the greatest head dim.
        dims_step: what the head dim is a multiple of.
        takes_cu_seqlens: packed documents are one call; else each is a call of its own.
        differentiable_lse: its LSE has a gradient of its own; else LseGradient adds one.
        deterministic: gradients repeat bit by bit where torch.use_deterministic_algorithms asks.
    """

    name: str
    run: Run
    module: str | None = None
    majors: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    most_dims: int = 256
    dims_step: int = 8
    takes_cu_seqlens: bool = True
    differentiable_lse: bool = False
    deterministic: bool = True

    def unmet(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """What this backend lacks to serve such inputs; None where it lacks nothing."""
        if self.majors is not None:
            found = _capability(device)
            if found is None:
                return f"needs a CUDA GPU; the inputs are on {device.type}"
            if found[0] not in self.majors:
                legal = ", ".join(f"{major}.x" for major in self.majors)
                return f"needs compute capability {legal}; this GPU has {found[0]}.{found[1]}"
        if dtype not in self.dtypes:
            legal = ", ".join(_name(legal) for legal in self.dtypes)
            return f"takes {legal}; the inputs are {_name(dtype)}"
        if head_dim % self.dims_step or head_dim > self.most_dims:
            legal = f"multiples of {self.dims_step} up to {self.most_dims}"
            return f"takes head dims that are {legal}; the inputs have {head_dim}"
        if not self.deterministic and torch.are_deterministic_algorithms_enabled():
            return "is not deterministic, which torch.use_deterministic_algorithms asks for"
        return None if self.module is None else _import_error(self.module)


BACKENDS = (
    DenseBackend(
        "flash_attn_4",
        _flash_attn_4,
        module="flash_attn.cute.interface",
        majors=(9, 10, 11),
        most_dims=128,
        differentiable_lse=True,
    ),
    DenseBackend(
        "flash_attn_3",
        _flash_attn_older("flash_attn_interface"),
        module="flash_attn_interface",
        majors=(9,),
    ),
    DenseBackend(
        "cudnn",
        _by_document(_cudnn_document),
        majors=(9, 10),
        most_dims=128,
        takes_cu_seqlens=False,
        deterministic=False,
    ),
    # Not `flash_attn`: flash-attn-4 alone makes a package of that name too.
    DenseBackend(
        "flash_attn_2",
        _flash_attn_older("flash_attn.flash_attn_interface"),
        module="flash_attn.flash_attn_interface",
        majors=(8, 9, 10, 11, 12),
    ),
    # FlashAttention 2 as torch carries it.
    DenseBackend("torch_flash", _torch_flash, majors=(8, 9, 10, 11, 12)),
    DenseBackend(
        "torch_sdpa",
        _by_document(_sdpa_document),
        dtypes=(*HALF, torch.float32, torch.float64),
        most_dims=2**16,
        dims_step=1,
        takes_cu_seqlens=False,
    ),
)
BY_NAME = {backend.name: backend for backend in BACKENDS}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None on a CPU and on GPUs of another make, whose numbers mean others."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


@cache
def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:
        # A package may be there and fail on the driver or on a library of another version.
        return f"needs the module {module}, which does not import ({error})"
    return None


def choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, documents: int = 1
) -> tuple[DenseBackend, dict[str, str]]:
    """The backend for such inputs, and of each faster one why it was passed over.

    Where a row has several documents, one that takes cu_seqlens goes before one that does not.
    """
    passed, kept = {}, None
    for backend in BACKENDS:
        reason = backend.unmet(device, dtype, head_dim)
        if reason is not None:
            passed[backend.name] = reason
        elif documents == 1 or backend.takes_cu_seqlens:
            return backend, passed
        elif kept is None:
            kept = backend, dict(passed)
            passed[backend.name] = "would take a call for each document"
    if kept is None:
        raise ValueError(
            f"full layers of {_name(dtype)} with head dim {head_dim} on {device.type}: "
            + "; ".join(f"{name} {reason}" for name, reason in passed.items())
            + "; cast the inputs to bfloat16"
        )
    return kept


@cache
def _say_once(backend: str, device: str) -> None:
    log.info("full layers on %s run by %s", device, backend)


def _named(name: str, q_TNH: torch.Tensor) -> DenseBackend:
    if name not in BY_NAME:
        raise ValueError(f"backend={name!r}: must be one of {', '.join(BY_NAME)}, or None")
    inputs = q_TNH.device, q_TNH.dtype, q_TNH.shape[-1]
    reason = BY_NAME[name].unmet(*inputs)
    if reason is not None:
        legal = [other.name for other in BACKENDS if other.unmet(*inputs) is None]
        raise ValueError(
            f"backend={name!r}: {reason}; for these inputs use one of {', '.join(legal)}, or None"
        )
    return BY_NAME[name]


# torch.compile breaks its graph here: traced, the choice and the documents' lengths would become
# part of the graph, compiled anew for each row.
@torch.compiler.disable
def dense_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    cu_seqlens: list[int],
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each document; `cu_seqlens` on the host, from 0 to T.

    Args:
        q_TNH: queries [T, N, H] of all documents, one after another, after RoPE.
        k_TGH, v_TGH: keys and values [T, G, H]; N is a multiple of G.
        cu_seqlens: the documents' cumulative lengths.
        softmax_scale: by default 1 / sqrt(H).
        return_lse: also return the natural-log LSE [N, T] in float32.
        backend: a name of BACKENDS; None takes the first that fits, said once in the log.

    Returns:
        out [T, N, H] in the inputs' dtype, with return_lse (out, lse); differentiable in q, k and
        v, through both.

    Raises:
        ValueError: where shapes, dtypes, devices or cu_seqlens do not fit together, or the named
            backend does not serve such inputs.
    """
    check_qkv(q_TNH, k_TGH, v_TGH)
    if not q_TNH.dtype == k_TGH.dtype == v_TGH.dtype:
        dtypes = ", ".join(_name(x.dtype) for x in (q_TNH, k_TGH, v_TGH))
        raise ValueError(f"q, k, v of {dtypes}: must be of one dtype; cast them to one")
    bounds = whole_bounds(list(cu_seqlens), q_TNH.shape[0])
    if backend is not None:
        chosen = _named(backend, q_TNH)
    else:
        chosen, _ = choose(q_TNH.device, q_TNH.dtype, q_TNH.shape[-1], len(bounds) - 1)
        _say_once(chosen.name, q_TNH.device.type)
    if len(bounds) == 1:
        lse = q_TNH.new_empty(q_TNH.shape[1], 0, dtype=torch.float32)
        return (torch.empty_like(q_TNH), lse) if return_lse else torch.empty_like(q_TNH)
    scale = q_TNH.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    # Every backend takes views of a larger tensor, but not dims that lie apart.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_TNH, k_TGH, v_TGH))
    out, lse = chosen.run(q, k, v, bounds, scale, return_lse)
    if not return_lse:
        return out
    if not chosen.differentiable_lse:

        def attend(q_TNH, k_TGH, v_TGH):
            return chosen.run(q_TNH, k_TGH, v_TGH, bounds, scale, False)

        lse = LseGradient.apply(q, k, lse.detach(), attend, scale)
    return out, lse

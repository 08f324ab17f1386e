"""Full layers: causal attention of packed documents by the fastest backend present.

BACKENDS is the whole choice: who needs what, fastest first. None is needed but torch's own SDPA.

Shapes: T packed tokens, N query heads, G KV heads, H head dim, L tokens of one document.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from .call import check_qkv, whole_bounds
from .dense_backends import (
    Backward,
    Continue,
    Run,
    backward_by_document,
    by_document,
    cudnn_continue,
    cudnn_document,
    cudnn_document_backward,
    flash_attn_4,
    flash_attn_4_backward,
    flash_attn_4_continue,
    flash_attn_older,
    flash_attn_older_continue,
    repeated,
    sdpa_continue,
    sdpa_document,
    torch_flash,
    torch_flash_backward,
    torch_flash_continue,
)
from .hardware import cuda_capability, describe_skipped

log = logging.getLogger("longgen.kernels")

HALF = (torch.bfloat16, torch.float16)


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
        backward: its gradients from out and LSE.
        continues: the attention of a document's last tokens to all of it, without gradients.
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
    backward: Backward
    continues: Continue
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
            found = cuda_capability(device)
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


FLASH_ATTN_3 = flash_attn_older("flash_attn_interface")
FLASH_ATTN_2 = flash_attn_older("flash_attn.flash_attn_interface")
SDPA = by_document(sdpa_document)
BACKENDS = (
    DenseBackend(
        "flash_attn_4",
        flash_attn_4,
        flash_attn_4_backward,
        flash_attn_4_continue,
        module="flash_attn.cute.interface",
        majors=(9, 10, 11),
        most_dims=128,
        differentiable_lse=True,
    ),
    DenseBackend(
        "flash_attn_3",
        FLASH_ATTN_3,
        repeated(FLASH_ATTN_3),
        flash_attn_older_continue("flash_attn_interface"),
        module="flash_attn_interface",
        majors=(9,),
    ),
    DenseBackend(
        "cudnn",
        by_document(cudnn_document),
        backward_by_document(cudnn_document_backward),
        cudnn_continue,
        majors=(9, 10),
        most_dims=128,
        takes_cu_seqlens=False,
        deterministic=False,
    ),
    # Not `flash_attn`: flash-attn-4 alone makes a package of that name too.
    DenseBackend(
        "flash_attn_2",
        FLASH_ATTN_2,
        repeated(FLASH_ATTN_2),
        flash_attn_older_continue("flash_attn.flash_attn_interface"),
        module="flash_attn.flash_attn_interface",
        majors=(8, 9, 10, 11, 12),
    ),
    # FlashAttention 2 as torch carries it.
    DenseBackend(
        "torch_flash",
        torch_flash,
        torch_flash_backward,
        torch_flash_continue,
        majors=(8, 9, 10, 11, 12),
    ),
    DenseBackend(
        "torch_sdpa",
        SDPA,
        repeated(SDPA),
        sdpa_continue,
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
            f"no backend{describe_skipped(passed.items())}; cast the inputs to bfloat16"
        )
    return kept


@cache
def _log_once(backend: str, device: str, passed: tuple[tuple[str, str], ...]) -> None:
    log.info("full layers on %s run by %s%s", device, backend, describe_skipped(passed))


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


def _chosen(q_TNH: torch.Tensor, bounds: tuple[int, ...], name: str | None) -> DenseBackend:
    if name is not None:
        return _named(name, q_TNH)
    chosen, passed = choose(q_TNH.device, q_TNH.dtype, q_TNH.shape[-1], len(bounds) - 1)
    # On a CPU there is nothing to miss.
    _log_once(chosen.name, q_TNH.device.type, tuple(passed.items()) if q_TNH.is_cuda else ())
    return chosen


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
    chosen = _chosen(q_TNH, bounds, backend)
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


@torch.no_grad()
def dense_continuation(
    q_LNH: torch.Tensor,
    k_SGH: torch.Tensor,
    v_SGH: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention of a document's last L tokens to all its S tokens: out [L, N, H].

    For chunks of a prompt over a cache: keys and values are views of it, with H innermost. No
    gradients. `backend` as in dense_attention.

    Raises:
        ValueError: where shapes or devices do not fit together, or the named backend does not serve
            such inputs.
    """
    new, seen = q_LNH.shape[0], k_SGH.shape[0]
    if not 0 < new <= seen:
        raise ValueError(
            f"{new} queries of a document of {seen} keys: must be at least 1 and no more than the "
            "keys, their own among them; pass the keys from the document's first token on"
        )
    check_qkv(q_LNH, k_SGH[:new], v_SGH[:new])
    scale = q_LNH.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _chosen(q_LNH, (0, seen), backend).continues(q_LNH, k_SGH, v_SGH, scale)


@torch.no_grad()
def dense_attention_gradients(
    d_out_TNH: torch.Tensor,
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    cu_seqlens: list[int],
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of dense_attention from its kept out and LSE, without running it again.

    FlashAttention 3 and 2 and torch's SDPA give gradients through their own forward only, and run
    it. The arguments are dense_attention's; d_out_TNH is the gradient of out.
    """
    bounds = whole_bounds(list(cu_seqlens), q_TNH.shape[0])
    chosen = _chosen(q_TNH, bounds, backend)
    scale = q_TNH.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    inputs = (d_out_TNH, q_TNH, k_TGH, v_TGH, out_TNH)
    inputs = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    return chosen.backward(*inputs, lse_NT, bounds, scale)

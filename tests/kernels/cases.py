"""One call of sparse_attention held against the float32 oracle: outputs and every gradient."""

from __future__ import annotations

import torch

import kernels.triton_attention
from kernels.pattern import Pattern
from kernels.reference import reference_attention
from kernels.sparse_attention import sparse_attention

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Relative to the oracle on the same inputs; float32 runs on a GPU as three TF32 products.
TOLERANCE = {
    torch.float32: 2e-5 if ON_GPU else 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
PATTERNS = {
    "sinks_window": Pattern(sink_tokens=5, window=37, block=16),
    "no_sinks": Pattern(sink_tokens=0, window=2, block=4),
    "strided": Pattern(sink_tokens=3, window=19, block=8, stride=4),
    "per_head": Pattern(sink_tokens=3, window=19, block=8, stride=4, phase="per_head"),
    # Whole tiles of special keys, which small_tiles makes of 32 keys.
    "aligned": Pattern(sink_tokens=32, window=1, block=32, stride=2),
    "aligned_per_head": Pattern(sink_tokens=0, window=40, block=32, stride=2, phase="per_head"),
}


def small_tiles(patch, keys: int = 32) -> None:
    """Tiles so small that short documents have tiles of every kind; quick in the interpreter."""
    small = {kernel: (32, keys, 4, 1) for kernel in kernels.triton_attention.LARGE}
    for table in ("LARGE", "SMALL", "SINGLE"):
        patch.setattr(kernels.triton_attention, table, small)
    patch.setattr(kernels.triton_attention, "FAR_QUERIES", 32)


def make_inputs(lengths, heads, kv_heads, head_dim, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v, d_out, d_lse and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    q, k, v, d_out = (
        torch.randn(tokens, n, head_dim, generator=generator).to(device, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    d_lse = torch.randn(heads, tokens, generator=generator).to(device)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, d_out, d_lse, bounds


def outputs_and_gradients(attend, q, k, v, d_out, d_lse):
    """(out, lse, dq, dk, dv) of attend(q, k, v) -> (out, lse); d_lse None leaves the LSE unused."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v)
    loss = (out * d_out.to(out.dtype)).sum()
    if d_lse is not None:
        loss = loss + (lse * d_lse).sum()
    loss.backward()
    return [x.detach().float() for x in (out, lse, q.grad, k.grad, v.grad)]


def relative_errors(
    pattern,
    lengths,
    heads,
    kv_heads,
    head_dim,
    *,
    dtype=torch.float32,
    device="cpu",
    backend=None,
    first_kv_head=2,
    more_kv_heads=3,
    with_lse=True,
    seed=0,
) -> dict[str, float]:
    """||got - oracle|| / ||oracle|| of out, lse, dq, dk and dv; infinite where there is a NaN."""
    q, k, v, d_out, d_lse, bounds = make_inputs(
        lengths, heads, kv_heads, head_dim, dtype, device, seed
    )
    d_lse = d_lse if with_lse else None
    place = {"first_kv_head": first_kv_head, "total_kv_heads": kv_heads + more_kv_heads}
    mine = outputs_and_gradients(
        lambda *x: sparse_attention(*x, pattern, bounds, return_lse=True, backend=backend, **place),
        q, k, v, d_out, d_lse,
    )  # fmt: skip
    oracle = outputs_and_gradients(
        lambda *x: reference_attention(*x, pattern, bounds, **place),
        q.float(), k.float(), v.float(), d_out.float(), d_lse,
    )  # fmt: skip
    # The gradients of q and k are differences, which may cancel: a lone key's are zero.
    least = {"dq": 0.3 * d_out.float().norm(), "dk": 0.3 * d_out.float().norm()}
    errors = {}
    for name, got, wanted in zip(("out", "lse", "dq", "dk", "dv"), mine, oracle, strict=True):
        error = (got - wanted).norm() / wanted.norm().clamp(min=least.get(name, 0))
        errors[name] = float("inf") if got.isnan().any() else float(error)
    return errors


def assert_matches_reference(*args, tolerance=None, **kwargs) -> None:
    """As relative_errors; the tolerance is the dtype's unless given, the LSE's is float32's."""
    exact = TOLERANCE[torch.float32]
    tolerance = tolerance or TOLERANCE[kwargs.get("dtype", torch.float32)]
    errors = relative_errors(*args, **kwargs)
    legal = {name: 10 * exact if name == "lse" else tolerance for name in errors}
    wrong = {name: error for name, error in errors.items() if error > legal[name]}
    assert not wrong, f"{wrong} beyond {tolerance} for {args}, {kwargs}"

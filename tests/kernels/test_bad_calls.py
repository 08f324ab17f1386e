"""What sparse_attention refuses, with the value, what is legal and the remedy; and odd views."""

import pytest
import torch

import kernels.triton_attention
from kernels.dense import dense_attention
from kernels.pattern import Pattern
from kernels.sparse_attention import sparse_attention
from tests.closeness import assert_close_by_norm
from tests.kernels.cases import DEVICE, ON_GPU, PATTERNS, TOLERANCE, make_inputs, small_tiles

PATTERN = PATTERNS["strided"]


def call(pattern=PATTERN, bounds=None, **changes):
    """sparse_attention of ten tokens, of which some arguments are changed."""
    q, k, v, _, _, given = make_inputs([4, 6], 4, 2, 64)
    tensors = {"q": q, "k": k, "v": v}
    for name in tensors:
        tensors[name] = changes.pop(name, lambda x: x)(tensors[name])
    bounds = given if bounds is None else bounds
    return sparse_attention(*tensors.values(), pattern, bounds, **changes)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


REFUSED = {
    "groups": (
        {"k": lambda x: x[:, :1].expand(10, 3, 64), "v": lambda x: x[:, :1].expand(10, 3, 64)},
        r"q \(10, 4, 64\), k \(10, 3, 64\).*N a multiple of G; check the head counts",
    ),
    "no_groups": ({"k": lambda x: x[:, :0], "v": lambda x: x[:, :0]}, "N a multiple of G"),
    "k_and_v": ({"v": lambda x: x[:, :1]}, r"v \(10, 1, 64\): must be \[T, N, H\]"),
    "tokens": ({"q": lambda x: x[:9]}, r"q \(9, 4, 64\).*must be \[T, N, H\], \[T, G, H\]"),
    "head_dims": ({"q": lambda x: x[..., :32]}, r"q \(10, 4, 32\), k \(10, 2, 64\)"),
    "batched": ({"q": lambda x: x[None]}, r"q \(1, 10, 4, 64\).*must be \[T, N, H\]"),
    "mixed_dtypes": (
        {"v": lambda x: x.bfloat16()},
        r"q torch.float32, k torch.float32, v torch.bfloat16.*one dtype.*cast them",
    ),
    "float64": (
        {name: lambda x: x.double() for name in "qkv"},
        "q torch.float64.*one dtype of torch.bfloat16, torch.float16, torch.float32; cast",
    ),
    "devices": (
        {"k": lambda x: x.to("meta")},
        r"q on cpu, k on meta, v on cpu: must be on one device; move them with .to\(device\)",
    ),
    "bounds_are_long": (
        {"bounds": ints(0, 10, dtype=torch.int64)},
        r"cu_seqlens is torch.int64 of shape \(2,\): must be a torch.int32 tensor.*pass torch",
    ),
    "bounds_are_a_list": ({"bounds": [0, 10]}, "cu_seqlens is list: must be a torch.int32 tensor"),
    "bounds_have_rows": (
        {"bounds": ints(0, 10)[None]},
        r"cu_seqlens is torch.int32 of shape \(1, 2\): must be a torch.int32 tensor \[documents",
    ),
    "bounds_end_early": (
        {"bounds": ints(0, 9)},
        r"cu_seqlens=\[0, 9\]: must ascend from 0 to the 10 tokens; pass the documents'",
    ),
    "bounds_begin_late": ({"bounds": ints(1, 10)}, "must ascend from 0 to the 10 tokens"),
    "bounds_are_one": ({"bounds": ints(0)}, "must ascend from 0 to the 10 tokens"),
    "bounds_fall": (
        {"bounds": ints(0, 7, 3, 4, 5, 6, 7, 8, 9, 10)},
        r"cu_seqlens=\[0, 7, 3, 4\]...\[10\]: must ascend",
    ),
    "heads_beyond": (
        {"first_kv_head": 3, "total_kv_heads": 4},
        "first_kv_head=3 with 2 KV heads: must be from 0 to total_kv_heads - 2 = 2; pass",
    ),
    "heads_before": ({"first_kv_head": -1}, "first_kv_head=-1 with 2 KV heads: must be from 0"),
    "scale": ({"softmax_scale": 0.0}, "softmax_scale=0.0: must be above 0; None takes"),
    "backend": (
        {"backend": "cudnn"},
        "backend='cudnn': must be one of hopper, triton, tiled or None for the fastest",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_what_is_not_changed_is_not_refused():
    assert call().shape == (10, 4, 64)


def test_a_window_of_zero_never_reaches_a_kernel():
    with pytest.raises(ValueError, match="pattern.window=0: must be .* at least 1.*set pattern"):
        Pattern(window=0)


@pytest.mark.skipif(ON_GPU, reason="the interpreter takes CPU tensors")
def test_a_head_dim_that_triton_does_not_take():
    message = (
        "backend='triton': head dim 52 is not a multiple of 8 from 16 to 128; pass backend=None"
    )
    with pytest.raises(ValueError, match=message):
        call(backend="triton", **{name: lambda x: x[..., :52] for name in "qkv"})


def test_a_period_beyond_32_bits_is_refused_by_triton():
    message = (
        r"backend='triton': block \* stride = 2147483648 is not below 2\^31; pass backend=None"
    )

    def to(x):
        return x.to(DEVICE)

    with pytest.raises(ValueError, match=message):
        call(Pattern(4, 4, 2**16, 2**15), q=to, k=to, v=to, backend="triton")


def test_windows_and_sinks_beyond_32_bits_are_all_there_is(monkeypatch):
    if not ON_GPU:
        small_tiles(monkeypatch)
    q, k, v, *_, bounds = make_inputs([9], 1, 1, 64, device=DEVICE)
    full = sparse_attention(q, k, v, Pattern(0, 9), bounds)
    for pattern in (Pattern(0, 2**40), Pattern(2**40, 1)):
        out = sparse_attention(q, k, v, pattern, bounds, backend="triton")
        assert_close_by_norm(out, full, TOLERANCE[torch.float32])


def test_cpu_tensors_are_refused_by_a_compiled_kernel(monkeypatch):
    monkeypatch.setattr(kernels.triton_attention, "INTERPRETED", False)
    message = "backend='triton': needs a CUDA GPU; the tensors are on cpu; pass backend=None"
    with pytest.raises(ValueError, match=message):
        call(backend="triton")


def test_bounds_may_be_on_the_device_and_hold_empty_documents():
    q, k, v, *_ = (x.to(DEVICE) for x in make_inputs([10], 2, 1, 64))
    empty = sparse_attention(q, k, v, PATTERN, ints(0, 0, 4, 4, 10, 10).to(DEVICE))
    assert torch.equal(empty, sparse_attention(q, k, v, PATTERN, ints(0, 4, 10)))


def views(x):
    """The values of x under other strides: (last dim contiguous or not, tensor)."""
    tokens, heads, head_dim = x.shape
    wide = x.new_full((tokens, 2 * heads, head_dim + 3), float("nan"))
    wide[:, :heads, :head_dim] = x
    yield wide[:, :heads, :head_dim]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_views_give_what_contiguous_tensors_give(monkeypatch, backend):
    if not ON_GPU:
        small_tiles(monkeypatch)
    given = make_inputs([13, 8], 2, 1, 64, device=DEVICE)
    bounds = given[-1]

    def run(q, k, v, d_out, d_lse):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, lse = sparse_attention(q, k, v, PATTERN, bounds, return_lse=True, backend=backend)
        torch.autograd.backward([out, lse], [d_out, d_lse])
        return out, lse, q.grad, k.grad, v.grad

    wanted = run(*given[:-1])
    d_lse = given[4]
    for q, k, v, d_out in zip(*(views(x) for x in given[:4]), strict=True):
        for got, right in zip(run(q, k, v, d_out, d_lse.T.contiguous().T), wanted, strict=True):
            assert_close_by_norm(got, right, TOLERANCE[torch.float32])
    # What the sum of the outputs hands back: one number under strides of zero.
    ones = torch.ones((), device=DEVICE).expand(given[3].shape)
    for got, right in zip(
        run(*given[:3], ones, d_lse), run(*given[:3], ones.contiguous(), d_lse), strict=True
    ):
        assert_close_by_norm(got, right, TOLERANCE[torch.float32])


def test_full_patterns_go_to_the_dense_layers():
    q, k, v, _, _, bounds = make_inputs([11, 5], 4, 2, 16)
    for pattern in (Pattern.full(), Pattern(stride=1)):
        out, lse = sparse_attention(q, k, v, pattern, bounds, return_lse=True)
        wanted, wanted_lse = dense_attention(q, k, v, bounds.tolist(), return_lse=True)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)

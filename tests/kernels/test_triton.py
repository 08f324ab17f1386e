"""The Triton kernels against the float32 oracle: in the interpreter, on a GPU compiled."""

import subprocess
import sys

import pytest
import torch

import kernels.tiled
import kernels.triton_attention
from kernels.call import Call
from kernels.pattern import Pattern
from kernels.sparse_attention import sparse_attention
from tests.closeness import assert_close_by_norm, relative_error
from tests.kernels.cases import (
    DEVICE,
    ON_GPU,
    PATTERNS,
    TOLERANCE,
    assert_matches_reference,
    make_inputs,
    relative_errors,
    small_tiles,
)

LONG = {
    "sinks_window": Pattern(sink_tokens=64, window=256, block=64),
    "odd": Pattern(sink_tokens=5, window=333, block=24, stride=7),
    "strided": Pattern(sink_tokens=64, window=192, block=64, stride=4),
    "per_head": Pattern(sink_tokens=64, window=192, block=64, stride=4, phase="per_head"),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    if not ON_GPU:
        small_tiles(monkeypatch)


def check(name, lengths, heads=2, kv_heads=1, head_dim=64, patterns=PATTERNS, **kwargs):
    kwargs = {"device": DEVICE, "backend": "triton", **kwargs}
    assert_matches_reference(patterns[name], lengths, heads, kv_heads, head_dim, **kwargs)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name):
    heads = 2 if PATTERNS[name].heads_differ else 1
    check(name, [101 if "aligned" in name else 45, 1, 0, 9], heads, heads)


def test_several_query_heads_for_each_kv_head():
    check("per_head", [33], 4, 2)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (16, torch.float32),
        (24, torch.bfloat16),
        (32, torch.float32),
        (64, torch.float16),
        (64, torch.bfloat16),
        (80, torch.bfloat16),
        (80, torch.float32),
        (96, torch.float16),
        (128, torch.float32),
        (128, torch.bfloat16),
    ],
    ids=str,
)
def test_head_dims_and_dtypes(head_dim, dtype):
    check("strided", [40, 9], 1, 1, head_dim, dtype=dtype)


def test_tiles_as_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    check("strided", [130, 9], 1, 1, dtype=torch.bfloat16)


def test_gradients_without_the_lse():
    check("strided", [40], 1, 1, with_lse=False)


def test_window_of_one_sees_itself_only():
    q, k, v, *_, bounds = make_inputs([40, 3], 2, 2, 64, device=DEVICE)
    out = sparse_attention(q, k, v, Pattern(0, 1), bounds, backend="triton")
    assert_close_by_norm(out, v, TOLERANCE[torch.float32])


def test_no_token_at_all():
    q, k, v, *_ = make_inputs([0], 2, 1, 64, device=DEVICE)
    k.requires_grad_()
    bounds = torch.tensor([0, 0], dtype=torch.int32)
    out = sparse_attention(q, k, v, Pattern(), bounds, backend="triton")
    out.sum().backward()
    assert out.shape == q.shape and k.grad.shape == k.shape


def test_every_output_is_written(monkeypatch):
    """Output buffers start poisoned; what is not written stays NaN."""
    honest = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = honest(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check("strided", [37, 9], 1, 1, 80)


def test_the_same_inputs_give_the_same_bits():
    def run():
        q, k, v, d_out, _, bounds = make_inputs([40], 1, 1, 64, torch.float16, DEVICE)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = sparse_attention(q, k, v, PATTERNS["strided"], bounds, backend="triton")
        out.backward(d_out)
        return out, q.grad, k.grad, v.grad

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


CALL = Call(Pattern(6, 5, 4, 3, "per_head"), (0, 31, 40), 1, 4, 0.125)


def passes_and_oracle(change, call=CALL):
    """Errors of each pass where `change` has been done to what reaches its kernels.

    The backward gets the right out and LSE, so that only its own mistakes show.
    """
    lengths = [b - a for a, b in zip(call.bounds[:-1], call.bounds[1:], strict=True)]
    q, k, v, d_out, d_lse, _ = make_inputs(lengths, 1, 1, 64, device=DEVICE)
    out, lse = kernels.tiled.forward(q, k, v, call)
    saved = (q, k, v, out, lse, d_out, d_lse)
    wanted = (out, lse, *kernels.tiled.backward(*saved, call))
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        got = kernels.triton_attention.forward(q, k, v, call)
        got = (*got, *kernels.triton_attention.backward(*saved, call))
    errors = [relative_error(a, b) for a, b in zip(got, wanted, strict=True)]
    return dict(zip(("out", "lse", "dq", "dk", "dv"), errors, strict=True))


def test_both_passes_agree_with_the_tiled_ones():
    assert max(passes_and_oracle(lambda patch: None).values()) < TOLERANCE[torch.float32]


# The phase of a KV head follows from where it lies in the model.
@pytest.mark.parametrize(
    "argument", ["sink_tokens", "window", "block", "stride", "first_kv_head", "cu_seqlens"]
)
def test_an_off_by_one_is_caught(argument):
    honest = kernels.triton_attention.pattern_arguments

    def one_more(*args):
        found = honest(*args)
        if argument == "cu_seqlens":
            further = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
            return found | {argument: found[argument] + further}
        return found | {argument: found[argument] + 1}

    errors = passes_and_oracle(
        lambda patch: patch.setattr(kernels.triton_attention, "pattern_arguments", one_more)
    )
    assert min(errors.values()) > 1e-3, errors


def test_a_wrong_run_of_special_keys_is_caught():
    honest = kernels.triton_attention.run_argument

    def doubled(*args):
        return {"RUN": 2 * honest(*args)["RUN"]}

    tokens = 200 if ON_GPU else 101
    aligned = Call(PATTERNS["aligned"], (0, tokens), 0, 1, 0.125)
    errors = passes_and_oracle(
        lambda patch: patch.setattr(kernels.triton_attention, "run_argument", doubled), aligned
    )
    assert min(errors[name] for name in ("out", "lse", "dq")) > 1e-3, errors


@pytest.mark.parametrize("planted", ["a row further", "to base 2", "a head further"])
def test_a_wrong_lse_is_caught(monkeypatch, planted):
    changes = {
        "a row further": lambda lse: lse.roll(1, 1),
        "to base 2": lambda lse: lse * 1.4427,
        "a head further": lambda lse: lse.roll(1, 0),
    }
    honest = kernels.triton_attention.forward

    def wrong(*args):
        out, lse = honest(*args)
        return out, changes[planted](lse)

    monkeypatch.setattr(kernels.triton_attention, "forward", wrong)
    case = {"device": DEVICE, "backend": "triton", "with_lse": False}
    errors = relative_errors(PATTERNS["per_head"], [31], 2, 2, 64, **case)
    assert min(errors[name] for name in ("lse", "dq", "dk", "dv")) > 1e-3, errors


def test_a_forgotten_gradient_of_the_lse_is_caught():
    honest = kernels.triton_attention.row_delta

    def forgetful(out, d_out, d_lse):
        return honest(out, d_out, None)

    errors = passes_and_oracle(
        lambda patch: patch.setattr(kernels.triton_attention, "row_delta", forgetful)
    )
    assert errors["dq"] > 1e-3 and errors["dk"] > 1e-3, errors


def test_no_length_is_compiled_in():
    """Of all whole numbers only strides may have kernels of their own for 1 and multiples of 16."""
    code = (
        "import triton, kernels.sparse_forward as f, kernels.sparse_backward as b\n"
        "for module in (f, b):\n"
        "    for name, kernel in vars(module).items():\n"
        "        if name.endswith('_kernel'):\n"
        "            assert isinstance(kernel, triton.runtime.JITFunction)\n"
        "            for p in kernel.params:\n"
        "                if not (p.is_constexpr or p.do_not_specialize):\n"
        "                    print(name, p.name)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path), "HOME": "/tmp"},
        capture_output=True,
        text=True,
    )
    assert not found.returncode, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert len({name for name, _ in lines}) == 5
    kept = ("_ptr", "_stride_t", "_stride_n", "_stride_g", "cu_seqlens", "slot_tiles", "scale")
    assert not [line for line in lines if not line[1].endswith(kept)]


@pytest.mark.gpu
def test_no_length_compiles_again():
    def compiled():
        modules = (kernels.sparse_forward, kernels.sparse_backward)
        found = [x for m in modules for name, x in vars(m).items() if name.endswith("_kernel")]
        return sum(len(c[0]) for kernel in found for c in kernel.device_caches.values())

    def run(lengths):
        q, k, v, d_out, _, bounds = make_inputs(lengths, 2, 1, 64, torch.bfloat16, "cuda")
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = sparse_attention(q, k, v, LONG["per_head"], bounds, backend="triton")
        out.backward(d_out)

    run([1000])
    before = compiled()
    assert before > 4
    for tokens in range(1000, 1018):
        run([tokens])
    for documents in range(1, 18):
        run([300] * documents)
    run([1, 16, 1])
    assert compiled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1111], [700, 1, 1347], [64, 64, 1920]], ids=str)
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 128), (8, 1, 80)])
def test_large_shapes(name, lengths, heads, kv_heads, head_dim):
    check(name, lengths, heads, kv_heads, head_dim, LONG, dtype=torch.bfloat16)
    check(name, lengths, heads, kv_heads, head_dim, LONG, dtype=torch.bfloat16, backend=None)


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """T * N * H above 2^31: the last document alone gives what it gives after all the others."""
    tokens = 2**31 // (32 * 128) + 1000
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, d_out = (
        torch.randn(tokens, n, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
        for n in (32, 2, 2, 32)
    )
    last = slice(tokens - 900, tokens)

    def run(bounds, *tensors):
        q, k, v, d_out = tensors
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        bounds = torch.tensor(bounds, dtype=torch.int32)
        out = sparse_attention(*leaves, LONG["sinks_window"], bounds, backend="triton")
        out.backward(d_out)
        return out.detach(), *(x.grad for x in leaves)

    whole = run([0, tokens - 900, tokens], q, k, v, d_out)
    alone = run([0, 900], *(x[last] for x in (q, k, v, d_out)))
    for got, wanted in zip(whole, alone, strict=True):
        assert_close_by_norm(got[last], wanted, TOLERANCE[torch.bfloat16])

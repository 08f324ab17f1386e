"""Every path of sparse_attention against the float32 oracle, forward and all gradients."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import kernels.tiled
from kernels.pattern import Pattern
from kernels.reference import reference_attention
from kernels.sparse_attention import sparse_attention

PATTERNS = {
    "full": Pattern.full(),
    "sinks_window": Pattern(sink_tokens=5, window=37, block=16),
    "no_sinks": Pattern(sink_tokens=0, window=2, block=4),
    "strided": Pattern(sink_tokens=3, window=19, block=8, stride=4),
    "per_head": Pattern(sink_tokens=3, window=19, block=8, stride=4, phase="per_head"),
}
DOCUMENTS = {"one": [331], "many": [1, 130, 7, 255], "empty_between": [60, 0, 61]}


def inputs(lengths, heads, kv_heads, head_dim, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    q, k, v, d_out = (
        torch.randn(tokens, n, head_dim, generator=generator).to(device, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, d_out, bounds


def outputs_and_gradients(attend, q, k, v, d_out):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    out.backward(d_out.to(out.dtype))
    return [x.detach().float() for x in (out, q.grad, k.grad, v.grad)]


def assert_matches_reference(pattern, lengths, heads, kv_heads, head_dim, tolerance, **kwargs):
    q, k, v, d_out, bounds = inputs(lengths, heads, kv_heads, head_dim, **kwargs)
    layout = {"first_kv_head": 2, "total_kv_heads": kv_heads + 3}
    mine = outputs_and_gradients(
        lambda *x: sparse_attention(*x, pattern, bounds, **layout), q, k, v, d_out
    )
    oracle = outputs_and_gradients(
        lambda *x: reference_attention(*x, pattern, bounds, **layout)[0], q, k, v, d_out
    )
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), mine, oracle, strict=True):
        assert not got.isnan().any(), name
        error = (got - wanted).norm() / wanted.norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_cpu_matches_reference(name, documents, heads, kv_heads):
    assert_matches_reference(
        PATTERNS[name], DOCUMENTS[documents], heads, kv_heads, 16, tolerance=2e-6
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("documents", [[1111], [700, 1, 1347]])
@pytest.mark.parametrize("name", PATTERNS)
def test_gpu_matches_reference(name, documents):
    # head_dim 64 in bfloat16: operands rounded to 8 bits.
    assert_matches_reference(
        PATTERNS[name], documents, 9, 3, 64, tolerance=1e-2, dtype=torch.bfloat16, device="cuda"
    )


@pytest.mark.parametrize("field", ["sink_tokens", "window", "stride", "phase"])
def test_off_by_one_in_the_kernels_pattern_is_caught(monkeypatch, field):
    pattern = PATTERNS["per_head"]
    if field == "phase":
        honest = Pattern.phase_of
        wrong, planted = pattern, lambda self, h, g: (honest(self, h, g) + 1) % self.stride
    else:
        wrong = Pattern(**{**pattern.__dict__, field: getattr(pattern, field) + 1})
    tiles = kernels.tiled._tiles

    def planted_tiles(_, *args):
        with pytest.MonkeyPatch.context() as patch:
            if field == "phase":
                patch.setattr(Pattern, "phase_of", planted)
            found = list(tiles(wrong, *args))
        return iter(found)

    monkeypatch.setattr(kernels.tiled, "_tiles", planted_tiles)
    with pytest.raises(AssertionError):
        assert_matches_reference(pattern, [331], 4, 2, 16, tolerance=2e-6)


def test_every_output_is_written(monkeypatch):
    """Output buffers start poisoned; a row that is not written stays NaN."""
    poison = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(*a, **k).fill_(float("nan")))
    assert_matches_reference(PATTERNS["strided"], [200, 131], 4, 2, 16, tolerance=2e-6)


def test_a_token_reaches_only_its_document_and_pattern():
    pattern = PATTERNS["sinks_window"]
    q, k, v, _, bounds = inputs([100, 100], 2, 1, 8)
    before = sparse_attention(q, k, v, pattern, bounds)
    v[50] += 1
    moved = (sparse_attention(q, k, v, pattern, bounds) - before).abs().amax((1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(50, 50 + pattern.window))


def test_window_of_one_sees_itself_only():
    q, k, v, _, bounds = inputs([40, 3], 2, 2, 8)
    assert torch.allclose(sparse_attention(q, k, v, Pattern(0, 1), bounds), v)


def test_refusals():
    q, k, v, _, bounds = inputs([10], 4, 2, 8)
    with pytest.raises(ValueError, match=r"q \(10, 4, 8\).*multiple of G"):
        sparse_attention(q, k[:, :1].expand(10, 3, 8), v, Pattern(), bounds)
    for wrong in ([0, 9], [1, 10], [0], [0, 7, 3, 10]):
        with pytest.raises(ValueError, match="must ascend from 0 to the 10 tokens"):
            sparse_attention(q, k, v, Pattern(), torch.tensor(wrong, dtype=torch.int32))


def test_the_folder_counts_as_absent_for_transformers():
    """The PyPI package `kernels` is probed by transformers; ours must not be taken for it."""
    code = (
        "import kernels, sys; assert not hasattr(kernels, '__version__');"
        "assert 'torch' not in sys.modules;"
        "from transformers.utils.import_utils import is_kernels_available as f;"
        "print(bool(f()))"
    )
    root = importlib.util.find_spec("kernels").submodule_search_locations[0] + "/.."
    got = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert got.stdout.strip() == "False", got.stderr

"""Tiled PyTorch and the choice between backends, against the oracle."""

import importlib.util
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import kernels.sparse_attention
import kernels.tiled
from kernels.pattern import Pattern
from kernels.sparse_attention import attention_gradients, sparse_attention
from tests.closeness import assert_close_by_norm
from tests.kernels.cases import PATTERNS, assert_matches_reference, make_inputs

PATTERNS = {"full": Pattern.full(), **PATTERNS}
# Lengths, query heads and KV heads.
CALLS = {
    "one": ([331], 4, 4),
    "many": ([1, 130, 7, 255], 6, 2),
    "empty_between": ([60, 0, 61], 6, 2),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", PATTERNS)
def test_cpu_matches_reference(name, call):
    assert_matches_reference(PATTERNS[name], *CALLS[call], 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cpu_matches_reference_in_half_precision(dtype):
    assert_matches_reference(PATTERNS["per_head"], [200, 31], 4, 2, 16, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "tiled"])
@pytest.mark.parametrize("documents", [[1111], [700, 1, 1347]], ids=str)
@pytest.mark.parametrize("name", ["sinks_window", "per_head"])
def test_gpu_matches_reference(name, documents, backend):
    case = {"dtype": torch.bfloat16, "device": "cuda", "backend": backend}
    assert_matches_reference(PATTERNS[name], documents, 9, 3, 64, **case)


def test_the_backend_that_ran_is_said_once(caplog):
    q, k, v, *_, bounds = make_inputs([10], 2, 1, 8)
    kernels.sparse_attention._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "longgen.kernels"):
        for _ in range(2):
            sparse_attention(q, k, v, Pattern(), bounds)
    assert [record.message for record in caplog.records] == ["sparse layers on cpu run by tiled"]


def test_the_first_backend_that_supports_a_call_runs_it(monkeypatch, caplog):
    """A faster one that supports some calls only is skipped for others; the log says why."""
    made, said = kernels.sparse_attention.BACKENDS["tiled"](), []

    def refuses(q, call):
        said.append(call)
        return None if call.pattern.window > 9 else "windows above 9 only"

    table = kernels.sparse_attention
    picky = table.Backend(refuses, lambda *a: (a[0] * 0, a[0].new_zeros(2, 10)), made.backward)
    monkeypatch.setitem(table.BACKENDS, "picky", lambda: picky)
    monkeypatch.setitem(table.FASTEST, "cpu", ("picky",))
    table._log_once.cache_clear()
    q, k, v, *_, bounds = make_inputs([10], 2, 1, 8)
    with caplog.at_level(logging.INFO, "longgen.kernels"):
        assert not sparse_attention(q, k, v, Pattern(window=10), bounds).any()
        assert sparse_attention(q, k, v, Pattern(window=9), bounds).any()
        assert sparse_attention(q, k, v, Pattern(window=9), bounds).any()
    assert caplog.messages == [
        "sparse layers on cpu run by picky",
        "sparse layers on cpu run by tiled (picky: windows above 9 only)",
    ]
    assert [(c.bounds, c.first_kv_head, c.total_kv_heads, c.scale) for c in said] == [
        ((0, 10), 0, 1, 8**-0.5)
    ] * 3
    with pytest.raises(ValueError, match="backend='picky': windows above 9 only; pass backend"):
        sparse_attention(q, k, v, Pattern(window=9), bounds, backend="picky")


@pytest.mark.parametrize("field", ["sink_tokens", "window", "stride", "phase"])
def test_off_by_one_in_the_kernels_pattern_is_caught(monkeypatch, field):
    pattern = PATTERNS["per_head"]
    if field == "phase":
        honest = Pattern.phase_of
        wrong, planted = pattern, lambda self, h, g: (honest(self, h, g) + 1) % self.stride
    else:
        wrong = Pattern(**{**pattern.__dict__, field: getattr(pattern, field) + 1})
    tiles = kernels.tiled._tiles

    def planted_tiles(call, kv_heads):
        with pytest.MonkeyPatch.context() as patch:
            if field == "phase":
                patch.setattr(Pattern, "phase_of", planted)
            found = list(tiles(replace(call, pattern=wrong), kv_heads))
        return iter(found)

    monkeypatch.setattr(kernels.tiled, "_tiles", planted_tiles)
    with pytest.raises(AssertionError):
        assert_matches_reference(pattern, [331], 4, 2, 16)


def test_every_output_is_written(monkeypatch):
    """Output buffers start poisoned; a row that is not written stays NaN."""
    honest = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: honest(*a, **k).fill_(float("nan"))
    )
    assert_matches_reference(PATTERNS["strided"], [200, 131], 4, 2, 16)


def test_a_token_reaches_only_its_document_and_pattern():
    pattern = PATTERNS["sinks_window"]
    q, k, v, *_, bounds = make_inputs([100, 100], 2, 1, 8)
    before = sparse_attention(q, k, v, pattern, bounds)
    v[50] += 1
    moved = (sparse_attention(q, k, v, pattern, bounds) - before).abs().amax((1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(50, 50 + pattern.window))


def test_window_of_one_sees_itself_only():
    q, k, v, *_, bounds = make_inputs([40, 3], 2, 2, 8)
    assert_close_by_norm(sparse_attention(q, k, v, Pattern(0, 1), bounds), v, 1e-6)


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


@pytest.mark.parametrize("name", ["per_head", "full"])
def test_gradients_from_what_was_kept(name):
    """They equal those that autograd gives, with a shard's place and a scale of one's own."""
    pattern = Pattern.full() if name == "full" else PATTERNS[name]
    q, k, v, d_out, _, bounds = make_inputs([50, 1, 40], 4, 2, 16)
    options = {"first_kv_head": 2, "total_kv_heads": 4, "softmax_scale": 0.3}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*leaves, pattern, bounds, return_lse=True, **options)
    wanted = torch.autograd.grad(out, leaves, d_out)
    kept = (q, k, v, out.detach(), lse.detach())
    found = attention_gradients(d_out, *kept, pattern, bounds, **options)
    for got, want in zip(found, wanted, strict=True):
        assert_close_by_norm(got, want, 2e-6)

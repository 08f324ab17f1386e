"""The operators as torch.compile, checkpoint policies and a second copy of the file see them."""

import importlib
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import kernels.tiled
from kernels.pattern import Pattern
from kernels.sparse_attention import (
    SPARSE_ATTENTION_BWD,
    SPARSE_ATTENTION_FWD,
    sparse_attention,
)
from tests.closeness import assert_close_by_norm
from tests.kernels.cases import DEVICE, PATTERNS, TOLERANCE, make_inputs

PATTERN = PATTERNS["per_head"]


def inputs(lengths=(30, 9)):
    return make_inputs(list(lengths), 4, 2, 64, device=DEVICE)


@pytest.mark.parametrize("stride", [4, None])
def test_opcheck(stride):
    q, k, v, d_out, d_lse, bounds = inputs()
    call = (bounds, 3, 19, 8, stride, "per_head", 0, 2, 0.125, None)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(SPARSE_ATTENTION_FWD, (*leaves, *call))
    out, lse = SPARSE_ATTENTION_FWD(q, k, v, *call)
    saved = (q, k, v, out, lse, d_out)
    torch.library.opcheck(SPARSE_ATTENTION_BWD, (*saved, d_lse, *call))
    torch.library.opcheck(SPARSE_ATTENTION_BWD, (*saved, None, *call))


def test_compiled_whole_it_gives_the_same():
    def block(q, k, v, bounds):
        out, lse = sparse_attention(q * 2, k, v, PATTERN, bounds, return_lse=True)
        return out.sin(), lse + 1

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((30, 9), (25, 1, 17)):
        q, k, v, d_out, d_lse, bounds = inputs(lengths)
        results = []
        for run in (block, compiled):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            found = run(*leaves, bounds)
            torch.autograd.backward(found, [d_out, d_lse])
            results.append([*found, *(x.grad for x in leaves)])
        for eager, whole in zip(*results, strict=True):
            assert_close_by_norm(whole, eager, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("policy", "runs"), [("save", 1), ("recompute", 2)])
def test_a_checkpoint_policy_keeps_the_output(monkeypatch, policy, runs):
    count = []
    honest = kernels.tiled.forward
    monkeypatch.setattr(kernels.tiled, "forward", lambda *a: count.append(1) or honest(*a))
    q, k, v, d_out, _, bounds = inputs()

    def choose(context, operator, *args, **kwargs):
        ours = operator == torch.ops.longgen.sparse_attention_fwd.default
        keep = ours and policy == "save"
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return sparse_attention(q.sin(), k, v, PATTERN, bounds, backend="tiled")

    results = []
    contexts = partial(create_selective_checkpoint_contexts, choose)
    for run in (partial(checkpoint, block, use_reentrant=False, context_fn=contexts), block):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        run(*leaves).backward(d_out)
        results.append([x.grad for x in leaves])
    assert len(count) == runs + 1
    for kept, plain in zip(*results, strict=True):
        assert torch.equal(kept, plain)


def test_little_is_saved_for_backward():
    q, k, v, _, _, bounds = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = sparse_attention(
            q.requires_grad_(), k, v, PATTERN, bounds, return_lse=True, backend="tiled"
        )
    kept = {(tuple(x.shape), x.data_ptr()) for x in saved}
    assert kept == {(tuple(x.shape), x.data_ptr()) for x in (q, k, v, out, lse, bounds)}


def test_a_copy_of_the_files_keeps_its_own_operators(tmp_path, monkeypatch):
    """As when an exported folder is loaded in a process that also trains; it needs no Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    source = Path(kernels.tiled.__file__).parent
    shutil.copytree(source, tmp_path / "exported_copy")
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("exported_copy.sparse_attention")
    assert copy.SPARSE_ATTENTION_FWD._qualname != SPARSE_ATTENTION_FWD._qualname
    assert SPARSE_ATTENTION_FWD._qualname == "longgen::sparse_attention_fwd"
    q, k, v, d_out, _, bounds = inputs()
    pattern = sys.modules["exported_copy.pattern"].Pattern(**vars(PATTERN))
    results = []
    for attend, given in ((copy.sparse_attention, pattern), (sparse_attention, PATTERN)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(*leaves, given, bounds).backward(d_out)
        results.append([x.grad for x in leaves])
    for found, wanted in zip(*results, strict=True):
        assert_close_by_norm(found, wanted, 2 * TOLERANCE[torch.float32])


def test_a_second_derivative_is_refused():
    q, k, v, _, _, bounds = inputs()
    out = sparse_attention(q.requires_grad_(), k, v, Pattern(), bounds)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="sparse_attention_bwd"):
        dq.sum().backward()

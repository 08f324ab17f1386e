"""Attention over disjoint sets of keys, merged, is attention over all of them."""

import pytest
import torch

from kernels.merge import merge_partials
from kernels.pattern import Pattern
from kernels.reference import reference_attention
from kernels.sparse_attention import sparse_attention
from tests.closeness import assert_close_by_norm
from tests.kernels.cases import DEVICE, TOLERANCE, make_inputs, outputs_and_gradients

PATTERN = Pattern(sink_tokens=4, window=9, block=4, stride=3)


def over_some_keys(q_TNH, k_TGH, v_TGH, seen):
    """(out, lse) by the definition, where `seen` [T, T] says which keys count; NaN without any."""
    scores = torch.einsum("tnh,sh->nts", q_TNH, k_TGH[:, 0]) * q_TNH.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("nts,sh->tnh", scores.softmax(-1), v_TGH[:, 0]), scores.logsumexp(-1)


@pytest.mark.parametrize("cuts", [[20], [7, 8, 30], [40]])
def test_parts_of_the_keys_give_the_whole(cuts):
    q, k, v, d_out, d_lse, bounds = make_inputs([40], 2, 1, 16)
    index = torch.arange(40)
    visible = PATTERN.visible(index[:, None], index[None])

    def merged(q, k, v):
        parts = []
        for start, stop in zip([0, *cuts], [*cuts, 40], strict=True):
            seen = visible & (index >= start) & (index < stop)
            some = seen.any(-1)
            # Without gradients where there is no key: those of such a softmax are NaN.
            out, lse = over_some_keys(q, k, v, seen | ~some[:, None])
            out = torch.where(some[:, None, None], out, float("nan"))
            parts.append((out, torch.where(some, lse, float("-inf"))))
        return merge_partials(*zip(*parts, strict=True))

    got = outputs_and_gradients(merged, q, k, v, d_out, d_lse)
    wanted = outputs_and_gradients(
        lambda *x: reference_attention(*x, PATTERN, bounds), q, k, v, d_out, d_lse
    )
    for mine, right in zip(got, wanted, strict=True):
        assert_close_by_norm(mine, right, 2e-6)


def test_sinks_apart_from_the_window():
    """The kernels' own LSE, merged with plain attention to the sink tokens; gradients too."""
    q, k, v, d_out, d_lse, bounds = make_inputs([40], 2, 1, 64, device=DEVICE)
    index = torch.arange(40, device=DEVICE)
    far_sinks = (index < 4) & (index[:, None] - index >= 9)

    def merged(q, k, v):
        near = sparse_attention(q, k, v, Pattern(0, 9), bounds, return_lse=True)
        some = far_sinks.any(-1)
        out, lse = over_some_keys(q, k, v, far_sinks | ~some[:, None])
        lse = torch.where(some, lse, float("-inf"))
        return merge_partials([near[0], out], [near[1], lse])

    got = outputs_and_gradients(merged, q, k, v, d_out, d_lse)
    wanted = outputs_and_gradients(
        lambda *x: reference_attention(*x, Pattern(4, 9), bounds), q, k, v, d_out, d_lse
    )
    for mine, right in zip(got, wanted, strict=True):
        assert_close_by_norm(mine, right, TOLERANCE[torch.float32])


def test_queries_without_any_key():
    outs = [torch.full((3, 2, 4), float("nan"), requires_grad=True) for _ in range(2)]
    lses = [torch.full((2, 3), float("-inf"), requires_grad=True) for _ in range(2)]
    out, lse = merge_partials(outs, lses)
    assert (out == 0).all() and (lse == float("-inf")).all()
    (out.sum() + lse.where(lse > -1, 0).sum()).backward()
    assert not any(x.grad.isnan().any() for x in (*outs, *lses))


def test_the_dtype_stays_and_large_scores_do_not_overflow():
    outs = [torch.randn(3, 2, 4).bfloat16() for _ in range(2)]
    out, lse = merge_partials(outs, [torch.full((2, 3), 3e4), torch.full((2, 3), -3e4)])
    assert out.dtype == torch.bfloat16 and torch.equal(out, outs[0])
    assert torch.equal(lse, torch.full((2, 3), 3e4))


@pytest.mark.parametrize(
    ("outs", "lses"),
    [([], []), ([(3, 2, 4)], []), ([(3, 2, 4)], [(3, 2)]), ([(3, 2, 4), (4, 2, 4)], [(2, 3)] * 2)],
)
def test_refusals(outs, lses):
    with pytest.raises(ValueError, match=r"must be as many \[T, N, H\] as \[N, T\].*return_lse"):
        merge_partials([torch.ones(shape) for shape in outs], [torch.ones(s) for s in lses])

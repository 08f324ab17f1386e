"""dK and dV of the window alone, completed by add_far_keys, equal the whole pattern's."""

import pytest
import torch

from kernels.call import Call
from kernels.far_keys import add_far_keys
from kernels.pattern import Pattern
from kernels.reference import reference_attention
from kernels.triton_attention import backward_arguments, far_key_parts, row_delta
from tests.closeness import relative_error

from .cases import DEVICE, make_inputs, small_tiles

TOLERANCE = 2e-6 if DEVICE == "cpu" else 2e-5
PATTERNS = {
    "sinks": Pattern(sink_tokens=5, window=37, block=16),
    "none": Pattern(sink_tokens=0, window=40, block=16),
    "strided": Pattern(sink_tokens=3, window=33, block=8, stride=4),
    "per_head": Pattern(sink_tokens=3, window=35, block=8, stride=4, phase="per_head"),
    "aligned": Pattern(sink_tokens=32, window=32, block=32, stride=2),
    "aligned_per_head": Pattern(sink_tokens=0, window=40, block=32, stride=2, phase="per_head"),
}


def near_gradients(q, k, v, d_out, lse, delta, call):
    """dK and dV of the pairs whose distance is less than the window."""
    ratio = q.shape[1] // k.shape[1]
    index = torch.arange(q.shape[0], device=q.device)
    bounds = torch.tensor(call.bounds[1:], device=q.device)
    document = torch.searchsorted(bounds, index, right=True)
    distance = index[:, None] - index[None, :]
    near = (document[:, None] == document[None, :]) & (distance >= 0)
    near &= distance < call.pattern.window
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for head in range(q.shape[1]):
        group = head // ratio
        scores = q[:, head] @ k[:, group].T * call.scale
        p = (scores - lse[head][:, None]).exp().masked_fill(~near, 0)
        ds = p * (d_out[:, head] @ v[:, group].T - delta[head][:, None])
        dk[:, group] += ds.T @ q[:, head] * call.scale
        dv[:, group] += p.T @ d_out[:, head]
    return dk, dv


def errors(pattern, lengths, heads=2, kv_heads=1, head_dim=16, monkeypatch=None, told=None):
    """Relative errors of dk and dv; `told` is the pattern that the kernels are told."""
    small_tiles(monkeypatch)
    q, k, v, d_out, _, bounds = make_inputs(lengths, heads, kv_heads, head_dim, device=DEVICE)
    place = {"first_kv_head": 1, "total_kv_heads": kv_heads + 2}
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = reference_attention(*inputs, pattern, bounds, **place)
    out.backward(d_out)
    out, lse = out.detach().contiguous(), lse.detach().contiguous()
    call = Call(pattern, tuple(bounds.tolist()), 1, kv_heads + 2, head_dim**-0.5)
    delta = row_delta(out, d_out, None)
    dk, dv = near_gradients(q, k, v, d_out, lse, delta, call)
    call = Call(told or pattern, *(getattr(call, f) for f in list(call.__dict__)[1:]))
    common = backward_arguments(q, k, v, d_out, lse, delta, call)
    far, tiles, tile_k = far_key_parts(common, call)
    if tiles:
        add_far_keys(dk, dv, far, tiles, tile_k, call)
    wanted = [x.grad for x in inputs[1:]]
    return [relative_error(a, b) for a, b in zip((dk, dv), wanted, strict=True)]


@pytest.mark.parametrize("name", PATTERNS)
def test_window_and_far_keys_make_the_whole(monkeypatch, name):
    found = errors(PATTERNS[name], [1, 75, 7, 20], monkeypatch=monkeypatch)
    assert max(found) <= TOLERANCE, found


@pytest.mark.parametrize(
    "change", [{"window": 36}, {"sink_tokens": 4}, {"stride": 5}, {"phase": "shared"}]
)
def test_off_by_one_is_caught(monkeypatch, change):
    pattern = PATTERNS["per_head"]
    told = Pattern(**{**pattern.__dict__, **change})
    found = errors(pattern, [90], monkeypatch=monkeypatch, told=told)
    assert max(found) > 100 * TOLERANCE, found

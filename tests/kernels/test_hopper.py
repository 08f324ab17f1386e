"""The Gluon kernels: held against the oracle on a Hopper GPU, compiled for one everywhere."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import hopper
from kernels.call import Call
from kernels.pattern import Pattern
from kernels.sparse_attention import sparse_attention

from .cases import assert_matches_reference, make_inputs

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
PATTERNS = {
    "sinks": Pattern(64, 256, 64),
    "no_sinks": Pattern(0, 128, 64),
    "strided": Pattern(64, 192, 64, 4),
    "per_head": Pattern(64, 200, 64, 4, "per_head"),
    "wide_blocks": Pattern(128, 131, 128, 3, "per_head"),
}
KERNELS = ("fwd", "bwd_window", "bwd_far_dkv", "bwd_far_dq")
DOCUMENTS = {
    "one": [1111],
    "many": [700, 1, 1347],
    "short": [64, 1, 130, 3, 259],
    "tiny": [5],
}


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 6, 128), (9, 3, 64), (8, 1, 128)])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", PATTERNS)
def test_matches_reference(name, documents, heads, kv_heads, head_dim, dtype):
    assert_matches_reference(
        PATTERNS[name],
        DOCUMENTS[documents],
        heads,
        kv_heads,
        head_dim,
        dtype=dtype,
        device="cuda",
        backend="hopper",
    )


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", ["sinks", "per_head"])
def test_the_same_bits_every_time(name):
    q, k, v, d_out, _, bounds = make_inputs(
        [20_000, 3_000], 8, 2, 128, dtype=torch.bfloat16, device="cuda"
    )
    seen = []
    for _ in range(4):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = sparse_attention(*inputs, PATTERNS[name], bounds, backend="hopper")
        out.backward(d_out)
        seen.append([out.detach(), *(x.grad for x in inputs)])
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], again, strict=True))


@pytest.mark.gpu
@on_hopper
def test_views_are_read_as_they_lie():
    qkv = torch.randn(700, 3, 4, 128, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, 700], dtype=torch.int32)
    views = qkv.unbind(1)
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    whole = [x.contiguous() for x in views]
    wanted, *got = (
        sparse_attention(*inputs, PATTERNS["sinks"], bounds, backend="hopper")
        for inputs in (whole, views, odd)
    )
    assert all(torch.equal(x, wanted) for x in got)


def refusal(monkeypatch, pattern, head_dim=128, dtype=torch.bfloat16, capability=(9, 0)):
    class OnGPU:
        device = torch.device("cuda", 0)
        shape = (300, 4, head_dim)

    OnGPU.dtype = dtype
    monkeypatch.setattr(hopper, "cuda_capability", lambda device: capability)
    monkeypatch.setattr(hopper, "triton_failure", lambda device, dtype: None)
    return hopper.supports(OnGPU, Call(pattern, (0, 300), 0, 4, 0.1))


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_supported(monkeypatch, name):
    assert refusal(monkeypatch, PATTERNS[name]) is None


@pytest.mark.parametrize(
    ("pattern", "changes", "says"),
    [
        (Pattern(64, 256), {"capability": (8, 0)}, "not a Hopper GPU"),
        (Pattern(64, 256), {"capability": (10, 0)}, "not a Hopper GPU"),
        (Pattern(64, 256), {"head_dim": 96}, "head dim 96"),
        (Pattern(64, 256), {"dtype": torch.float32}, "torch.float32"),
        (Pattern(64, 127), {}, "window=127"),
        (Pattern(60, 256), {}, "sink_tokens=60"),
        (Pattern(2**31, 256), {}, "sink_tokens=2147483648"),
        (Pattern(64, 256, 32, 4), {}, "block=32"),
        (Pattern(64, 256, 128, 4), {}, "block=128"),
        (Pattern(64, 256, 64, 2**25), {}, "stride=33554432"),
    ],
)
def test_what_is_unsupported_says_why(monkeypatch, pattern, changes, says):
    reason = refusal(monkeypatch, pattern, **changes)
    assert says in reason


class Launched:
    """In a kernel's place: holds what it is launched with against the kernel's parameters."""

    def __init__(self, kernel):
        self.names, self.launches = set(kernel.arg_names), []

    def __getitem__(self, grid):
        def launch(num_warps, **arguments):
            assert set(arguments) == self.names
            self.launches.append((grid, arguments))

        return launch


def test_launches_with_the_kernels_parameters(monkeypatch):
    kernels = {}
    for name in (f"hopper_{name}_kernel" for name in KERNELS):
        kernels[name] = Launched(getattr(hopper, name))
        monkeypatch.setattr(hopper, name, kernels[name])
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 3)
    monkeypatch.setattr(hopper, "row_delta", lambda out, d_out, d_lse: lse)
    added = []
    monkeypatch.setattr(hopper, "add_far_keys", lambda *arguments: added.append(arguments))
    q, k, v, d_out, d_lse, bounds = make_inputs([530, 20], 4, 2, 64, torch.bfloat16)
    call = Call(PATTERNS["per_head"], tuple(bounds.tolist()), 1, 5, 0.125)
    out, lse = hopper.forward(q, k, v, call)
    dq, dk, dv = hopper.backward(q, k, v, out.zero_(), lse.zero_(), d_out, None, call)
    assert [x.shape for x in (out, dq, dk, dv)] == [q.shape, q.shape, k.shape, v.shape]
    (forward,), (window,), (far_dkv,), (far_dq,) = (k.launches for k in kernels.values())
    assert forward[0] == window[0] == far_dq[0] == (3,)
    assert (forward[1]["row_tiles"], forward[1]["items"], forward[1]["ratio"]) == (5, 20, 2)
    assert forward[1]["PATTERN"] == (64, 200, 64, 4, True)
    assert (window[1]["key_tiles"], window[1]["items"]) == (5, 10)
    starts = window[1]["lowest_ptr"].tolist()
    assert starts == [max(0, i - 199) for i in range(530)] + [530] * 20
    assert window[1]["turn_ptr"].shape == (40,) and not window[1]["turn_ptr"].any()
    assert window[1]["ticket_ptr"].tolist() == [0] * 41
    # Special keys of the first document: at most 64 + (530 // 256 + 1) * 64, two tiles of 128.
    assert far_dkv[0] == (2, 2, 2) and far_dkv[1]["slot_tiles"].tolist() == [0, 2, 2]
    assert far_dkv[1]["partial_ptr"].shape == (2, 2, 256, 2, 64)
    ((_, _, far, tiles, tile_k, _),) = added
    assert far["slot_tiles"].tolist() == [0, 4, 4] and (tiles, tile_k) == (4, 64)
    assert (far_dq[1]["row_tiles"], far_dq[1]["items"]) == (5, 20)


def test_compiles_for_hopper():
    # In a process of its own: here, without a GPU, Triton may be set to interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper_ptx"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == [f"hopper_{name}_kernel" for name in KERNELS]


def test_short_walks_take_more_heads_at_once():
    def at_once(bounds, ratio=1):
        return hopper._heads_at_once(Call(PATTERNS["sinks"], bounds, 0, 8, 0.1), ratio, 132)

    one, many = (0, 65_536), tuple(range(0, 65_537, 128))
    assert 1 < at_once(one) < at_once(many)
    assert at_once(one, ratio=8) < at_once(one)
    assert at_once((0, 2**20), ratio=64) == 1

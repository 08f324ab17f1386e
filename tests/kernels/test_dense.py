"""Full layers: every backend present against the float32 oracle, and the choice between them."""

import itertools
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

import kernels.dense as dense
from kernels.dense import (
    BACKENDS,
    choose,
    dense_attention,
    dense_attention_gradients,
    dense_continuation,
)
from kernels.pattern import Pattern
from kernels.reference import reference_attention
from tests.closeness import assert_close_by_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = [backend.name for backend in BACKENDS]
DOCUMENTS = {"one": [331], "many": [1, 130, 64, 200], "empty_between": [60, 0, 61]}
# Of bfloat16 operands and results, and of float32's own rounding.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-6}


def on_gpu_only(name):
    needs_gpu = dense.BY_NAME[name].majors is not None
    return pytest.param(name, marks=pytest.mark.gpu) if needs_gpu else name


def inputs(lengths, heads, kv_heads, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, d_out = (
        torch.randn(sum(lengths), n, head_dim, generator=generator).to(DEVICE, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    return q, k, v, d_out, [0, *itertools.accumulate(lengths)]


def results(attend, q, k, v, d_out):
    """out, the three gradients and LSE, in float32."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v)
    # Through both; the sine is just some gradient of LSE.
    ((out.float() * d_out.float()).sum() + lse.float().sin().sum()).backward()
    return [x.detach().float() for x in (out, q.grad, k.grad, v.grad, lse)]


def oracle(q, k, v, bounds, **kwargs):
    full, bounds = Pattern.full(), torch.tensor(bounds)
    return reference_attention(q.float(), k.float(), v.float(), full, bounds, **kwargs)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 128)])
@pytest.mark.parametrize("name", [on_gpu_only(name) for name in NAMES])
def test_matches_reference(name, heads, kv_heads, head_dim, documents):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    reason = dense.BY_NAME[name].unmet(torch.device(DEVICE), dtype, head_dim)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    *x, bounds = inputs(DOCUMENTS[documents], heads, kv_heads, head_dim, dtype)
    scale = 0.7 * head_dim**-0.5
    mine = results(
        lambda q, k, v: dense_attention(
            q, k, v, bounds, softmax_scale=scale, return_lse=True, backend=name
        ),
        *x,
    )
    wanted = results(lambda q, k, v: oracle(q, k, v, bounds, softmax_scale=scale), *x)
    for part, got, want in zip(("out", "dq", "dk", "dv", "lse"), mine, wanted, strict=True):
        assert_close_by_norm(got, want, TOLERANCE[dtype], part)


@pytest.mark.parametrize("new", [1, 70, 331])
@pytest.mark.parametrize("name", [on_gpu_only(name) for name in NAMES])
def test_last_tokens_continue_a_document(name, new, monkeypatch):
    """Keys and values lie as a cache holds them: heads outside tokens, more slots than tokens."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    reason = dense.BY_NAME[name].unmet(torch.device(DEVICE), dtype, 64)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    monkeypatch.setattr("kernels.dense_backends.MASK_ENTRIES", 331 * 30)
    q, k, v, _, bounds = inputs([331], 6, 2, 64, dtype)
    wanted = oracle(q, k, v, bounds, softmax_scale=0.1)[0][-new:]
    slots = torch.full((2, 2, 400, 64), float("nan"), dtype=dtype, device=DEVICE)
    slots[:, :, :331] = torch.stack((k, v)).transpose(1, 2)
    k, v = slots[:, :, :331].transpose(1, 2)
    found = dense_continuation(q[-new:], k, v, softmax_scale=0.1, backend=name)
    assert_close_by_norm(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", [on_gpu_only(name) for name in NAMES])
def test_gradients_from_what_was_kept(name, documents):
    """They equal those that autograd gives."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    reason = dense.BY_NAME[name].unmet(torch.device(DEVICE), dtype, 64)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    q, k, v, d_out, bounds = inputs(DOCUMENTS[documents], 6, 2, 64, dtype)
    options = {"softmax_scale": 0.1, "backend": name}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*leaves, bounds, return_lse=True, **options)
    wanted = torch.autograd.grad(out, leaves, d_out)
    kept = (q, k, v, out.detach(), lse.detach())
    for got, want in zip(
        dense_attention_gradients(d_out, *kept, bounds, **options), wanted, strict=True
    ):
        assert_close_by_norm(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("name", [on_gpu_only(name) for name in NAMES])
def test_views_of_a_larger_tensor_are_read_as_they_lie(name):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    reason = dense.BY_NAME[name].unmet(torch.device(DEVICE), dtype, 64)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    q, k, v, _, bounds = inputs([90, 40], 4, 2, 64, dtype)
    wide = torch.cat([q, k, v], dim=1)
    views = wide[:, :4], wide[:, 4:6], wide[:, 6:]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    plain = dense_attention(q, k, v, bounds, backend=name)
    for others in (views, apart):
        found = dense_attention(*others, bounds, backend=name)
        assert_close_by_norm(found, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("name", [on_gpu_only(name) for name in NAMES])
def test_gradients_through_lse_alone(name):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    reason = dense.BY_NAME[name].unmet(torch.device(DEVICE), dtype, 64)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    q, k, v, _, bounds = inputs([70, 30], 4, 2, 64, dtype)
    gradients = []
    for attend in (
        lambda q, k: dense_attention(q, k, v, bounds, return_lse=True, backend=name),
        lambda q, k: oracle(q, k, v, bounds),
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        lse = attend(*leaves)[1]
        assert lse.dtype == torch.float32
        gradients.append([x.float() for x in torch.autograd.grad(lse.sin().sum(), leaves)])
    for got, want in zip(*gradients, strict=True):
        assert_close_by_norm(got, want, TOLERANCE[dtype])


@pytest.fixture
def machine(monkeypatch):
    """Pretend a GPU of this capability, with these modules importable."""

    def pretend(capability, modules=()):
        monkeypatch.setattr(
            dense, "cuda_capability", lambda device: capability if device.type == "cuda" else None
        )
        monkeypatch.setattr(
            dense, "_import_error", lambda name: None if name in modules else f"needs {name}"
        )

    return pretend


FA4, FA3, FA2 = (dense.BY_NAME[f"flash_attn_{version}"].module for version in (4, 3, 2))
ALL = (FA4, FA3, FA2)


@pytest.mark.parametrize(
    ("capability", "modules", "dtype", "head_dim", "documents", "wanted"),
    [
        ((9, 0), ALL, torch.bfloat16, 128, 1, "flash_attn_4"),
        ((9, 0), ALL, torch.bfloat16, 256, 9, "flash_attn_3"),
        ((9, 0), (FA3, FA2), torch.float16, 128, 9, "flash_attn_3"),
        # A plan for each new length: cuDNN for rows of one length, not for packed ones.
        ((9, 0), (FA2,), torch.bfloat16, 128, 1, "cudnn"),
        ((9, 0), (FA2,), torch.bfloat16, 128, 2, "flash_attn_2"),
        ((9, 0), (), torch.bfloat16, 128, 2, "torch_flash"),
        ((10, 0), ALL, torch.bfloat16, 64, 1, "flash_attn_4"),
        ((8, 0), ALL, torch.bfloat16, 128, 1, "flash_attn_2"),
        ((8, 0), (FA4,), torch.bfloat16, 96, 3, "torch_flash"),
        ((7, 0), ALL, torch.float16, 128, 1, "torch_sdpa"),
        ((9, 0), ALL, torch.float32, 128, 5, "torch_sdpa"),
        ((9, 0), ALL, torch.bfloat16, 12, 1, "torch_sdpa"),
        (None, ALL, torch.bfloat16, 128, 1, "torch_sdpa"),
    ],
)
def test_the_first_that_fits_is_chosen(
    machine, capability, modules, dtype, head_dim, documents, wanted
):
    machine(capability, modules)
    chosen, passed = choose(CUDA, dtype, head_dim, documents)
    assert chosen.name == wanted
    assert set(passed) >= set(NAMES[: NAMES.index(wanted)]) and all(passed.values())


def test_none_is_offered_where_its_needs_are_unmet(machine):
    """Against a second telling of who needs what."""
    capabilities = [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    sets = [(), (FA4,), (FA3,), (FA2,), ALL]
    for capability, modules in itertools.product(capabilities, sets):
        machine(capability, modules)
        major = capability[0] if capability else 0
        for dtype, dims, device in itertools.product(dtypes, (64, 100, 128, 192), (CPU, CUDA)):
            half = dtype.itemsize == 2 and dims % 8 == 0 and device == CUDA
            legal = {
                "flash_attn_4": half and FA4 in modules and major in (9, 10) and dims <= 128,
                "flash_attn_3": half and FA3 in modules and major == 9,
                "cudnn": half and major in (9, 10) and dims <= 128,
                "flash_attn_2": half and FA2 in modules and major >= 8,
                "torch_flash": half and major >= 8,
                "torch_sdpa": True,
            }
            for backend in BACKENDS:
                served = backend.unmet(device, dtype, dims) is None
                assert served == legal[backend.name], (backend.name, capability, dtype, dims)


def test_determinism_takes_a_deterministic_backend(machine):
    machine((9, 0))
    torch.use_deterministic_algorithms(True)
    try:
        chosen, passed = choose(CUDA, torch.bfloat16, 128)
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen.name == "torch_flash" and "not deterministic" in passed["cudnn"]


def test_flash_attn_4_alone_does_not_pass_for_flash_attn_2(tmp_path, monkeypatch):
    folder = tmp_path / "flash_attn/cute"
    folder.mkdir(parents=True)
    for name in ("__init__", "interface"):
        (folder / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    importing = dense._import_error.__wrapped__
    assert importing(FA4) is None
    assert FA2 in importing(FA2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)


def test_which_backend_ran_is_said_once(caplog):
    q, k, v, _, bounds = inputs([8, 8], 2, 2, 8, torch.float32)
    dense._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "longgen.kernels"):
        dense_attention(q, k, v, bounds)
        dense_attention(q, k, v, bounds)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"full layers on {DEVICE} run by torch_sdpa")


def test_refusals(machine):
    q, k, v, _, bounds = inputs([10], 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=r"backend='flash': must be one of flash_attn_4, .*None"):
        dense_attention(q, k, v, bounds, backend="flash")
    machine((9, 0), ALL)
    with pytest.raises(
        ValueError,
        match=r"'flash_attn_4': (needs a CUDA GPU; .* cpu|takes bfloat16, float16; .*float32); "
        "for these inputs use one of torch_sdpa, or None",
    ):
        dense_attention(q, k, v, bounds, backend="flash_attn_4")
    with pytest.raises(ValueError, match=r"full layers of int64 .*takes .*; cast the inputs"):
        dense_attention(q.long(), k.long(), v.long(), bounds)
    with pytest.raises(ValueError, match=r"q \(10, 4, 8\).*multiple of G"):
        dense_attention(q, k[:, :1].expand(10, 3, 8), v, bounds)
    with pytest.raises(ValueError, match="float32, float64, float32: must be of one dtype"):
        dense_attention(q, k.double(), v, bounds)
    with pytest.raises(ValueError, match="meta.*must be on one device"):
        dense_attention(q, k, v.to("meta"), bounds)
    with pytest.raises(ValueError, match="10 queries of a document of 9 keys: .*no more than"):
        dense_continuation(q, k[:9], v[:9])
    for wrong in ([0, 9], [1, 10], [0], [0, 7, 3, 10]):
        with pytest.raises(ValueError, match="must ascend from 0 to the 10 tokens"):
            dense_attention(q, k, v, wrong)


def test_what_is_passed_over_on_a_gpu_is_said(machine, caplog):
    machine((9, 0))
    dense._log_once.cache_clear()
    q = SimpleNamespace(device=CUDA, dtype=torch.bfloat16, shape=(10, 4, 128), is_cuda=True)
    with caplog.at_level(logging.INFO, "longgen.kernels"):
        assert dense._chosen(q, (0, 10), None).name == "cudnn"
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("full layers on cuda run by cudnn (flash_attn_4: needs flash_attn.cute")
    assert "flash_attn_3: needs flash_attn_interface" in said

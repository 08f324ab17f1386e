"""Any legal call runs somewhere: what a device lacks is found out, logged and done without."""

import logging
from types import SimpleNamespace

import pytest
import torch

import kernels.cached_attention
import kernels.hopper
import kernels.sparse_attention
import kernels.triton_attention
from kernels import hardware, triton_probe
from kernels.pattern import Pattern
from kernels.pointwise import add_rms_norm, rotate_and_store, swiglu
from tests.kernels.cases import PATTERNS, TOLERANCE, assert_matches_reference, make_inputs

CUDA = torch.device("cuda")
FULL_AND_SPARSE = {"full": Pattern.full(), "per_head": PATTERNS["per_head"]}


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a GPU on which Triton's probe raises `error`, or runs."""

    def pretend(error=None, capability=(9, 0)):
        def probe(device):
            if error is not None:
                raise error

        hardware.triton_failure.cache_clear()
        hardware._compile_failure.cache_clear()
        monkeypatch.setattr(hardware, "cuda_capability", lambda device: capability)
        monkeypatch.setattr(triton_probe, "probe", probe)

    yield pretend
    hardware.triton_failure.cache_clear()
    hardware._compile_failure.cache_clear()


def test_what_triton_lacks_is_the_reason(gpu):
    gpu(RuntimeError("Failed to find C compiler.\nMore of it"))
    assert hardware.triton_failure(CUDA, torch.float32) == (
        "Triton cannot compile kernels here (RuntimeError: Failed to find C compiler.)"
    )


def test_a_gpu_that_runs_the_probe_runs_triton(gpu):
    gpu()
    assert hardware.triton_failure(CUDA, torch.bfloat16) is None


def test_bfloat16_needs_ampere(gpu):
    gpu(capability=(7, 5))
    assert hardware.triton_failure(CUDA, torch.float16) is None
    assert "compute capability 8.0" in hardware.triton_failure(CUDA, torch.bfloat16)


def test_without_triton_there_is_a_reason(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    assert hardware.triton_failure(CUDA, torch.float32) == "triton is not installed"


def test_a_cpu_is_no_gpu():
    assert "needs a CUDA GPU" in hardware.triton_failure(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "window", "wanted"),
    [
        (torch.bfloat16, 128, 256, "hopper"),
        (torch.float32, 128, 256, "triton"),
        (torch.bfloat16, 96, 256, "triton"),
        (torch.bfloat16, 128, 100, "triton"),
        # make demo's: heads of 32 in float32.
        (torch.float32, 32, 256, "triton"),
        (torch.float32, 12, 256, "tiled"),
        (torch.bfloat16, 192, 256, "tiled"),
    ],
)
def test_the_first_that_supports_a_call_on_a_gpu(
    gpu, monkeypatch, caplog, dtype, head_dim, window, wanted
):
    gpu()
    table = kernels.sparse_attention
    for module in (table, kernels.hopper):
        monkeypatch.setattr(module, "cuda_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels.triton_attention, "INTERPRETED", False)
    table._log_once.cache_clear()
    q = SimpleNamespace(device=CUDA, dtype=dtype, shape=(300, 4, head_dim))
    call = table.Call(Pattern(64, window), (0, 300), 0, 4, 0.1)
    with caplog.at_level(logging.INFO, "longgen.kernels"):
        table._choose(q, call, None)
    (record,) = caplog.records
    assert record.message.startswith(f"sparse layers on cuda run by {wanted}")
    assert (record.levelname == "WARNING") == (wanted == "tiled")
    for passed in table._candidates(CUDA)[: table._candidates(CUDA).index(wanted)]:
        assert f"{passed}: " in record.message


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 48, 64, 80, 100, 128, 192, 256])
@pytest.mark.parametrize("name", FULL_AND_SPARSE)
def test_every_head_dim_and_dtype_runs_on_a_gpu(name, head_dim, dtype):
    case = {"dtype": dtype, "device": "cuda", "with_lse": False}
    assert_matches_reference(FULL_AND_SPARSE[name], [130, 300], 4, 2, head_dim, **case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [12, 32, 64, 112])
@pytest.mark.parametrize("name", FULL_AND_SPARSE)
def test_every_head_dim_and_dtype_decodes_on_a_gpu(name, head_dim, dtype):
    """One more token over a cache whose slots are the positions, against the whole row."""
    q, k, v, *_, bounds = make_inputs([90], 4, 2, head_dim, dtype, "cuda")
    pattern = FULL_AND_SPARSE[name]
    whole = kernels.sparse_attention.sparse_attention(q, k, v, pattern, bounds)
    keys, values = (x.transpose(0, 1)[None].contiguous() for x in (k, v))
    positions = torch.arange(90, device="cuda")
    found = kernels.cached_attention.cached_attention(
        q[None, -1:],
        keys,
        values,
        pattern,
        positions[None, -1:],
        positions.int().expand(1, 2, -1).contiguous(),
        slots_used_B=torch.tensor([90], dtype=torch.int32, device="cuda"),
    )
    error = (found[0, 0].float() - whole[-1].float()).norm() / whole[-1].float().norm()
    assert error < TOLERANCE[dtype]


def pointwise(device):
    """What serving computes between products, of the same random numbers on any device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    x, delta, weight = draw(5, 96), draw(5, 96), draw(96)
    normed = add_rms_norm(x, delta, weight, 1e-5)
    qkv, cached = draw(5, (4 + 2 * 2) * 24), (draw(1, 2, 9, 24), draw(1, 2, 9, 24))
    slots = torch.tensor([[3, 1, -1, 8, 0]], device=device)
    rotate_and_store(qkv, 2, (draw(5, 12).cos(), draw(5, 12).sin()), cached, slots, 24)
    return [y.cpu() for y in (x, normed, swiglu(qkv), qkv, *cached)]


@pytest.mark.gpu
def test_pointwise_without_triton_on_a_gpu(monkeypatch):
    wanted = pointwise("cuda")
    monkeypatch.setattr("kernels.pointwise.triton_failure", lambda *_: "not here")
    for got, want in zip(pointwise("cuda"), wanted, strict=True):
        assert (got - want).norm() / want.norm() < 1e-5

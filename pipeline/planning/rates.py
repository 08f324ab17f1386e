"""Every constant of the plan, with where it comes from; nothing here is fitted to a training run.

`measured` rates were seen on the GPU that the row names (docs/results, or the project's notes where
no file is named); the others are assumed: a data sheet's figure, or another GPU's scaled by the
ratio of the data sheets' figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.cost import PEAK_BF16_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Rate:
    """A constant in SI units (FLOP/s, bytes/s, bytes, s) and its source.

    within: the error bar of one that was not measured there, as a share of the value; what the
    planned steps of the measured kinds erred by (docs/results/plan_against_measured.csv) is at
    most 0.1.
    """

    value: float
    source: str
    measured: bool = False
    within: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """What one GPU holds and does.

    memory: bytes, as torch reports the total. peak_flops: dense bf16. gemm, gemm_fp32: of large
    matrix products. attention: FLOP/s by (full or sparse or strided, forward or backward) on the
    pairs that the pattern needs, backward counted 2.5 forwards. attention_workspace: what a
    backward allocates beside dq, dk, dv, in multiples of q's bytes. hbm: bytes/s of copies, reads
    and writes together. nvlink, network: bytes/s out of one GPU, and as many in.
    """

    memory: Rate
    peak_flops: float
    gemm: Rate
    gemm_fp32: Rate
    attention: dict[tuple[str, str], Rate]
    attention_workspace: dict[str, Rate]
    hbm: Rate
    nvlink: Rate
    network: Rate


CSV = "docs/results/kernels_h100.csv, 128K, 32 heads of 128"
# FLOP/s of one H100; the first three lines are dense_flash_attn_4 and longgen_hopper.
ATTENTION_H100 = {
    ("full", "forward"): Rate(664.9e12, f"{CSV}, dense_flash_attn_4", True),
    ("full", "backward"): Rate(629.5e12, f"{CSV}, dense_flash_attn_4", True),
    ("sparse", "forward"): Rate(527.1e12, f"{CSV}, longgen_hopper, sink 64 + window 2048", True),
    ("sparse", "backward"): Rate(393.0e12, f"{CSV}, longgen_hopper, sink 64 + window 2048", True),
    ("strided", "forward"): Rate(479.6e12, f"{CSV}, longgen_hopper, stride 64 per head", True),
    ("strided", "backward"): Rate(389.4e12, f"{CSV}, longgen_hopper, stride 64 per head", True),
}
# Of the file's peak_mib: 6,176 (flash_attn_4) and 5,264 (longgen_hopper) with dq, dk and dv, of
# 1,024 MiB each, as large as q is.
WORKSPACE_HOPPER = {
    "full": Rate((6176 - 3 * 1024) / 1024, f"{CSV}, peak_mib of dense_flash_attn_4", True),
    "sparse": Rate((5264 - 3 * 1024) / 1024, f"{CSV}, peak_mib of longgen_hopper", True),
}
GEMM = 675e12


def _as_on_h100(rate: Rate) -> Rate:
    return Rate(rate.value, f"as on H100, which has the same cores: {rate.source}", within=0.05)


def _scaled_to_a100(rate: Rate) -> Rate:
    ratio = PEAK_BF16_FLOPS["A100"] / PEAK_BF16_FLOPS["H100"]
    # The same code reaches another share of the peak on another generation.
    return Rate(rate.value * ratio, f"{rate.source}, scaled by the peaks 312/989", within=0.3)


GPUS = {
    "H200": Gpu(
        memory=Rate(139.8 * GIB, "torch's total", True),
        peak_flops=PEAK_BF16_FLOPS["H200"],
        gemm=Rate(GEMM, "650 to 700 TFLOP/s, bf16", True),
        gemm_fp32=Rate(50e12, "3/4 of the data sheet's 67 TFLOP/s, no tensor cores", within=0.2),
        attention={key: _as_on_h100(rate) for key, rate in ATTENTION_H100.items()},
        attention_workspace={k: _as_on_h100(rate) for k, rate in WORKSPACE_HOPPER.items()},
        hbm=Rate(4.3e12, "copies; 4.8e12 in the data sheet", True),
        nvlink=Rate(360e9, "0.8 of the data sheet's 450 GB/s each way", within=0.2),
        network=Rate(40e9, "0.8 of one 400 Gbit/s adapter per GPU", within=0.2),
    ),
    "H100-80G": Gpu(
        memory=Rate(79.1 * GIB, "torch's total, as its out-of-memory messages give it"),
        peak_flops=PEAK_BF16_FLOPS["H100"],
        gemm=Rate(GEMM, "as on H200", within=0.05),
        gemm_fp32=Rate(50e12, "3/4 of the data sheet's 67 TFLOP/s, no tensor cores", within=0.2),
        attention=ATTENTION_H100,
        attention_workspace=WORKSPACE_HOPPER,
        hbm=Rate(3.0e12, "docs/results/kernels_h100.csv, backend copy, 16 rows of 128K", True),
        nvlink=Rate(360e9, "0.8 of the data sheet's 450 GB/s each way", within=0.2),
        network=Rate(40e9, "0.8 of one 400 Gbit/s adapter per GPU", within=0.2),
    ),
    "A100-80G": Gpu(
        memory=Rate(79.1 * GIB, "torch's total, as its out-of-memory messages give it"),
        peak_flops=PEAK_BF16_FLOPS["A100"],
        gemm=_scaled_to_a100(Rate(GEMM, "as on H200")),
        gemm_fp32=Rate(15e12, "3/4 of the data sheet's 19.5 TFLOP/s, no tensor cores", within=0.2),
        attention={key: _scaled_to_a100(rate) for key, rate in ATTENTION_H100.items()},
        attention_workspace={
            "full": Rate((5138 - 3 * 1024) / 1024, f"H100: {CSV}, peak_mib of dense_torch_flash"),
            "sparse": Rate((3152 - 3 * 1024) / 1024, f"H100: {CSV}, peak_mib of longgen_triton"),
        },
        hbm=Rate(1.83e12, "2.04e12 in the data sheet, scaled by H200's 4.3/4.8", within=0.1),
        nvlink=Rate(240e9, "0.8 of the data sheet's 300 GB/s each way", within=0.2),
        network=Rate(20e9, "0.8 of one 200 Gbit/s adapter per GPU", within=0.2),
    ),
}

CHECKPOINT = "docs/results/checkpoint_1b.json, 14.8 GB of one H200"
# What does not depend on the GPU's kind.
PCIE = Rate(45e9, f"each way; to the host: {CHECKPOINT} in seconds_blocked=0.327", within=0.2)
PAGEABLE = Rate(10e9, "copies between a GPU and host memory that is not pinned", within=0.4)
HOST_MEMORY = Rate(200e9, "bytes/s of a host's memory, which all its ranks share", within=0.4)
DISK = Rate(1.06e9, f"{CHECKPOINT} in seconds_in_the_background=13.98", True)
# Of a host, where plan.host_gib does not say: what a rented H200 comes with, a GPU.
HOST_BYTES_A_GPU = Rate(128 * GIB, "host memory that comes with each GPU; plan.host_gib says else")
CUDA_CONTEXT = Rate(1.0e9, "CUDA context, kernels and cuBLAS's workspace, of each GPU")
NCCL_BUFFERS = Rate(1.0e9, "NCCL's buffers for the groups of a rank, where there are several")
# 419 unexpected stops of 2,048 nodes of 8 GPUs within 54 days, in seconds.
NODE_MTBF = Rate(
    2048 * 54 * 86400 / 419,
    "seconds from one failure of a node to its next: Llama 3, arXiv 2407.21783, section 3.3.4; "
    "plan.node_mtbf_hours says else",
)
RESTART = Rate(
    600.0,
    "seconds from a failure to loading the checkpoint: 300 until Slurm sees that a node is dead "
    "(SlurmdTimeout), 120 until it starts a requeued job, 180 for checks and imports; "
    "plan.restart_seconds says else",
)
HOST_PROCESS = Rate(5.0e9, "Python, its libraries, rows and buffers of one rank on the host")


def rates_of(gpu_name: str) -> dict[str, Rate]:
    """All constants that a plan for this GPU takes, by name."""
    gpu = GPUS[gpu_name]
    named = {
        key: getattr(gpu, key)
        for key in ("memory", "gemm", "gemm_fp32", "hbm", "nvlink", "network")
    }
    named |= {f"attention, {kind}, {way}": rate for (kind, way), rate in gpu.attention.items()}
    named |= {f"attention workspace, {k}": rate for k, rate in gpu.attention_workspace.items()}
    return named | {
        "pcie": PCIE,
        "pageable copies": PAGEABLE,
        "host memory": HOST_MEMORY,
        "disk, each host": DISK,
        "host bytes a GPU": HOST_BYTES_A_GPU,
        "CUDA context": CUDA_CONTEXT,
        "NCCL": NCCL_BUFFERS,
        "host process": HOST_PROCESS,
        "node's time between failures": NODE_MTBF,
        "restart": RESTART,
    }

"""What all tests share: one thread unless OMP_NUM_THREADS is set, Triton's interpreter where there
is no GPU, and Megatron's groups for one process."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: kernels then run as Python, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as `gpu` what runs on the GPU here by its module's DEVICE; skip what lacks GPUs."""
    gpus = torch.cuda.device_count()
    for item in items:
        if str(getattr(item.module, "DEVICE", "")).startswith("cuda"):
            item.add_marker("gpu")
        needed = 2 if item.get_closest_marker("multigpu") else 1
        if gpus < needed and (needed == 2 or item.get_closest_marker("gpu")):
            reason = "needs two CUDA GPUs" if needed == 2 else "needs a CUDA GPU"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _threads():
    """One by default: models here are small, and two workers share two cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def layout():
    """Megatron's and DeepSpeed's process groups of a world of one, on the CPU."""
    from pipeline.schema import ParallelSection
    from pipeline.training.layout import Layout

    return Layout(ParallelSection(), torch.device("cpu"))

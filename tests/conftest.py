"""What all tests share: one thread unless OMP_NUM_THREADS is set, Triton's interpreter where there
is no GPU, and Megatron's groups for one process."""

import logging
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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    """A test finds the project's logger as a new process has it, whatever ran here before.

    Stages set it up; pytest's own capture then attaches to it as well as to the root.
    """
    log = logging.getLogger("longgen")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True
    return (yield)


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

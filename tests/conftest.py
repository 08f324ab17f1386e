"""What all tests share: two threads, and Megatron's groups for one process."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _two_cores():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def layout():
    """Megatron's and DeepSpeed's process groups of a world of one, on the CPU."""
    from pipeline.schema import ParallelSection
    from pipeline.training.layout import Layout

    return Layout(ParallelSection(), torch.device("cpu"))

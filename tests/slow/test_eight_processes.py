"""The layouts of a node of eight GPUs, on eight processes: one process's losses and norms."""

import pytest

from tests.training.test_layouts import assert_same, measure
from tests.training.worlds import run_world

pytestmark = pytest.mark.slow

# Rows of a step: two micro-batches where each of eight processes has rows of its own.
ROWS = 16
SHARED = {"rows": ROWS, "heads": 8}
MHA, GQA = ("per_head", 8), ("strided", 2)
LAYOUTS = {
    "ulysses8_zero1": {"ulysses": 8, "zero_stage": 1},
    "tp8": {"tensor": 8, "sequence_parallel": True},
    "tp2_ulysses4": {"tensor": 2, "sequence_parallel": True, "ulysses": 4},
    "tp4_ulysses2": {"tensor": 4, "sequence_parallel": True, "ulysses": 2},
    "zero3": {"zero_stage": 3},
    "ulysses8_zero3": {"ulysses": 8, "zero_stage": 3},
}


def measure_shared(layout, cases):
    return measure(layout, cases, **SHARED)


@pytest.fixture(scope="module")
def one_process():
    return run_world(1, measure_shared, {"world": 1}, [MHA, GQA], timeout=300)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_eight_processes_are_one(name, one_process):
    """Two KV heads cannot be divided by four or more of tensor parallelism."""
    cases = [MHA, GQA] if LAYOUTS[name].get("tensor", 1) <= 2 else [MHA]
    layout = {"world": 8} | LAYOUTS[name]
    for found in run_world(8, measure_shared, layout, cases, timeout=600):
        assert_same(found, {case: one_process[case] for case in cases})

"""bf16 with accumulation, as the recipes train: every layout's losses and norms are one process's.

A model of 256 dimensions with weights of a usual size: what bf16 rounds averages out there as it
does in the recipes' models, so that 0.1% of the loss and 1% of the gradient norm hold.
"""

import tempfile
from pathlib import Path

import pytest

from tests.training.small_training import parallel_section, rows_a_process, small_config
from tests.training.test_layouts import LAYOUTS
from tests.training.worlds import run_world

STEPS = 8
ROWS = 4
LENGTH = 64
MAX_LOSS_DEVIATION, MAX_NORM_DEVIATION = 1e-3, 1e-2
NAMES = ("tp2_sp", "ulysses2", "tp2_ulysses2", "zero1", "zero2", "zero3")
# Tensor and sequence parallelism together, and the partition that differs most from one process.
QUICK = ("tp2_sp", "zero3")


def measure(layout, precision="bf16"):
    """[(loss, gradient norm)] of each step, of two micro-batches in any layout."""
    from pipeline.training import engine
    from tests.training import small_training

    # Otherwise ZeRO 3 would keep all of so small a model whole.
    engine.ZERO3_KEPT_WHOLE = 0
    small_training.LENGTH = LENGTH
    random_weights = small_training.whole_weights
    small_training.whole_weights = lambda config: {
        name: weight * 0.2 if weight.dim() > 1 else weight
        for name, weight in random_weights(config).items()
    }
    rows = small_training.RandomRows
    small_training.RandomRows = lambda count=STEPS * ROWS, **seed: rows(count, LENGTH, **seed)
    config = small_config(
        "per_head", 2, hidden_size=256, ffn_hidden_size=512, head_dim=64, max_positions=LENGTH
    )
    parallel = parallel_section(**layout)
    train = small_training.small_train(
        steps=STEPS,
        rows_per_step=ROWS,
        micro_batch_rows=rows_a_process(parallel, ROWS),
        precision=precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = small_training.small_trainer(config, parallel, train, Path(folder))
        steps = [trainer.step(step, ROWS * step) for step in range(STEPS)]
    return [(step["loss"], step["grad_norm"]) for step in steps]


@pytest.fixture(scope="module")
def one_process():
    return run_world(1, measure, {"world": 1})[0]


def deviations(found, expected):
    """The largest relative deviations of the losses and of the gradient norms."""
    return [
        max(abs(mine[at] / theirs[at] - 1) for mine, theirs in zip(found, expected, strict=True))
        for at in (0, 1)
    ]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in NAMES],
)
def test_losses_and_norms_in_bf16_are_those_of_one_process(name, one_process):
    layout = LAYOUTS[name]
    for found in run_world(layout["world"], measure, layout):
        loss, norm = deviations(found, one_process)
        assert loss < MAX_LOSS_DEVIATION and norm < MAX_NORM_DEVIATION, (loss, norm)

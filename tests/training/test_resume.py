"""A checkpoint outlives its layout: saved on one, continued on any other."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.closeness import assert_close_by_norm
from tests.training.small_training import (
    parallel_section,
    rows_a_process,
    small_config,
    small_train,
    small_trainer,
    train_losses,
)
from tests.training.test_layouts import tiled_on_gpu
from tests.training.worlds import run_world

CASE = ("per_head", 2)
LAYOUTS = {
    "one": {"world": 1},
    "tp2": {"world": 2, "tensor": 2, "sequence_parallel": True},
    "ulysses2": {"world": 2, "ulysses": 2},
    "zero3": {"world": 2, "zero_stage": 3},
    "tp2_zero1": {"world": 4, "tensor": 2, "zero_stage": 1},
}


def train(layout, folders, steps, precision="fp32", device="cpu"):
    """Train on in each folder, to `steps`: for each, what every step measured and which rows it
    read."""
    from pipeline.training import engine as engine_module
    from pipeline.training.checkpoint import Progress

    engine_module.ZERO3_KEPT_WHOLE = 0
    parallel = parallel_section(**layout)
    section = small_train(
        steps=steps,
        save_every=2,
        keep_last=9,
        micro_batch_rows=rows_a_process(parallel),
        precision=precision,
    )
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        # cuBLAS needs a fixed workspace to repeat its sums.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        tiled_on_gpu(setattr)
    found = []
    for folder in folders:
        config = small_config(*CASE)
        trainer, start = small_trainer(config, parallel, section, Path(folder), device)
        loader, rows = trainer.loader, {}
        honest = loader.step

        def step(consumed, honest=honest, loader=loader, rows=rows):
            rows[consumed] = [loader.row_index(consumed + i) for i in range(4)]
            return honest(consumed)

        loader.step = step
        trainer.run(start or Progress(0, 0))
        found.append(rows)
    return found


def resumed(folder, step):
    """A copy of the run in `folder` as it was when the checkpoint of `step` was whole."""

    def copy(to):
        shutil.copytree(folder, to)
        for path in (to / "checkpoints").glob("step_??????"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        (to / "checkpoints" / "latest").write_text(f"step_{step:06d}\n")
        return to

    return copy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each layout, a run of four steps that saved after two, and the rows that it read."""
    found = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        rows = run_world(layout["world"], train, layout, [str(folder)], 4)[0][0]
        found[name] = folder, rows
    return found


def continue_everywhere(names, name, saved, tmp_path, device="cpu"):
    """Resume on the layout `name` what each of `names` saved, and compare with what it did."""
    layout = LAYOUTS[name]
    folders = [resumed(saved[other][0], 2)(tmp_path / other) for other in names]
    everyones = run_world(
        layout["world"],
        train,
        layout,
        [str(folder) for folder in folders],
        4,
        "fp32",
        device,
        gpu=device == "cuda",
        timeout=300,
    )
    for index, other in enumerate(names):
        folder, rows = saved[other]
        whole, again = train_losses(folder), train_losses(folders[index])
        assert sorted(again) == sorted(whole) == [1, 2, 3, 4]
        assert everyones[0][index] == {at: rows[at] for at in (8, 12)}
        for step in (3, 4):
            if other == name:
                assert again[step] == whole[step]
            else:
                for mine, theirs in zip(again[step], whole[step], strict=True):
                    assert_close_by_norm(mine, theirs, 1e-5, (other, step))


@pytest.mark.parametrize("name", LAYOUTS)
def test_continues_what_any_layout_saved(name, saved, tmp_path):
    continue_everywhere(LAYOUTS, name, saved, tmp_path)


ON_TWO_GPUS = ("tp2", "ulysses2", "zero3")


@pytest.mark.multigpu
def test_two_gpus_continue_what_any_layout_saved(tmp_path):
    found = {}
    for name in ON_TWO_GPUS:
        folder = tmp_path / "saved" / name
        folder.mkdir(parents=True)
        layout = LAYOUTS[name]
        arguments = (layout, [str(folder)], 4, "fp32", "cuda")
        everyones = run_world(layout["world"], train, *arguments, gpu=True, timeout=300)
        found[name] = folder, everyones[0][0]
    for name in ON_TWO_GPUS:
        continue_everywhere(ON_TWO_GPUS, name, found, tmp_path / name, "cuda")


@pytest.mark.parametrize("name", ["zero3", "tp2_zero1"])
def test_bf16_continues_bit_equal_on_its_layout(name, tmp_path):
    layout = LAYOUTS[name]
    whole = tmp_path / "whole"
    whole.mkdir()
    run_world(layout["world"], train, layout, [str(whole)], 4, "bf16")
    again = resumed(whole, 2)(tmp_path / "again")
    run_world(layout["world"], train, layout, [str(again)], 4, "bf16")
    assert train_losses(again) == train_losses(whole)

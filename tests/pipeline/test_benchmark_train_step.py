"""benchmark=train_step: arms, rows, clocks and figures at tiny sizes; what ends a case alone."""

import csv
import gc
import json
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.pattern import Pattern
from pipeline.benchmarks import train_rows, train_step
from pipeline.schema import TrainCase
from pipeline.validation import parse
from tests.closeness import assert_close_by_norm
from tests.pipeline.running import composed, refused, run
from tests.pipeline.small_run import SHAPE
from tests.tiny import tiny_config, tiny_gpt, tiny_llama
from tests.training.worlds import run_world

PATTERN = {"sink_tokens": 4, "window": 12, "block": 8}
CONFIG = (
    "name=small",
    "stage=benchmark",
    "benchmark.name=train_step",
    "benchmark.repeats=2",
    "benchmark.document_mean=20",
    "benchmark.commit=abc",
    "benchmark.groups=[a]",
    *(f"model.{key}={value}" for key, value in SHAPE.items()),
    *(f"pattern.{key}={value}" for key, value in PATTERN.items()),
    "schedule.full=[1]",
    "train.precision=fp32",
    "train.rows_per_step=2",
    "train.micro_batch_rows=1",
    "train.lr=0.001",
)
# Of SHAPE: what every token is multiplied with, layers and output layer.
MATRICES = 2 * (32 * 16 * 2 * (2 + 2) + 3 * 32 * 48) + 32 * 420


def with_cases(*cases):
    return f"benchmark.train_cases={json.dumps([{'group': 'a'} | case for case in cases])}"


def table(capsys, tmp_path, *cases, more=()):
    """(rows, printed lines, folder) of a run of these cases."""
    code, lines = run(capsys, *CONFIG, with_cases(*cases), *more, f"outputs={tmp_path}")
    assert code == 0, lines
    folder = tmp_path / "small/main/benchmark"
    with (folder / "train_step.csv").open() as file:
        return list(csv.DictReader(file)), lines, folder


def seen_by_definition(length):
    position = torch.arange(length)
    return Pattern(**PATTERN).visible(position[:, None], position[None]).sum().item()


def test_the_table_of_one_run(layout, tmp_path, capsys):
    cases = [
        {"length": 96, "recompute": "attention", "mlp_tile": 40},
        {"length": 60, "documents": "packed", "recompute": "full", "offload_activations": True},
        {"length": 60, "documents": 25, "document_mask": False, "arms": ["hybrid"], "steps": 3},
        {"length": 48, "arms": ["full"], "optimizer_offload": True, "group": "b"},
    ]
    rows, lines, folder = table(capsys, tmp_path, *cases, more=["benchmark.groups=[b,a]"])
    names = {f"train_step{end}" for end in (".csv", ".json", "_by_length.png", "_by_length.svg")}
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json"}
    record = json.loads((folder / "train_step.json").read_text())
    assert [row["arm"] for row in record["figures"]["rows"]] == [row["arm"] for row in rows]
    assert {(row["gpu"], row["commit"], row["torch"]) for row in rows} == {
        ("CPU", "abc", record["versions"]["torch"])
    }
    arms = [(row["arm"], row["length"], row["documents"]) for row in rows]
    pair = ("hybrid", "full")
    assert arms == [
        ("full", "48", "one"),
        *((arm, "96", "one") for arm in pair),
        *((arm, "60", "packed") for arm in pair),
        ("hybrid", "60", "25"),
    ]
    memory = [
        [row[key] for key in (*train_rows.TRAIN_KEYS, "optimizer_offload")] for row in rows[::2]
    ]
    assert memory[0] == ["none", "False", "", "True"]
    assert memory[1] == ["attention", "False", "40", "False"]
    assert memory[2] == ["full", "True", "", "False"]
    assert "engine built in" in " ".join(lines) and sum("engine built" in x for x in lines) == 2
    for row in rows:
        full, length = row["arm"] == "full", int(row["length"])
        assert row["dense_backend"] == "torch_sdpa"
        assert row["sparse_backend"] == ("" if full else "tiled")
        losses = list(map(float, row["losses"].split()))
        assert len(losses) == int(row["steps"]) and len(set(losses)) == len(losses)
        assert all(4 < loss < 8 for loss in losses)
        least, middle, most = (float(row[f"step_seconds{x}"]) for x in ("_least", "", "_most"))
        assert 0 < least <= middle <= most
        speed = float(row["tokens_per_second_per_gpu"])
        assert speed == pytest.approx(length / middle, rel=1e-4 / middle)
        if row["documents"] == "packed":
            continue
        # Both layers' and both heads' pairs, by the definition of what is visible.
        causal = length * (length + 1) // 2
        pairs = 2 * (causal + (causal if full else seen_by_definition(length)))
        assert int(row["pairs"]) == pairs
        assert float(row["model_flops"]) == 6 * MATRICES * length + 12 * 16 * pairs
        assert row["mfu"] == "" and row["device_peak_allocated_bytes"] == ""
        assert int(row["host_peak_bytes"]) > 1e8
    assert (rows[1]["full_layers"], rows[2]["full_layers"]) == ("1", "2")
    ratio = float(rows[1]["tokens_per_second_per_gpu"]) / float(
        rows[2]["tokens_per_second_per_gpu"]
    )
    assert float(rows[1]["hybrid_over_full"]) == pytest.approx(ratio, abs=1e-3)
    assert f"96 tokens, one document: hybrid {ratio:.2f}x full" in lines
    assert rows[5]["hybrid_over_full"] == rows[2]["hybrid_over_full"] == ""


def test_an_arm_set_is_the_arm_built(layout):
    """Pattern and RoPE of each layer: the same loss, bit by bit, as of a model built so."""
    hybrid = tiny_config(
        is_full=(False, True, False), sparse_rope={"rope_type": "default", "rope_theta": 500.0}
    )
    full = replace(hybrid, is_full=(True,) * 3)
    llama, positions = tiny_llama(hybrid), torch.arange(60)[None]
    tokens = torch.randint(97, (1, 60), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 60], dtype=torch.int32)

    def loss(model):
        with torch.no_grad():
            return model(tokens, positions, bounds, tokens.roll(-1))

    built = [loss(tiny_gpt(shape, llama)) for shape in (hybrid, full)]
    assert not torch.equal(*built)
    model = tiny_gpt(hybrid, llama)
    for shape, wanted in ((full, built[1]), (hybrid, built[0]), (full, built[1])):
        train_step.set_arm(model, shape)
        assert torch.equal(loss(model), wanted)
    # RoPE alone, and the pattern alone, would be seen.
    for half in (replace(hybrid, sparse_rope=hybrid.rope), replace(hybrid, pattern=Pattern.full())):
        assert not torch.equal(loss(tiny_gpt(half, llama)), built[0])


def test_memory_set_is_the_memory_built(layout):
    from pipeline.training.engine import build_model

    config = parse(composed(*CONFIG, with_cases({"length": 96})))
    case = TrainCase(length=96, recompute="attention", offload_activations=True, mlp_tile=24)
    shape = train_rows.arm_shape(config, "hybrid")
    own = train_rows.case_config(config, case)
    model, built = (build_model(c, shape, layout) for c in (config, own))
    assert (model.memory.recompute, built.memory.recompute) == ("none", "attention")
    train_step.set_memory(model, own.train)
    for key, value in vars(built.memory).items():
        if key != "kept":
            assert getattr(model.memory, key) == value
    assert model.memory.kept.offload and built.memory.kept.offload
    assert all(layer.memory is model.memory for layer in model.decoder.layers)


def test_packed_lengths_fill_the_row():
    bench = parse(composed(*CONFIG, with_cases({"length": 96}))).benchmark
    bench.document_mean = 1800
    case = TrainCase(length=2**23, documents="packed")
    lengths = train_rows.document_lengths(case, bench)
    assert lengths.sum() == 2**23 and lengths.min() >= 1
    assert lengths[:-1].mean() == pytest.approx(1800, rel=0.1)
    assert np.log(lengths[:-1]).std() == pytest.approx(1.2, rel=0.05)
    # The same documents for a shorter row, the last one cut.
    short = train_rows.document_lengths(replace(case, length=5000), bench)
    assert short.sum() == 5000 and (short[:-1] == lengths[: len(short) - 1]).all()
    assert short[-1] <= lengths[len(short) - 1]
    bench.seed += 1
    assert list(train_rows.document_lengths(replace(case, length=5000), bench)) != list(short)
    for documents, wanted in (("one", [50]), (20, [20, 20, 10]), (60, [50])):
        case = TrainCase(length=50, documents=documents)
        assert list(train_rows.document_lengths(case, bench)) == wanted


def test_without_masks_a_row_is_one_document():
    from pipeline.training.loader import collate

    rows = train_rows.RandomRows(np.array([20, 7, 33]), 420, seed=1)
    one = train_rows.RandomRows(np.array([60]), 420, seed=1)
    off = collate([rows[3]], document_mask=False)
    whole = collate([one[3]], document_mask=True)
    assert torch.equal(off.cu_seqlens, whole.cu_seqlens)
    assert torch.equal(off.tokens_BS, whole.tokens_BS)
    assert collate([rows[3]], document_mask=True).lengths == [20, 7, 33]
    assert off.valid_tokens == whole.valid_tokens - 2
    tokens = np.stack([rows[index][0] for index in range(50)])
    assert tokens.min() == 0 and tokens.max() == 419 and (tokens[0] != tokens[1]).any()
    config = parse(composed(*CONFIG, with_cases({"length": 60})))
    off, packed, one = (
        train_rows.case_columns(config, TrainCase(length=60, **case), "full")
        for case in (
            {"documents": "packed", "document_mask": False},
            {"documents": "packed"},
            {},
        )
    )
    assert off["model_flops"] == one["model_flops"] > packed["model_flops"]
    assert packed["document_count"] == off["document_count"] > 1
    assert packed["document_longest"] < 60 == one["document_longest"]


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has")


def test_out_of_memory_is_a_row(layout, tmp_path, capsys, monkeypatch):
    """The case after it finds an engine like the one that a run without it finds."""
    cases = [{"length": 96}, {"length": 60}]
    wanted, *_ = table(capsys, tmp_path / "alone", cases[1])
    honest, taken = train_step.TimedEngine.step, []

    def step(engine):
        # Behind one update and another backward, whose gradients wait for the optimizer.
        taken.append(engine)
        return out_of_memory() if len(taken) == 2 else honest(engine)

    monkeypatch.setattr(train_step.TimedEngine, "step", step)
    rows, lines, folder = table(capsys, tmp_path, {**cases[0], "arms": ["hybrid"]}, cases[1])
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."
    assert rows[0]["reason"] == reason and rows[0]["step_seconds"] == rows[0]["losses"] == ""
    assert rows[0]["length"] == "96" and rows[0]["model_flops"]
    assert f"hybrid, 96 tokens, one document: not measured: {reason}" in lines
    assert [row["losses"] for row in rows[1:]] == [row["losses"] for row in wanted]
    assert not (folder / "train_step_by_length.png").exists()
    assert "measured: 2" in lines and "not measured: 1" in lines


def test_an_engine_that_cannot_be_built_is_not_tried_twice(layout, tmp_path, capsys, monkeypatch):
    import pipeline.training.engine

    honest, tried = pipeline.training.engine.build_engine, []

    def build(model, train, parallel, layout):
        tried.append(parallel.optimizer_offload)
        return honest(model, train, parallel, layout) if tried[-1] else out_of_memory()

    monkeypatch.setattr(pipeline.training.engine, "build_engine", build)
    offloaded = {"length": 60, "optimizer_offload": True, "arms": ["full"]}
    rows, *_ = table(capsys, tmp_path, {"length": 96}, offloaded, {"length": 60})
    assert tried == [False, True]
    assert [bool(row["reason"]) for row in rows] == [True] * 4 + [False]
    assert rows[4]["optimizer_offload"] == "True"


def test_a_loss_that_is_not_finite_is_a_row(layout, tmp_path, monkeypatch):
    config = parse(composed(*CONFIG, with_cases({"length": 60}), "train.non_finite=skip"))
    monkeypatch.setattr(train_step, "DEVIATION", float("inf"))
    steps = train_step.TrainSteps(config, layout, tmp_path)
    row = steps.row(config.benchmark.train_cases[0], "hybrid")
    assert re.match("StageError: step 1: the loss is nan; it must be finite", row["reason"])
    assert steps.engine is None


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_let_go_leaves_nothing(layout, tmp_path, stage):
    from pipeline.training.engine import _masters

    override = f"parallel.zero_stage={stage}"
    config = parse(composed(*CONFIG, with_cases({"length": 60}), override))
    steps = train_step.TrainSteps(config, layout, tmp_path)
    row = steps.row(config.benchmark.train_cases[0], "hybrid")
    assert row["zero_stage"] == stage and row["step_seconds"]
    parameters = list(steps.engine.module.parameters())
    held = [*_masters(steps.engine), *parameters, steps.engine]
    held = [weakref.ref(x) for x in held]
    assert all(x() is not None for x in held)
    del parameters
    steps.drop_engine()
    gc.collect()
    assert [x() for x in held if x() is not None] == []


def test_weights_are_drawn_by_their_place(layout, tmp_path):
    config = parse(composed(*CONFIG, with_cases({"length": 60})))
    steps = train_step.TrainSteps(config, layout, tmp_path)
    case = train_rows.case_config(config, config.benchmark.train_cases[0])
    steps._prepare(case, train_rows.arm_shape(config, "full"))
    for name, weight in steps.engine.module.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            # Two layers: those that write to the residual stream get 1 / sqrt(4) of it.
            wanted = 0.01 if "linear_proj" in name or "linear_fc2" in name else 0.02
            assert weight.std().item() == pytest.approx(wanted, rel=0.1), name
    steps.drop_engine()


def test_a_steps_clock():
    clock = train_step.StepClock(torch.device("cpu"))
    engine = SimpleNamespace(backward=lambda loss: loss, step=lambda: None, optimizer="Adam")
    timed = train_step.TimedEngine(engine, clock.mark)

    def step():
        torch.randn(10)
        assert timed.backward(3) == 3 and timed.optimizer == "Adam"
        timed.step()
        return "loss"

    (total, *parts), told = clock.time(step)
    assert told == "loss" and len(parts) == 3 and min(parts) >= 0
    assert total == pytest.approx(sum(parts), abs=1e-3)
    with pytest.raises(RuntimeError, match="step of 5 parts: must be forward, backward, optimizer"):
        clock.time(lambda: (step(), timed.step(), timed.step()))


def test_figures_by_hand():
    config = parse(composed(*CONFIG, with_cases({"length": 96})))
    row = train_rows.case_columns(config, TrainCase(length=96), "full") | {"tensor": 2}
    times = [[2.0, 0.5, 1.0, 0.4], [9.0, 1.5, 7.0, 0.5], [4.0, 0.75, 3.0, 0.25]]
    found = train_rows.measured_columns(row, times, [2.5, 2.25, 2.0], "NVIDIA H200")
    assert found["step_seconds"] == 4.0 and found["losses"] == "2.500000 2.250000 2.000000"
    assert (found["step_seconds_least"], found["step_seconds_most"]) == (2.0, 9.0)
    parts = [found[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
    assert parts == [0.75, 3.0, 0.4]
    assert found["tokens_per_second_per_gpu"] == 96 / 4 / 2
    flops = 6 * MATRICES * 96 + 12 * 16 * 2 * 2 * 96 * 97 // 2
    assert found["mfu"] == pytest.approx(flops / 4 / 2 / 989e12, rel=1e-3)


def test_a_ratio_is_to_the_fastest_full_row_of_the_same_case():
    def row(arm, speed, length=64, documents="packed", mask=True):
        case = {"arm": arm, "length": length, "documents": documents, "document_mask": mask}
        return case | {"document_count": 3, "tokens_per_second_per_gpu": speed}

    rows = [
        *(row("hybrid", 30.0), row("full", 15.0), row("full", 20.0), row("full", 10.0, mask=False)),
        *(row("hybrid", 30.0, 128), row("full", 5.0, 64, "one"), row("hybrid", None)),
        {key: value for key, value in row("full", 0).items() if "speed" not in key},
    ]
    assert train_rows.compare_arms(rows) == ["64 tokens, 3 documents: hybrid 1.50x full"]
    assert [r.get("hybrid_over_full") for r in rows] == [1.5] + [None] * 7


def test_past_the_budget_nothing_is_begun(layout, tmp_path, capsys):
    rows, *_ = table(capsys, tmp_path, {"length": 96}, more=["benchmark.budget_minutes=0"])
    assert {row["reason"] for row in rows} == {"past the budget of 0 minutes"} and len(rows) == 2
    assert rows[0]["pairs"]


def one_rank(folder, more):
    """What a rank of a world measures: (times of its rows, rank)."""
    from pathlib import Path

    from pipeline.manifest import StageContext

    config = parse(composed(*CONFIG, with_cases({"length": 64}), *more))
    log = train_step.log
    context = StageContext(config, Path(folder), None, log)
    figures, rank = train_step.measure(context)
    return rank, [
        (row["step_seconds"], row["losses"], row["tokens_per_second_per_gpu"], row["first_loss"])
        for row in figures["rows"]
    ]


@pytest.mark.gpu
def test_on_a_gpu_memory_and_mfu_are_measured(tmp_path):
    memory = "train.recompute=attention", "train.offload_activations=true"
    more = ("device=cuda", "train.precision=bf16", "model.head_dim=64", *memory)
    run_world(1, one_rank, str(tmp_path), more, gpu=True)
    with (tmp_path / "train_step.csv").open() as file:
        for row in csv.DictReader(file):
            assert row["reason"] == "" and row["gpu"] != "CPU", row
            allocated, reserved = (
                int(row[f"device_peak_{x}_bytes"]) for x in ("allocated", "reserved")
            )
            assert 0 < allocated <= reserved
            # Two tensors of each layer wait in host memory.
            assert int(row["pinned_peak_bytes"]) >= 2 * 64 * (32 + 2 * 64) * 2
            total = float(row["step_seconds"])
            parts = (float(row[f"{part}_seconds"]) for part in train_rows.TIMES[1:])
            # Clocks of host and device, over two steps.
            assert sum(parts) == pytest.approx(total, rel=0.1, abs=5e-3)


@pytest.fixture(scope="module")
def first_losses(tmp_path_factory):
    ((_, told),) = run_world(1, one_rank, str(tmp_path_factory.mktemp("one")), ())
    return [float(first) for *_, first in told]


@pytest.mark.parametrize("split", ["ulysses", "tensor"])
def test_two_ranks_tell_the_slowest_ones_times_and_one_process_s_loss(
    tmp_path, split, first_losses
):
    more = ("parallel.gpus_per_node=2", f"parallel.{split}=2")
    (first, told), (second, same) = run_world(2, one_rank, str(tmp_path), more)
    assert (first, second) == (0, 1) and told == same and len(told) == 2
    with (tmp_path / "train_step.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, (seconds, losses, speed, first), alone in zip(rows, told, first_losses, strict=True):
        assert (row["world"], row[split], row["losses"]) == ("2", "2", losses)
        assert speed == pytest.approx(64 / seconds / 2, rel=1e-4 / seconds)
        assert_close_by_norm(float(first), alone, 1e-5)


def test_the_recipe_covers_what_has_to_be_shown():
    from hydra import compose, initialize_config_dir

    from tests.pipeline.running import ROOT

    overrides = ["benchmark=train_step", "experiment=llama2_7b_128k", "parallel=single"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", overrides=[*overrides, "device=cpu"]))
    cases = train_step.in_order(config)
    one = {(case.length, arm) for case, arm in cases if case.documents == "one"}
    arms = ("hybrid", "full")
    assert one == {(2**n, arm) for n in range(13, 18) for arm in arms} | {(2**18, "hybrid")}
    packed = {(case.document_mask, arm) for case, arm in cases if case.documents == "packed"}
    assert packed == {(mask, arm) for mask in (True, False) for arm in arms}
    row = train_rows.case_columns(config, *cases[0])
    assert (row["length"], row["full_layers"], row["layers"]) == (131072, 12, 32)
    assert train_rows.arm_shape(config, "hybrid").rope["rope_theta"] == 8e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["benchmark.groups=[b]"], r"groups=\['b'\]: must name some of the cases' groups a; set"),
        (["benchmark.document_mean=0.5"], "document_mean=0.5: must be at least 1"),
        (["benchmark.document_sigma=-1"], "document_sigma=-1.0: must be at least 0"),
        (["schedule.full=all"], "schedule.full='all': leaves no layer sparse"),
        (["train.deterministic=true"], r"cases\[0\]: train.deterministic=True: is not what a step"),
        ({"arms": ["both"]}, r"train_cases\[0\].arms=\['both'\]: must name some of hybrid, full"),
        ({"arms": []}, r"train_cases\[0\].arms=\[\]: must name some of hybrid, full"),
        ({"steps": 0}, r"train_cases\[0\].steps=0: must be at least 1"),
        ({"documents": "two"}, "documents='two': must be one, packed or the tokens of each"),
        ({"documents": 0}, "documents=0: must be one, packed or the tokens of each"),
        ({"documents": True}, "documents=True: must be one, packed or the tokens of each"),
        ({"length": 1}, r"train_cases\[0\]: data.seq_length=1: must be at least 2"),
        ({"recompute": "some"}, r"train_cases\[0\]: train.recompute='some': must be one of"),
        ({"mlp_tile": 8}, r"train_cases\[0\]: train.mlp_tile=8: goes with train.recompute"),
    ],
)
def test_refusals(change, message, tmp_path, capsys):
    more, change = (change, {}) if isinstance(change, list) else ([], change)
    line = refused(
        *(capsys, *CONFIG, with_cases({"length": 64} | change), *more), f"outputs={tmp_path}"
    )
    assert re.search(message, line), line

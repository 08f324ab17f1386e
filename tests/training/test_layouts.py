"""The same rows give the same losses and gradient norms on every layout."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.closeness import assert_close_by_norm
from tests.training.small_training import (
    CASES,
    parallel_section,
    rows_a_process,
    small_config,
    small_train,
    small_trainer,
)
from tests.training.worlds import run_world

STEPS = 3
# On a GPU these go through the kernels that training uses there.
KERNEL_CASES = [("per_head", 2)]
LAYOUTS = {
    "tp2": {"world": 2, "tensor": 2},
    "tp2_sp": {"world": 2, "tensor": 2, "sequence_parallel": True},
    "ulysses2": {"world": 2, "ulysses": 2},
    "zero1": {"world": 2, "zero_stage": 1},
    "zero2": {"world": 2, "zero_stage": 2},
    "zero3": {"world": 2, "zero_stage": 3},
    "tp2_ulysses2": {"world": 4, "tensor": 2, "ulysses": 2, "sequence_parallel": True},
    "tp2_zero1": {"world": 4, "tensor": 2, "zero_stage": 1},
    "tp2_zero3": {"world": 4, "tensor": 2, "sequence_parallel": True, "zero_stage": 3},
    "ulysses2_zero2": {"world": 4, "ulysses": 2, "zero_stage": 2},
}
# Products beyond these, on the case that needs most.
MORE_LAYOUTS = {
    "ulysses4_zero1": {"world": 4, "ulysses": 4},
    "ulysses2_zero3": {"world": 4, "ulysses": 2, "zero_stage": 3},
    "tp2_zero2_offload": {
        "world": 4,
        "tensor": 2,
        "sequence_parallel": True,
        "zero_stage": 2,
        "optimizer_offload": True,
    },
    "zero3_offload": {"world": 2, "zero_stage": 3, "optimizer_offload": True},
}


# Four processes on few cores are slow: every pattern, phase and kind of heads, not every pair.
FEWER_CASES = [("sink", 4), ("strided", 2), ("per_head", 4), ("per_head", 2)]


def tiled_on_gpu(patched):
    """The sparse layers by the path that needs no compiler: layouts are what is compared here."""
    import kernels.sparse_attention

    patched(kernels.sparse_attention, "FASTEST", {})


def measure(layout, cases, device="cpu", rows=4, heads=4, **changes):
    """For each case [(loss, gradient norm)] of each step and the held-out loss after them."""
    from pipeline.training import engine as engine_module

    # Otherwise ZeRO 3 would keep all of so small a model whole.
    engine_module.ZERO3_KEPT_WHOLE = 0
    if layout["world"] > 1:
        # Several groups of matrices, where one process has one.
        engine_module.GROUP_ELEMENTS = 5_000
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = {"heads": heads}
    if device == "cuda" and cases == KERNEL_CASES:
        # The kernels know no smaller heads.
        shape["head_dim"] = 64
    elif device == "cuda":
        tiled_on_gpu(setattr)
    parallel = parallel_section(**layout)
    micro = {"rows_per_step": rows, "micro_batch_rows": rows_a_process(parallel, rows)}
    train = small_train(**micro, **changes)
    found = {}
    for pattern, kv_heads in cases:
        with tempfile.TemporaryDirectory() as folder:
            config = small_config(pattern, kv_heads, **shape)
            trainer, _ = small_trainer(config, parallel, train, Path(folder), device)
            trainer.first = 0
            steps = [trainer.step(step, rows * step) for step in range(STEPS)]
            said = []
            trainer._record = said.append
            trainer.validate(STEPS)
        found[pattern, kv_heads] = [(s["loss"], s["grad_norm"]) for s in steps] + [
            (said[0]["loss"], sum(b["tokens"] for b in said[0]["by_position"]))
        ]
    return found


@pytest.fixture(scope="module")
def one_process():
    return run_world(1, measure, {"world": 1}, CASES)[0]


def assert_same(found, expected, tolerance=1e-5):
    for case, steps in expected.items():
        for step, (got, wanted) in enumerate(zip(found[case], steps, strict=True)):
            for name, mine, theirs in zip(("loss", "norm or tokens"), got, wanted, strict=True):
                assert_close_by_norm(mine, theirs, tolerance, (case, step, name))


# On a GPU, where the patterns are not what differs.
GPU_CASES = [("sink", 4), ("per_head", 2)]
SLOW_ON_GPU = ("tp2", "zero1", "zero2", "tp2_zero1", "ulysses2_zero2")
# Others hold the same parts: zero1 and zero3, tp2_zero2_offload, ulysses2_zero3.
SLOW = ("zero2", "tp2_zero1", "ulysses2_zero2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in (*LAYOUTS, *MORE_LAYOUTS)
    ],
)
def test_losses_and_gradient_norms_are_those_of_one_process(name, one_process):
    layout = (LAYOUTS | MORE_LAYOUTS)[name]
    cases = CASES if layout["world"] == 2 else FEWER_CASES
    cases = cases if name in LAYOUTS else FEWER_CASES[-1:]
    for found in run_world(layout["world"], measure, layout, cases):
        assert_same(found, {case: one_process[case] for case in cases})


def measure_recomputed(layout, cases, memory):
    return measure(layout, cases, **memory)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("tp2_ulysses2", {"recompute": "attention", "offload_activations": True, "mlp_tile": 5}),
        ("tp2_zero3", {"recompute": "full", "mlp_tile": 5}),
    ],
)
def test_recomputation_changes_nothing(name, memory, one_process):
    cases = [("per_head", 2)]
    layout = LAYOUTS[name]
    for found in run_world(layout["world"], measure_recomputed, layout, cases, memory):
        assert_same(found, {case: one_process[case] for case in cases})


TWO_PROCESSES = [name for name, layout in LAYOUTS.items() if layout["world"] == 2]


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    """What one process measures: computed by the first of pytest's workers, read by the others."""
    folder = tmp_path_factory.getbasetemp()
    # A worker's own folder lies in the one of the whole run.
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "one_gpu.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            worlds = {
                len(cases): run_world(
                    1, measure, {"world": 1}, cases, "cuda", gpu=True, timeout=300
                )
                for cases in (GPU_CASES, KERNEL_CASES)
            }
            torch.save({cases: found[0] for cases, found in worlds.items()}, path)
    return torch.load(path)


@pytest.mark.multigpu
@pytest.mark.parametrize(
    ("name", "cases"),
    [(name, GPU_CASES) for name in TWO_PROCESSES]
    + [(name, KERNEL_CASES) for name in ("tp2_sp", "ulysses2")],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}_cases",
)
def test_two_gpus_over_nccl_give_what_one_gives(name, cases, one_gpu):
    for found in run_world(2, measure, LAYOUTS[name], cases, "cuda", gpu=True, timeout=300):
        assert_same(found, one_gpu[len(cases)])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "cases"),
    [
        pytest.param(name, GPU_CASES, marks=[pytest.mark.slow] if name in SLOW_ON_GPU else [])
        for name in LAYOUTS
    ]
    + [(name, KERNEL_CASES) for name in ("tp2_sp", "ulysses2")],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}_cases",
)
def test_ranks_that_share_a_gpu_give_what_one_gives(name, cases, one_gpu):
    layout = LAYOUTS[name] | {"share_gpus": True}
    for found in run_world(layout["world"], measure, layout, cases, "cuda", gpu=True, timeout=300):
        assert_same(found, one_gpu[len(cases)])


def without_norm_sums(monkeypatched):
    """Each rank keeps the gradient of its own positions."""
    from pipeline.training import engine

    monkeypatched(engine, "_sum_partial_gradients", lambda model, layout: None)


def without_marks(monkeypatched):
    """No weight is known to be sharded, as after a model built without initialization."""
    from model.gpt import HybridGPT

    honest = HybridGPT.__init__

    def build(self, *arguments):
        honest(self, *arguments)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = False

    monkeypatched(HybridGPT, "__init__", build)


def doubled_gradients(monkeypatched):
    """What flows back through the all-to-all is multiplied by the size of its group."""
    from model import sequence_parallel

    honest = sequence_parallel.all_to_all

    def doubled(group, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * group.size())
        return honest(group, x)

    monkeypatched(sequence_parallel, "all_to_all", doubled)


def zigzag_positions(monkeypatched):
    """Positions of shards as ring attention deals them, tokens as Ulysses does."""
    from dataclasses import replace

    from pipeline.training.loader import Batch

    honest = Batch.shard

    def shard(self, rank, size):
        parts = self.positions_BS.chunk(2 * size, dim=1)
        zigzag = torch.cat([parts[rank], parts[2 * size - 1 - rank]], dim=1)
        return replace(honest(self, rank, size), positions_BS=zigzag)

    monkeypatched(Batch, "shard", shard)


def local_phase(monkeypatched):
    """Every rank takes its heads for the model's first ones."""
    from model import core_attention

    monkeypatched(core_attention, "first_kv_head", lambda *unused: 0)


def locally_counted_tokens(monkeypatched):
    """Each rank divides by its own count of valid tokens."""
    from pipeline.training.layout import Layout

    honest = Layout.sum

    def own(self, value):
        return (
            value * self.rows_size * self.ulysses_size if value.dim() == 0 else honest(self, value)
        )

    monkeypatched(Layout, "sum", own)


def measure_wrong(mistake, layout, cases):
    mistake(setattr)
    return measure(layout, cases)


@pytest.mark.parametrize(
    ("mistake", "name", "pattern"),
    [
        (without_norm_sums, "tp2_sp", "sink"),
        (without_marks, "tp2", "sink"),
        (doubled_gradients, "ulysses2", "sink"),
        (zigzag_positions, "ulysses2", "sink"),
        (local_phase, "tp2", "per_head"),
        (local_phase, "ulysses2", "per_head"),
        (locally_counted_tokens, "ulysses2", "sink"),
        (locally_counted_tokens, "zero1", "sink"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_mistake_is_seen(mistake, name, pattern, one_process):
    case = (pattern, 4)
    found = run_world(2, measure_wrong, mistake, LAYOUTS[name], [case])[0]
    with pytest.raises(AssertionError):
        assert_same(found, {case: one_process[case]})


def test_the_phase_is_no_matter_where_heads_share_it(one_process):
    """The control of the planted local phase: it is that, and nothing else, that is seen."""
    case = ("strided", 4)
    found = run_world(2, measure_wrong, local_phase, LAYOUTS["tp2"], [case])[0]
    assert_same(found, {case: one_process[case]})


def moved_losses(layout, cases):
    """For each case the positions whose loss moves when the row's second document changes."""
    import torch.distributed as dist

    from pipeline.training.loader import collate
    from tests.training.small_training import RandomRows, small_engine

    found = {}
    for pattern, kv_heads in cases:
        config = small_config(pattern, kv_heads)
        engine, groups = small_engine(config, parallel_section(**layout), small_train())
        tokens, lengths, padding = RandomRows()[1]
        changed = tokens.copy()
        first, second = int(lengths[0]), int(lengths.sum())
        changed[first + 1 : second] = (changed[first + 1 : second] + 7) % 97
        losses = []
        for row in (tokens, changed):
            batch = collate([(row, lengths, padding)], document_mask=True)
            batch = batch.shard(groups.ulysses_rank, groups.ulysses_size)
            with torch.no_grad():
                mine = engine(
                    batch.tokens_BS, batch.positions_BS, batch.cu_seqlens, batch.labels_BS
                )
            parts = [torch.empty_like(mine) for _ in range(groups.ulysses_size)]
            dist.all_gather(
                parts, mine.contiguous(), group=groups.state.get_context_parallel_group()
            )
            losses.append(torch.cat(parts, dim=1)[0])
        moved = (losses[0] != losses[1]).nonzero().flatten().tolist()
        found[pattern, kv_heads] = moved, first, second
    return found


@pytest.mark.parametrize("name", ["ulysses2", "tp2_ulysses2", "ulysses4_zero1"])
def test_a_changed_document_moves_no_other(name):
    layout = (LAYOUTS | MORE_LAYOUTS)[name]
    for found in run_world(layout["world"], moved_losses, layout, CASES):
        for moved, first, second in found.values():
            # The document spans shards, and all of its positions that predict something move.
            assert moved == list(range(first, second - 1))

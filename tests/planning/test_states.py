"""The plan's bytes of weights, gradients, optimizer states and kept tensors are the engine's."""

from dataclasses import replace

import pytest

import pipeline.training.engine as engine_module
from pipeline.planning.memory import kept_tensors, layer_tensors
from pipeline.planning.states import rank_shapes, rounded_pinned, states
from pipeline.schema import Config
from tests.training.small_training import (
    LENGTH,
    RandomRows,
    parallel_section,
    small_config,
    small_engine,
    small_train,
)
from tests.training.worlds import run_world

# Few enough for several of AdamW's groups, none of a size that two ranks divide evenly.
GROUP = 30_001
SHAPE = small_config("sink", 2)


def recipe(stage, rows_per_step, precision="bf16", world=2, **changes):
    """The whole configuration of a tiny run: one row a micro-batch."""
    offload = changes.pop("optimizer_offload", False)
    parallel = {key: changes.pop(key) for key in ("tensor", "ulysses") if key in changes}
    train = small_train(
        rows_per_step=rows_per_step, micro_batch_rows=1, precision=precision, **changes
    )
    section = parallel_section(world, zero_stage=stage, optimizer_offload=offload, **parallel)
    config = Config(parallel=section, train=train)
    config.data.seq_length = LENGTH
    return config


# ZeRO's stage and rows of a step: two ranks of a row each, or of two.
CASES = {
    "bf16 optimizer": recipe(1, 4),
    "stage 1": recipe(1, 2),
    "stage 1, offloaded": recipe(1, 2, optimizer_offload=True),
    "stage 2, accumulating": recipe(2, 4),
    "stage 2": recipe(2, 2),
    "stage 3, accumulating": recipe(3, 4),
    "stage 3": recipe(3, 2),
    "stage 1, fp32": recipe(1, 2, precision="fp32"),
}


def batch_of(config, layout):
    from pipeline.training.loader import collate

    rows = RandomRows(4, LENGTH)
    batch = collate([rows[layout.rows_rank]], config.train.document_mask)
    return batch.shard(layout.ulysses_rank, layout.ulysses_size)


def backward(engine, batch):
    losses = engine(batch.tokens_BS, batch.positions_BS, batch.cu_seqlens, batch.labels_BS)
    engine.backward(losses.float().sum())


def storages(tensors):
    """Bytes of the tensors' storages, each counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def held_bytes(config):
    """Bytes by part of a real engine before its first backward, and after the one of a step."""
    engine_module.GROUP_ELEMENTS = GROUP
    engine, layout = small_engine(SHAPE, config.parallel, config.train)
    optimizer = engine.optimizer
    masters = engine_module._masters(engine)
    inner = engine_module.inner_optimizer(engine)
    found = {
        "masters": storages(masters),
        "moments": storages(inner.state[m][key] for m in masters for key in engine_module.MOMENTS),
        "groups": [m.numel() for m in masters],
    }
    if config.parallel.zero_stage == 3:
        parts = [p.ds_tensor for p in engine.module.parameters()]
        kept = [p for p in engine.module.parameters() if p.ds_persist]
        found["weights"] = storages(parts) + sum(p.numel() * p.element_size() for p in kept)
        found["before"] = storages([optimizer.grad_partitions_flat_buffer])
    else:
        found["weights"] = storages(p.data for p in engine.module.parameters())
        found["before"] = storages(getattr(optimizer, "fp32_groups_gradients_flat", []))
    if config.parallel.optimizer_offload:
        found["copied back"] = storages(optimizer.param_buffer_of_bit16_for_cpu_offload_groups)
    steps = engine.gradient_accumulation_steps()
    for index in range(steps):
        backward(engine, batch_of(config, layout))
        if index < steps - 1:
            engine.step()
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        found["reduced"] = storages(optimizer.fp32_groups_gradients_flat)
        found["reduced"] += storages(p.grad for p in engine.module.parameters())
    elif config.parallel.optimizer_offload:
        found["reduced"] = storages(m.grad for m in masters)
    else:
        averaged = optimizer.averaged_gradients.values()
        found["reduced"] = storages(t for group in averaged for t in group)
    return found


def all_cases():
    return {name: held_bytes(config) for name, config in CASES.items()}


@pytest.fixture(scope="module")
def measured():
    return run_world(2, all_cases)


@pytest.mark.parametrize("name", CASES)
def test_states_are_what_deepspeed_holds(measured, monkeypatch, name):
    monkeypatch.setattr(engine_module, "GROUP_ELEMENTS", GROUP)
    config = CASES[name]
    plan = states(config, SHAPE)
    found = measured[0][name]
    assert len(found["groups"]) > 3
    offload = config.parallel.optimizer_offload
    masters = plan.host["masters"] if offload else plan.masters
    moments = plan.host["moments"] if offload else plan.moments
    assert (masters, moments) == (found["masters"], found["moments"])
    if offload:
        assert plan.host["weights to copy back"] == found["copied back"]
    assert plan.weights + plan.embeddings == found["weights"]
    if name in ("bf16 optimizer", "stage 3", "stage 3, accumulating"):
        assert plan.accumulators == found["before"] > 0
    planned = plan.host["fp32 gradients"] if offload else plan.step_gradients
    reduced = max(rank[name]["reduced"] for rank in measured)
    # What pads a group's last part lies in a tensor of its own: a few elements.
    assert planned <= reduced <= planned + 16 * len(found["groups"])


def tensor_parallel_shapes():
    config = recipe(1, 2, tensor=2)
    engine, _ = small_engine(SHAPE, config.parallel, config.train)
    return {name: tuple(p.shape) for name, p in engine.module.named_parameters()}


def test_parameters_of_a_tensor_parallel_rank_are_the_models():
    for found in run_world(2, tensor_parallel_shapes):
        planned = rank_shapes(SHAPE, 2)
        assert list(found.items()) == list(planned.items())


def test_kept_tensors_have_the_bytes_that_are_planned():
    changes = [
        {"recompute": "attention"},
        {"recompute": "full"},
        {"recompute": "attention", "offload_activations": True},
    ]
    (whole, _), (inputs, _), (near, host) = run_world(2, built_and_kept, changes)[0]

    def planned(change):
        config = recipe(1, 1, ulysses=2, **change)
        kept = kept_tensors(config, layer_tensors(config, SHAPE))
        return sum(size for part, size in kept.items() if part != "kept LSE")

    layers = SHAPE.num_layers
    assert whole == layers * planned(changes[0])
    assert inputs == layers * planned(changes[1])
    assert host == layers * planned(changes[2])
    # Of the newest layer alone.
    assert near == planned(changes[2])


def built_and_kept(changes):
    """(bytes on the device, on the host) after a forward, for each way to keep."""
    import torch

    from pipeline.training.engine import build_engine, build_model
    from pipeline.training.layout import Layout

    found = []
    for change in changes:
        config = recipe(1, 1, ulysses=2, **change)
        layout = Layout(config.parallel, torch.device("cpu"))
        model = build_model(config, SHAPE, layout)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        engine = build_engine(model, config.train, config.parallel, layout)
        batch = batch_of(config, layout)
        engine(batch.tokens_BS, batch.positions_BS, batch.cu_seqlens, batch.labels_BS)
        kept = engine.module.memory.kept
        found.append((kept.device_bytes, kept.host_bytes))
        kept.clear()
    return found


def test_pinned_buffers_are_powers_of_two():
    assert [rounded_pinned(n) for n in (0, 1, 2, 3, 2**30, 2**30 + 1)] == [
        0,
        1,
        2,
        4,
        2**30,
        2**31,
    ]


def test_a_step_of_several_rows_takes_more_than_one_of_one():
    one, two = (states(recipe(1, rows), SHAPE) for rows in (2, 4))
    assert two.accumulators > one.accumulators == 0
    assert two.gradients(0) == two.gradients(1) == one.gradients(1) > one.gradients(0)
    offloaded = states(recipe(1, 2, optimizer_offload=True), SHAPE)
    assert offloaded.masters == offloaded.moments == offloaded.step == 0
    assert sum(offloaded.host.values()) > one.masters + one.moments


def test_zero_divides_what_its_stage_names():
    # Large enough that ZeRO 3 keeps little whole.
    shape = replace(SHAPE, hidden_size=1024, ffn_hidden_size=4096)
    first, second, third = (states(recipe(stage, 2), shape) for stage in (1, 2, 3))
    assert first.gradients(1) > second.gradients(1) + second.accumulators > 0
    assert first.weights == second.weights > third.weights
    alone = states(recipe(1, 1, world=1), shape)
    assert alone.masters == pytest.approx(2 * first.masters, rel=1e-3)

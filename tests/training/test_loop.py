"""The step's maths against plain PyTorch, resume without a trace, and what stops a run."""

import gzip
import json
import logging
import os
import re
import signal
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from model.loss import IGNORED
from pipeline.manifest import STOPPED_BY_FILE, StageError, StageStopped
from pipeline.report_page import Section, Table
from pipeline.schema import WandbSection
from pipeline.training.checkpoint import Progress, read_weights
from pipeline.training.checkpoint_folder import newest
from pipeline.training.engine import adam_step, fragments, inner_optimizer, learning_rate
from pipeline.training.loader import collate
from pipeline.training.metrics import Metrics, PositionLosses
from pipeline.wandb_run import log_report, open_run
from tests.closeness import assert_close_by_norm
from tests.tiny import tiny_gpt, tiny_llama
from tests.training.small_training import (
    LENGTH,
    RandomRows,
    parallel_section,
    small_config,
    small_train,
    small_trainer,
    train_losses,
)

CONFIG = small_config("sink", 2)


def make_trainer(folder, zero_stage=1, offload=False, **changes):
    """(trainer, where it starts): the newest checkpoint in `folder`, or the beginning."""
    parallel = parallel_section(zero_stage=zero_stage, optimizer_offload=offload)
    values = {"lr": 1e-2, "lr_schedule": "cosine", "save_every": 2, "validate_every": 100}
    train = small_train(**(values | changes))
    trainer, start = small_trainer(CONFIG, parallel, train, folder)
    return trainer, start or Progress(0, 0)


def train_whole(folder, **changes):
    trainer, start = make_trainer(folder, **changes)
    trainer.run(start)
    return trainer


def test_steps_equal_plain_pytorch(layout, tmp_path):
    """Loss and gradient norm over steps, with accumulation and unequal valid counts."""
    trainer = train_whole(tmp_path, steps=4)
    got = train_losses(tmp_path)

    llama = tiny_gpt(CONFIG, tiny_llama(CONFIG))
    train = trainer.train
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in llama.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in llama.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=train.adam_eps,
    )
    for step in range(4):
        batches = trainer.loader.step(step * 4)
        assert batches[0].valid_tokens != batches[1].valid_tokens
        optimizer.zero_grad()
        total, count = 0, 0
        for b in batches:
            logits = llama(b.tokens_BS, b.positions_BS, b.cu_seqlens).flatten(0, 1)
            total = total + F.cross_entropy(
                logits, b.labels_BS.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            count += b.valid_tokens
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        optimizer.step()
        loss, grad_norm = got[step + 1]
        assert_close_by_norm(loss, total / count, 1e-5)
        assert_close_by_norm(grad_norm, norm, 1e-4)


def test_a_finished_run_of_fewer_steps_goes_on_as_the_longer_one(layout, tmp_path):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    whole.mkdir(), grown.mkdir()
    train_whole(whole, lr_schedule="constant", steps=6)
    train_whole(grown, lr_schedule="constant", steps=4)
    trainer, start = make_trainer(grown, lr_schedule="constant", steps=6)
    assert (start.step, start.of_steps) == (4, 4)
    trainer.run(start)
    assert train_losses(grown) == train_losses(whole)


@pytest.mark.parametrize(
    "kind",
    [
        {"precision": "fp32", "zero_stage": 1},
        {"precision": "fp32", "zero_stage": 2},
        {"precision": "bf16", "zero_stage": 1},
        {"precision": "bf16", "zero_stage": 2},
        {"precision": "bf16", "zero_stage": 2, "offload": True},
        {"precision": "fp32", "zero_stage": 3},
        {"precision": "bf16", "zero_stage": 3, "offload": True},
        {"precision": "fp32", "save_background": False},
    ],
    ids=str,
)
def test_killed_and_resumed_is_never_stopped(layout, tmp_path, kind):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    train_whole(whole, **kind)

    dying, start = make_trainer(broken, **kind)
    honest, calls = dying.step, []

    def step(*args):
        # Dies in the fourth step, half-way between two checkpoints and without a signal.
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError
        return honest(*args)

    dying.step = step
    with pytest.raises(MemoryError):
        dying.run(start)
    assert sorted(train_losses(broken)) == [1, 2, 3]

    again, start = make_trainer(broken, **kind)
    assert (start.step, start.rows_consumed) == (2, 8)
    again.run(start)
    assert train_losses(broken) == train_losses(whole)
    ends = [dict(read_weights(f)) for f in (whole, broken)]
    names = {name for name, _ in dying.engine.module.named_parameters()}
    assert ends[0].keys() == ends[1].keys() == names
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_weights_without_moments_do_not_resume_the_same(layout, tmp_path):
    """The control of the test above: it can fail."""
    train_whole(tmp_path, steps=2)
    losses = []
    for moments in (True, False):
        trainer, start = make_trainer(tmp_path, steps=4)
        for state in inner_optimizer(trainer.engine).state.values():
            if not moments:
                state["exp_avg"].zero_()
        trainer.step(2, 8)
        losses.append(trainer.step(3, 12)["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("number", "save_every", "lost"),
    [(signal.SIGTERM, 100, "3 steps"), (signal.SIGINT, 2, "1 step")],
)
def test_a_signal_is_acknowledged_and_saves_at_the_step_edge(
    layout, tmp_path, caplog, number, save_every, lost
):
    """What a second signal would cost is counted from the newest checkpoint on the disk."""
    trainer, start = make_trainer(tmp_path, save_every=save_every, save_background=False)
    honest, said = trainer.step, f"press Ctrl-C again to stop now, losing {lost}"

    def step(step, consumed):
        if step == 2:
            os.kill(os.getpid(), number)
            # While the step goes on.
            end = time.monotonic() + 10
            while not any(message.endswith(said) for message in caplog.messages):
                assert time.monotonic() < end, caplog.messages
                time.sleep(0.01)
        return honest(step, consumed)

    trainer.step = step
    with caplog.at_level(logging.INFO, "longgen.training"), pytest.raises(StageStopped) as stopped:
        trainer.run(start)
    assert stopped.value.exit_code == 128 + number
    assert sum("saving after this step" in message for message in caplog.messages) == 1
    (line,) = [m for m in caplog.messages if m.startswith("finetune: train step=2 of_steps=6 ")]
    assert re.search(r" loss=\d\.\d{4} .* tokens_per_second=\d+ eta_seconds=\d+$", line)
    (line,) = [m for m in caplog.messages if m.startswith("finetune: validation step=0 ")]
    assert re.search(r" loss=\d\.\d{4} rows=3 seconds=", line)
    assert newest(tmp_path).name == "step_000003"


def test_a_file_saves_and_stops_at_the_step_edge_and_is_gone(layout, tmp_path):
    trainer, start = make_trainer(tmp_path, save_every=100)
    honest = trainer.step

    def step(step, consumed):
        if step == 2:
            (tmp_path / "stop").touch()
        return honest(step, consumed)

    trainer.step = step
    with pytest.raises(StageStopped) as stopped:
        trainer.run(start)
    assert stopped.value.exit_code == STOPPED_BY_FILE
    assert newest(tmp_path).name == "step_000003"
    assert not (tmp_path / "stop").exists()
    # What tells it from a failure, for those who see torchrun's exit code alone.
    assert (tmp_path / "stopped").exists()
    again, start = make_trainer(tmp_path)
    again.run(start)
    assert not (tmp_path / "stopped").exists()
    assert sorted(train_losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_before_the_step(layout, tmp_path):
    trainer, _ = make_trainer(tmp_path)
    weights = dict(trainer.engine.module.named_parameters())
    norm = weights["decoder.final_layernorm.weight"]
    embedding = weights["embedding.word_embeddings.weight"].detach().clone()
    norm.data[3] = float("nan")
    with pytest.raises(StageError, match="step 1: the loss is nan; it must be finite"):
        trainer.step(0, 0)
    assert torch.equal(weights["embedding.word_embeddings.weight"], embedding)


def masters(trainer):
    parts = [part.states["master"] for part in fragments(trainer.engine)]
    return torch.cat(parts).clone()


def overflow_in(trainer, steps):
    """In these steps a finite loss has gradients that are not."""
    honest_step, honest_forward = trainer.step, trainer._forward
    at = []

    def step(step, consumed):
        at.append(step)
        return honest_step(step, consumed)

    def forward(batch):
        losses, batch = honest_forward(batch)
        if losses.requires_grad and at[-1] in steps:
            losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses, batch

    trainer.step, trainer._forward = step, forward


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_stops(layout, tmp_path, zero_stage, precision):
    """A finite loss whose backward overflows must not pass for a step."""
    trainer, _ = make_trainer(tmp_path, zero_stage=zero_stage, precision=precision)
    before = masters(trainer)
    overflow_in(trainer, {0})
    with pytest.raises(StageError, match="step 1: the gradient norm is (inf|nan); it must be"):
        trainer.step(0, 0)
    assert torch.equal(masters(trainer), before)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_is_skipped_where_asked(
    layout, tmp_path, zero_stage, precision
):
    trainer, start = make_trainer(
        tmp_path, zero_stage=zero_stage, precision=precision, non_finite="skip", steps=3
    )
    overflow_in(trainer, {1})
    seen = []
    honest = trainer.step

    def step(*arguments):
        before = masters(trainer)
        measured = honest(*arguments)
        seen.append((measured["skipped"], torch.equal(masters(trainer), before)))
        return measured

    trainer.step = step
    trainer.run(start)
    assert seen == [(None, False), ("gradient norm is inf", True), (None, False)]
    assert trainer.guard.skipped == 1
    assert adam_step(trainer.engine) == 2
    again, start = make_trainer(
        tmp_path, zero_stage=zero_stage, precision=precision, non_finite="skip", steps=4
    )
    assert start.guard["skipped"] == 1
    again.run(start)
    assert sorted(train_losses(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_spike_of_the_loss_is_skipped(layout, tmp_path, zero_stage):
    trainer, _ = make_trainer(
        tmp_path, zero_stage=zero_stage, spike_sigmas=6.0, spike_window=4, steps=9
    )
    for step in range(4):
        assert trainer.step(step, 4 * step)["skipped"] is None
    before = masters(trainer)
    honest = trainer._forward

    def spike(batch):
        losses, batch = honest(batch)
        return losses * 50, batch

    trainer._forward = spike
    assert trainer.step(4, 16)["skipped"].startswith("loss ")
    assert torch.equal(masters(trainer), before)
    trainer._forward = honest
    assert trainer.step(5, 20)["skipped"] is None
    assert not torch.equal(masters(trainer), before)


def test_one_step_is_traced_where_asked(layout, tmp_path):
    train_whole(tmp_path, steps=3, profile_step=2)
    (path,) = tmp_path.glob("*trace*")
    assert path.name == "trace_step_2.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::mm", "longgen::sparse_attention_bwd"} <= names


def test_a_step_tells_what_it_waited_for(layout, tmp_path):
    trainer, _ = make_trainer(tmp_path)
    honest = trainer.loader.step
    trainer.loader.step = lambda consumed: time.sleep(0.2) or honest(consumed)
    measured = trainer.step(0, 0)
    assert 0.2 / measured["seconds"] <= measured["data_wait"] < 1


def test_learning_rate():
    train = small_train(steps=10, warmup_steps=2, lr=1.0, min_lr_ratio=0.1, lr_schedule="cosine")
    rates = [learning_rate(train, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert (rates[5] + rates[6]) / 2 == pytest.approx(0.55)
    assert rates[9] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    train.lr_schedule = "constant"
    assert learning_rate(train, 9) == 1.0


def test_losses_by_position_are_of_the_document():
    batch = collate(RandomRows(2, LENGTH).rows[:1], document_mask=True)
    losses = batch.positions_BS.float() + 1
    buckets = PositionLosses(8, LENGTH, torch.device("cpu"))
    buckets.add(losses, batch.positions_BS, batch.labels_BS != IGNORED)
    for bucket in buckets.by_position():
        # Loss stands in for the position here, so that its mean must lie within the bucket.
        assert bucket["start"] <= bucket["loss"] < bucket["stop"]
    assert sum(b["tokens"] for b in buckets.by_position()) == batch.valid_tokens


def test_metrics_of_steps_to_be_repeated_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n{"st')
    Metrics(tmp_path, WandbSection(mode="disabled"), "test", {}, Progress(2, 8)).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def stored_history(store):
    """{step: values} of a W&B store on disk, as `wandb sync` reads it; no step may come twice.

    None where it is not written to its end: finish() does not wait for that.
    """
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = store.glob("*.wandb")
    data, history = DataStore(), {}
    if not path.stat().st_size:
        return None
    data.open_for_scan(str(path))
    while (content := data.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "exit":
            return history
        if record.WhichOneof("record_type") == "history":
            step = record.history.step.num
            assert step not in history
            items = {item.key or item.nested_key[0]: item for item in record.history.item}
            history[step] = {key: json.loads(item.value_json) for key, item in items.items()}
    return None


def test_one_offline_wandb_run_is_one_store_with_every_step_once(tmp_path, caplog):
    """After a kill beyond the last checkpoint, a resume and a report."""
    section, folder = WandbSection(mode="offline"), tmp_path / "finetune.partial"
    folder.mkdir()

    def train(start, steps):
        metrics = Metrics(folder, section, "test", {}, start)
        for step in steps:
            metrics.write({"kind": "train", "step": step, "loss": 10.0 - step, "skipped": None})
        return metrics

    first = train(None, [1, 2, 3])
    # Killed: close() writes nothing more to metrics.jsonl. The last checkpoint is that of step 2.
    first.close()
    second = train(Progress(2, 8, first.run_id), [3, 4])
    assert second.run_id == first.run_id
    second.close()
    with caplog.at_level(logging.INFO, "longgen.wandb"):
        places = (tmp_path, "test", {}, first.run_id, folder / "metrics.jsonl")
        report = open_run(section, *places)
        log_report(report, [Section("What ran", "", None, Table((), [("a", "b")], facts=True))])
    (store,) = tmp_path.glob("wandb/offline-run-*")
    assert store.name.endswith(first.run_id)
    assert f"{sys.executable} -m wandb sync {store}" in caplog.messages[-1]
    end = time.monotonic() + 30
    while (history := stored_history(store)) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    losses = {s: row["train/loss"] for s, row in history.items() if "train/loss" in row}
    assert losses == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    assert "report/what_ran_table" in history[5]
    # A step keeps the time at which it was trained.
    times = [json.loads(line)["time"] for line in (folder / "metrics.jsonl").open()]
    assert [history[step]["_timestamp"] for step in (1, 2, 3, 4)] == times

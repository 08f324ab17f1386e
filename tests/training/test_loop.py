"""The step's maths against plain PyTorch, resume without a trace, and what stops a run."""

import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F

from model.loss import IGNORED
from pipeline.manifest import StageError, StageStopped
from pipeline.schema import ParallelSection, TrainSection, WandbSection
from pipeline.training import checkpoint
from pipeline.training.engine import build_engine, learning_rate
from pipeline.training.loader import Loader, collate
from pipeline.training.loop import Trainer
from pipeline.training.metrics import Metrics, PositionLosses
from tests.tiny import tiny_config, tiny_gpt, tiny_llama
from tests.training.helpers import RandomRows

CONFIG = tiny_config(is_full=(False, True, False))
LENGTH = 48


def train_section(**changes):
    values = {
        "steps": 6,
        "rows_per_step": 4,
        "micro_batch_rows": 2,
        "lr": 1e-2,
        "precision": "fp32",
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "validate_every": 100,
        "validation_rows": 2,
        "position_bucket": 16,
        "save_every": 2,
    }
    return TrainSection(**(values | changes))


def make_trainer(layout, folder, zero_stage=1, offload=False, resume=None, **changes):
    """(trainer, where it starts); `resume` is a checkpoint to start from."""
    train = train_section(**changes)
    parallel = ParallelSection(zero_stage=zero_stage, optimizer_offload=offload)
    gpt = tiny_gpt(CONFIG, tiny_llama(CONFIG))
    if train.precision == "bf16":
        gpt.bfloat16()
    engine = build_engine(gpt, train, parallel, layout)
    loader = Loader(
        RandomRows(10, LENGTH),
        rows_per_step=train.rows_per_step,
        micro_batch_rows=train.micro_batch_rows,
        seed=1,
        document_mask=True,
    )
    start = checkpoint.load(engine, resume) if resume else None
    metrics = Metrics(folder, WandbSection(mode="disabled"), "test", {}, start)
    held_out = RandomRows(2, LENGTH, seed=9)
    trainer = Trainer(engine, layout, CONFIG, train, loader, held_out, metrics, folder)
    return trainer, start or checkpoint.Progress(0, 0)


def train_whole(layout, folder, **changes):
    trainer, start = make_trainer(layout, folder, **changes)
    trainer.run(start)
    return trainer


def train_losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in lines if r["kind"] == "train"}


def test_steps_equal_plain_pytorch(layout, tmp_path):
    """Loss and gradient norm over steps, with accumulation and unequal valid counts."""
    trainer = train_whole(layout, tmp_path, steps=4)
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
        assert loss == pytest.approx((total / count).item(), rel=1e-5)
        assert grad_norm == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        {"precision": "fp32", "zero_stage": 1},
        {"precision": "fp32", "zero_stage": 2},
        {"precision": "bf16", "zero_stage": 1},
        {"precision": "bf16", "zero_stage": 2},
        {"precision": "bf16", "zero_stage": 2, "offload": True},
    ],
    ids=str,
)
def test_killed_and_resumed_is_never_stopped(layout, tmp_path, kind):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    train_whole(layout, whole, **kind)

    dying, start = make_trainer(layout, broken, **kind)
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

    found = checkpoint.newest(broken / "checkpoints")
    again, start = make_trainer(layout, broken, resume=found, **kind)
    assert (start.step, start.rows_consumed) == (2, 8)
    again.run(start)
    assert train_losses(broken) == train_losses(whole)
    ends = [dict(checkpoint.read_weights(f)) for f in (whole, broken)]
    names = {name for name, _ in dying.engine.module.named_parameters()}
    assert ends[0].keys() == ends[1].keys() == names
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_weights_without_moments_do_not_resume_the_same(layout, tmp_path, monkeypatch):
    """The control of the test above: it can fail."""
    whole = tmp_path / "whole"
    whole.mkdir()
    train_whole(layout, whole, steps=4)
    before = train_losses(whole)
    monkeypatch.setattr("deepspeed.utils.safe_set_full_optimizer_state", lambda *a: None)
    found = whole / "checkpoints" / "step_000002"
    train_whole(layout, whole, steps=4, resume=found)
    assert train_losses(whole)[4] != before[4]


def test_sigterm_saves_at_the_step_edge(layout, tmp_path):
    trainer, start = make_trainer(layout, tmp_path, save_every=100)
    honest = trainer.step

    def step(step, consumed):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(step, consumed)

    trainer.step = step
    with pytest.raises(StageStopped) as stopped:
        trainer.run(start)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step_000003"


def test_a_loss_that_is_not_finite_stops_before_the_step(layout, tmp_path):
    trainer, _ = make_trainer(layout, tmp_path)
    weights = dict(trainer.engine.module.named_parameters())
    norm = weights["decoder.final_layernorm.weight"]
    embedding = weights["embedding.word_embeddings.weight"].detach().clone()
    norm.data[3] = float("nan")
    with pytest.raises(StageError, match="step 1: the loss is nan; it must be finite"):
        trainer.step(0, 0)
    assert torch.equal(weights["embedding.word_embeddings.weight"], embedding)


def test_a_gradient_that_is_not_finite_stops(layout, tmp_path):
    """A finite loss whose backward overflows must not pass for a step."""
    trainer, _ = make_trainer(layout, tmp_path)
    honest = trainer._forward

    def overflow(batch):
        losses, batch = honest(batch)
        losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses, batch

    trainer._forward = overflow
    with pytest.raises(StageError, match="step 1: the gradient norm is (inf|nan); it must be"):
        trainer.step(0, 0)


def test_a_full_disk_leaves_the_checkpoint_before(layout, tmp_path, monkeypatch):
    trainer = train_whole(layout, tmp_path, steps=2)
    folder = tmp_path / "checkpoints"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    with pytest.raises(StageError, match="step_000004.*No space left on device.*free space"):
        checkpoint.save(trainer.engine, folder, checkpoint.Progress(4, 16), 2)
    assert checkpoint.newest(folder).name == "step_000002"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_000002"]


def test_only_the_newest_checkpoints_are_kept(layout, tmp_path):
    train_whole(layout, tmp_path, keep_last=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_000004", "step_000006"]


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(StageError, match="holds no checkpoint; run stage=finetune"):
        next(checkpoint.read_weights(tmp_path))


def test_learning_rate():
    train = train_section(steps=10, warmup_steps=2, lr=1.0, min_lr_ratio=0.1)
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
    Metrics(tmp_path, WandbSection(mode="disabled"), "test", {}, checkpoint.Progress(2, 8)).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_wandb_run_goes_on_under_its_id(tmp_path):
    section = WandbSection(mode="offline")
    first = Metrics(tmp_path, section, "test", {}, None)
    first.write({"kind": "train", "step": 1, "loss": 2.0})
    run_id = first.run_id
    first.close()
    start = checkpoint.Progress(1, 4, run_id)
    second = Metrics(tmp_path, section, "test", {}, start)
    assert second.run_id == run_id
    second.close()

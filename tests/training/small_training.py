"""Training steps of a tiny model in whatever world the process is in."""

import json

import numpy as np
import torch

from pipeline.schema import Config, ParallelSection, TrainSection
from tests.tiny import PATTERNS, tiny_config, tiny_llama

LENGTH, ROWS = 48, 16
# (pattern, KV heads): MHA and GQA, both phases.
CASES = [(pattern, kv_heads) for pattern in PATTERNS for kv_heads in (4, 2)]


def small_train(**changes):
    values = {
        "steps": 6,
        "rows_per_step": 4,
        "micro_batch_rows": 2,
        "lr": 1e-3,
        "precision": "fp32",
        "warmup_steps": 2,
        "validation_rows": 3,
        "position_bucket": 16,
        "hang_seconds": 0,
    }
    return TrainSection(**(values | changes))


class RandomRows:
    """Rows of random tokens whose documents and padding leave shards with unequal valid counts."""

    def __init__(self, count=ROWS, length=LENGTH, vocab=97, seed=0):
        random = np.random.default_rng(seed)
        self.rows = []
        for index in range(count):
            padding = int(random.integers(3, 15)) if index % 2 else 0
            cut = int(random.integers(2, length - 20))
            lengths = np.array([cut, length - padding - cut])
            self.rows.append((random.integers(0, vocab, length), lengths, padding))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def small_config(pattern, kv_heads, **changes):
    return tiny_config(
        kv_heads=kv_heads, is_full=(False, True, False), pattern=PATTERNS[pattern], **changes
    )


def whole_weights(config):
    """The tiny llama's weights by Megatron's names."""
    from model.mapping import megatron_to_hf_names, merge

    theirs = tiny_llama(config).state_dict()
    return {
        name: merge(name, tuple(theirs[source] for source in sources), config)
        for name, sources in megatron_to_hf_names(config).items()
    }


def small_engine(config, parallel, train, device="cpu"):
    """(engine, layout) with the tiny llama's weights."""
    from pipeline.training.checkpoint import fill_masters
    from pipeline.training.engine import build_engine, build_model
    from pipeline.training.layout import Layout

    layout = Layout(parallel, torch.device(device))
    whole = Config(parallel=parallel, train=train)
    whole.data.seq_length = LENGTH
    model = build_model(whole, config, layout)
    engine = build_engine(model, train, parallel, layout)
    weights = whole_weights(config)
    fill_masters(engine, config, layout, lambda name, within: weights[name][within])
    return engine, layout


def small_trainer(config, parallel, train, folder, device="cpu", metrics=False):
    from pipeline.schema import WandbSection
    from pipeline.training.checkpoint import Checkpointer
    from pipeline.training.loader import Loader
    from pipeline.training.loop import Trainer
    from pipeline.training.metrics import Metrics

    engine, layout = small_engine(config, parallel, train, device)
    loader = Loader.of(RandomRows(), train, layout)
    checkpointer = Checkpointer(
        engine,
        config,
        layout,
        folder / "checkpoints",
        keep_last=train.keep_last,
        background=train.save_background,
    )
    start = checkpointer.load()
    record = None
    if layout.rank == 0:
        record = Metrics(folder, WandbSection(mode="disabled"), "test", {}, start)
    held_out = RandomRows(3, seed=9)
    return Trainer(
        engine, layout, config, train, loader, held_out, record, checkpointer, folder
    ), start


def train_losses(folder):
    """{step: (loss, gradient norm)} of the record in a run's folder."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in lines if r["kind"] == "train"}


def parallel_section(world=1, **changes):
    return ParallelSection(nodes=1, gpus_per_node=world, **changes)


def rows_a_process(parallel, rows=4):
    """Micro-batch rows with which a step of so many rows takes two micro-batches in any layout."""
    groups = parallel.gpus_per_node // (parallel.tensor * parallel.ulysses)
    return rows // (2 * groups)

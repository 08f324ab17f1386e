"""What a checkpoint costs: how long training stands still, how long it writes, how large it is."""

from __future__ import annotations

import shutil
import statistics
import time
from typing import Any

import numpy as np
import torch

from model.cost import parameters
from pipeline.benchmarks.train_rows import RandomRows
from pipeline.manifest import StageContext
from pipeline.schema import section_shape
from pipeline.stages.finetune import hybrid_config
from pipeline.training.layout import Layout

WARM_UP = 3


def measure(context: StageContext) -> tuple[dict[str, Any], int]:
    """(figures, this process's rank). Seconds, and bytes per parameter on disk."""
    config, folder = context.config, context.out / "checkpoints"
    layout = Layout(config.parallel, torch.device(config.device))
    from pipeline.training.checkpoint import Checkpointer, Progress, fill_masters
    from pipeline.training.engine import build_engine, build_model
    from pipeline.training.loader import Loader
    from pipeline.training.loop import Trainer

    train, shape = config.train, hybrid_config(section_shape(config.model), config)
    model = build_model(config, shape, layout)
    engine = build_engine(model, train, config.parallel, layout)
    generator = torch.Generator(layout.device).manual_seed(train.seed)

    def random_block(name: str, within: tuple[slice, ...]) -> torch.Tensor:
        size = [part.stop - part.start for part in within]
        if len(size) == 1:
            return torch.ones(size)
        return torch.randn(size, generator=generator, device=layout.device) * 0.02

    fill_masters(engine, shape, layout, random_block)
    length = config.data.seq_length
    lengths = np.array([length // 4, length - length // 4])
    rows = RandomRows(lengths, shape.vocab_size, train.seed)
    loader = Loader.of(rows, train, layout)
    savers = {
        background: Checkpointer(engine, shape, layout, folder, keep_last=1, background=background)
        for background in (True, False)
    }
    trainer = Trainer(engine, layout, shape, train, loader, rows, None, savers[True], context.out)
    done = 0

    def step() -> float:
        nonlocal done
        seconds = trainer.step(done, done * train.rows_per_step)["seconds"]
        done += 1
        return seconds

    for _ in range(WARM_UP):
        step()
    quiet = statistics.median(step() for _ in range(config.benchmark.repeats))
    blocked, written, beside = [], [], []
    for _ in range(config.benchmark.repeats):
        blocked.append(savers[True].save(Progress(done, done)))
        # Steps while the writer is at work, and only those.
        while savers[True].writing:
            beside.append(step())
        written.append(savers[True].wait())
    started = time.perf_counter()
    savers[False].save(Progress(done, done))
    foreground = time.perf_counter() - started
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    started = time.perf_counter()
    savers[True].load()
    loaded = time.perf_counter() - started
    for saver in savers.values():
        saver.close()
    if layout.rank == 0:
        shutil.rmtree(folder)
    figures = {
        "parameters": parameters(shape),
        "bytes_per_parameter": round(size / parameters(shape), 4),
        "seconds_blocked_first_save": round(blocked[0], 3),
        "seconds_blocked": round(statistics.median(blocked[1:]), 3),
        "seconds_in_the_background": round(statistics.median(written), 2),
        "seconds_blocked_without_background": round(foreground, 2),
        "seconds_to_load_and_verify": round(loaded, 2),
        "seconds_a_step": round(quiet, 3),
        "seconds_a_step_while_writing": round(statistics.median(beside), 3) if beside else None,
    }
    return figures, layout.rank

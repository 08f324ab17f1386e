"""Checkpoints by parameter name: fp32 masters, both Adam moments, and where the run stood.

A checkpoint holds whole tensors under Megatron's names (TP=1 form), whatever the layout of the run
that wrote it. The weights that train are the masters cast to the training dtype, so they are not
stored twice. Learning rate and data order are functions of the step.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.mapping import megatron_shape, megatron_to_hf_names
from model.sharding import fragment_blocks, shard_blocks
from pipeline.manifest import NO_SPACE, StageError
from pipeline.training.checkpoint_folder import (
    PARTIAL,
    checkpoint_path,
    checkpoints,
    newest,
    newest_whole,
    prune,
    publish,
    remove_leftovers,
    step_of,
)
from pipeline.training.engine import (
    MOMENTS,
    adam_step,
    fragments,
    refresh_weights,
    set_adam_step,
)
from pipeline.training.layout import Layout
from pipeline.training.shard_store import (
    Piece,
    on_lead,
    read_pieces,
    stored_shapes,
    write_pieces,
    write_synced,
)

log = logging.getLogger("longgen.training")

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps, rows consumed (the loader's state), its W&B id.

    guard: StepGuard's state, from which the steps to skip follow. of_steps: train.steps of the run
    that saved; 0: not known.
    """

    step: int
    rows_consumed: int
    wandb_id: str | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    of_steps: int = 0


def engine_pieces(
    engine, config: ModelConfig, layout: Layout, kinds: tuple[str, ...] = ("master", *MOMENTS)
) -> Iterator[Piece]:
    """What this rank's optimizer holds, as blocks of the whole tensors "KIND.NAME".

    The tensors are views: what is written into them is in the optimizer.
    """
    rank, size = layout.get_tensor_model_parallel_rank(), layout.tensor_size
    for part in fragments(engine):
        whole = megatron_shape(part.name, config)
        blocks = shard_blocks(part.name, config, rank, size)
        for block in fragment_blocks(blocks, part.start, part.stop):
            count = torch.Size(block.sizes).numel()
            for kind in kinds:
                view = part.states[kind][block.start : block.start + count].view(block.sizes)
                yield Piece(f"{kind}.{part.name}", whole, block.offsets, view)


def _generators(layout: Layout) -> dict[str, torch.Generator]:
    found = {"rng.cpu": torch.default_generator}
    if layout.device.type == "cuda":
        found["rng.cuda"] = torch.cuda.default_generators[layout.device.index]
    return found


@torch.no_grad()
def fill_masters(
    engine,
    config: ModelConfig,
    layout: Layout,
    read: Callable[[str, tuple[slice, ...]], torch.Tensor],
) -> None:
    """Set masters and weights from `read(name, within)`, which gives blocks of whole tensors."""
    for part in fragments(engine):
        # What pads the vocabulary is in no block.
        part.states["master"].zero_()
    for piece in engine_pieces(engine, config, layout, kinds=("master",)):
        bounds = zip(piece.offsets, piece.tensor.shape, strict=True)
        within = tuple(slice(first, first + count) for first, count in bounds)
        piece.tensor.copy_(read(piece.name.removeprefix("master."), within))
    refresh_weights(engine)


class Checkpointer:
    """Saves and restores an engine's state in `folder`; every rank calls every method."""

    def __init__(
        self,
        engine,
        config: ModelConfig,
        layout: Layout,
        folder: Path,
        *,
        keep_last: int,
        background: bool,
    ) -> None:
        """`background`: copy to host memory and write while training goes on."""
        self.engine, self.config, self.layout = engine, config, layout
        self.folder, self.keep_last, self.background = folder, keep_last, background
        self._pending: Future[float] | None = None
        # Of an earlier run, what this one did not continue from.
        self._passed_over: list[Path] = []
        # Host copies of the optimizer's storages, kept from save to save: pinning takes long.
        self._host: dict[int, torch.Tensor] = {}

    def save(self, progress: Progress) -> float:
        """Write `folder`/step_NNNNNN; seconds for which training stood still.

        A save that is still being written is waited for.

        Raises:
            StageError: where this save (or, in the background, the one before) failed; what was
                written of it is removed.
        """
        started = time.perf_counter()
        self.wait()
        pieces = list(self._to_write())
        stored = {**asdict(progress), "adam_step": adam_step(self.engine)}
        if self.background:
            pieces = self._copied(pieces)
            # A thread that ends with the save: one that stayed would keep its OpenMP threads, and
            # on few cores those of training would then sleep at every barrier.
            writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._pending = writer.submit(self._write, pieces, stored)
            writer.shutdown(wait=False)
        else:
            self._write(pieces, stored)
        return time.perf_counter() - started

    @property
    def writing(self) -> bool:
        """Whether a save is being written in the background."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed; wait() then says how."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> float:
        """Seconds that the writing of the last save took; returns when it is whole.

        Raises:
            StageError: where it failed.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending else 0.0

    def close(self) -> None:
        """Finish what is being written."""
        self.wait()

    def load(self) -> Progress | None:
        """Restore the newest whole checkpoint; None where there is none at all.

        Raises:
            StageError: where there are checkpoints, and none is whole.
        """
        found = newest_whole(self.folder, self.layout.host_group)
        if self.layout.rank == 0:
            remove_leftovers(self.folder)
        if found is None:
            return None
        self._passed_over = [p for p in checkpoints(self.folder) if step_of(p) > step_of(found)]
        return self._restore(found)

    @torch.no_grad()
    def _restore(self, checkpoint: Path) -> Progress:
        progress, updates = _read_progress(checkpoint)
        for part in fragments(self.engine):
            for state in part.states.values():
                state.zero_()
        pieces = list(engine_pieces(self.engine, self.config, self.layout))
        generators = _generators(self.layout)
        shapes = stored_shapes(checkpoint)
        states = {
            name: torch.empty(shapes[name], dtype=torch.uint8)
            for name in generators.keys() & shapes.keys()
        }
        pieces += [Piece(name, tuple(s.shape), (0,), s) for name, s in states.items()]
        read_pieces(checkpoint, pieces, self.layout.host_group)
        for name, state in states.items():
            generators[name].set_state(state)
        set_adam_step(self.engine, updates)
        refresh_weights(self.engine)
        return progress

    def _to_write(self) -> Iterator[Piece]:
        first = self.layout.get_tensor_model_parallel_rank() == 0
        for piece in engine_pieces(self.engine, self.config, self.layout):
            # Every tensor-parallel rank holds the norms.
            if first or "norm" not in piece.name:
                yield piece
        if self.layout.rank == 0:
            for name, generator in _generators(self.layout).items():
                state = generator.get_state()
                yield Piece(name, tuple(state.shape), (0,), state)

    def _copied(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces of host copies: storage by storage, few large transfers."""
        on_gpu = self.layout.device.type == "cuda"
        host = {}
        copied = []
        for piece in pieces:
            storage = piece.tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in host:
                source = piece.tensor.new_empty(0).set_(storage)
                kept = self._host.get(key)
                if kept is None or kept.shape != source.shape or kept.dtype != source.dtype:
                    kept = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu)
                host[key] = kept.copy_(source, non_blocking=True)
            copy = host[key].as_strided(
                piece.tensor.shape, piece.tensor.stride(), piece.tensor.storage_offset()
            )
            copied.append(Piece(piece.name, piece.whole, piece.offsets, copy))
        self._host = host
        if on_gpu:
            torch.cuda.synchronize()
        return copied

    def _write(self, pieces: list[Piece], stored: dict[str, Any]) -> float:
        """Write, check, rename; seconds. Runs on all ranks at once, in their writer threads."""
        started = time.perf_counter()
        group, lead = self.layout.checkpoint_group, self.layout.rank == 0
        final = checkpoint_path(self.folder, stored["step"])
        partial = final.with_name(final.name + PARTIAL)
        text = json.dumps(stored) + "\n"
        try:
            on_lead(group, lambda: _begin(partial, text))
            written = write_pieces(partial, pieces, group)
            on_lead(group, lambda: publish(partial, final, written))
        except (OSError, StageError) as error:
            # By every rank, since each may see a folder of its own.
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, StageError):
                raise
            raise self._not_written(final, pieces, error) from error
        if lead:
            prune(final, self.keep_last, self._passed_over)
        self._passed_over = []
        seconds = time.perf_counter() - started
        if lead:
            log.info("finetune: saved checkpoint=%s seconds=%.1f", final.name, seconds)
        return seconds

    def _not_written(self, final: Path, pieces: list[Piece], error: OSError) -> StageError:
        """What to raise on every rank; every rank calls it, since it counts their bytes."""
        size = torch.tensor(sum(p.tensor.nbytes for p in pieces))
        dist.all_reduce(size, group=self.layout.checkpoint_group)
        kept = ", ".join(path.name for path in checkpoints(self.folder)) or "no checkpoint"
        if error.errno not in NO_SPACE:
            return StageError(
                f"{final}: the checkpoint could not be written ({error.strerror or error}); {kept} "
                "kept; mend the disk or set outputs to another one, and run the same command again"
            )
        free = shutil.disk_usage(self.folder).free
        return StageError(
            f"{final}: no space for the checkpoint ({error.strerror}): it takes "
            f"{size.item() / 1e9:.3f} GB, {free / 1e9:.3f} GB are free there; {kept} kept. Free "
            f"space for train.keep_last + 1 = {self.keep_last + 1} checkpoints, lower "
            "train.keep_last, or move the outputs folder to another disk, and run the same command "
            "again"
        )


def _begin(folder: Path, progress: str) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_synced(folder / PROGRESS, progress)


def _read_progress(checkpoint: Path) -> tuple[Progress, float]:
    """(Where the run stood, updates that AdamW had made)."""
    try:
        stored = json.loads((checkpoint / PROGRESS).read_text())
        updates = float(stored.pop("adam_step"))
        return Progress(**stored), updates
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise StageError(
            f"{checkpoint / PROGRESS}: is not of a checkpoint that this program wrote ({error!r}); "
            "take another checkpoint"
        ) from error


def read_weights(finetune: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Megatron name, fp32 master) of the newest whole checkpoint, one tensor in memory each."""
    checkpoint = newest(finetune)
    for key, shape in stored_shapes(checkpoint).items():
        kind, _, name = key.partition(".")
        if kind == "master":
            whole = torch.empty(shape)
            read_pieces(checkpoint, [Piece(key, shape, (0,) * len(shape), whole)])
            yield name, whole


def weights_reader(
    finetune: Path, config: ModelConfig, group: dist.ProcessGroup | None = None
) -> Callable[[str, tuple[slice, ...]], torch.Tensor]:
    """What `fill_masters` reads another run's newest weights with, block by block.

    Args:
        group: ranks that all call it, and share the search for the newest.

    Raises:
        StageError: where they are another model's.
    """
    checkpoint = newest(finetune, group)
    shapes = stored_shapes(checkpoint)
    for name in megatron_to_hf_names(config):
        stored, wanted = shapes.get(f"master.{name}"), megatron_shape(name, config)
        if stored != wanted:
            raise StageError(
                f"{checkpoint}: {name} is {stored or 'absent'}; must be of shape {wanted}: it is "
                "another model's; set train.weights_from to a run of this one"
            )

    def read(name: str, within: tuple[slice, ...]) -> torch.Tensor:
        block = torch.empty([part.stop - part.start for part in within])
        offsets = tuple(part.start for part in within)
        key = f"master.{name}"
        read_pieces(checkpoint, [Piece(key, shapes[key], offsets, block)])
        return block

    return read

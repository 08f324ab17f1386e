"""Checkpoints by parameter name: fp32 masters, both Adam moments, and where the run stood.

A checkpoint is a folder `step_NNNNNN`, written under another name and renamed when whole; `latest`
names the newest. It holds whole tensors under Megatron's names (TP=1 form), whatever the layout of
the run that wrote it. The weights that train are the masters cast to the training dtype, so they
are not stored twice. Learning rate and data order are functions of the step.
"""

from __future__ import annotations

import json
import logging
import os
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
from pipeline.manifest import StageError
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
    faults,
    read_pieces,
    stored_shapes,
    write_pieces,
)

log = logging.getLogger("longgen.training")

LATEST = "latest"
PROGRESS = "progress.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps, rows consumed (the loader's state), its W&B id.

    guard: StepGuard's state, from which the steps to skip follow.
    """

    step: int
    rows_consumed: int
    wandb_id: str | None = None
    guard: dict[str, Any] = field(default_factory=dict)


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
        found = _newest_whole(self.folder, self.layout.host_group)
        if self.layout.rank == 0:
            for left in self.folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return None if found is None else self._restore(found)

    @torch.no_grad()
    def _restore(self, checkpoint: Path) -> Progress:
        stored = json.loads((checkpoint / PROGRESS).read_text())
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
        try:
            read_pieces(checkpoint, pieces, self.layout.host_group)
        except ValueError as error:
            raise StageError(
                f"{checkpoint}: {error}; choose variant=NAME for another model, or force=true"
            ) from error
        for name, state in states.items():
            generators[name].set_state(state)
        set_adam_step(self.engine, stored.pop("adam_step"))
        refresh_weights(self.engine)
        return Progress(**stored)

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
        final = self.folder / f"step_{stored['step']:06d}"
        partial = final.with_name(final.name + PARTIAL)
        text = json.dumps(stored) + "\n"
        _together(group, lead, lambda: _begin(partial, text), final)
        try:
            write_pieces(partial, pieces, group)
        except OSError as error:
            if lead:
                shutil.rmtree(partial, ignore_errors=True)
            raise _not_written(final, str(error)) from error
        _together(group, lead, lambda: self._publish(partial, final), final)
        seconds = time.perf_counter() - started
        if lead:
            log.info("finetune: saved checkpoint=%s seconds=%.1f", final.name, seconds)
        return seconds

    def _publish(self, partial: Path, final: Path) -> None:
        try:
            if final.exists():
                _remove(final)
            partial.rename(final)
            pointer = self.folder / f"{LATEST}{PARTIAL}"
            _write_synced(pointer, final.name + "\n")
            pointer.replace(self.folder / LATEST)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in sorted(self.folder.glob("step_??????"))[: -self.keep_last]:
            _remove(old)


def _together(
    group: dist.ProcessGroup, lead: bool, action: Callable[[], None], final: Path
) -> None:
    """The lead acts; where it could not, every rank raises the same StageError."""
    failure: list[str | None] = [None]
    if lead:
        try:
            action()
        except OSError as error:
            failure[0] = str(error)
    dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise _not_written(final, failure[0])


def _not_written(final: Path, cause: str) -> StageError:
    return StageError(
        f"{final}: the checkpoint could not be written ({cause}); free space or set outputs to "
        "another disk, and run the same command again"
    )


def _begin(folder: Path, progress: str) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _write_synced(folder / PROGRESS, progress)


def _remove(checkpoint: Path) -> None:
    """Under another name first: what is half removed is no checkpoint."""
    going = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in the order to try them: the one that `latest` names, then older ones."""
    found = sorted((path for path in folder.glob("step_??????")), reverse=True)
    pointer = folder / LATEST
    newest = pointer.read_text().strip() if pointer.exists() else ""
    return [path for path in found if path.name <= newest or not (folder / newest).is_dir()]


def saved_step(finetune: Path) -> int:
    """The step of the newest checkpoint of a finetune folder; 0 where there is none."""
    found = candidates(finetune / "checkpoints")
    return int(found[0].name.removeprefix("step_")) if found else 0


def _say_damaged(checkpoint: Path, wrong: list[str]) -> None:
    log.warning(
        "%s is damaged and left out (%s%s); trying the one before",
        checkpoint,
        wrong[0],
        f" and {len(wrong) - 1} more" if len(wrong) > 1 else "",
    )


def _all_damaged(folder: Path) -> StageError:
    return StageError(
        f"{folder}: every checkpoint is damaged; restore one from a copy, or start again with "
        "force=true"
    )


def _newest_whole(folder: Path, group: dist.ProcessGroup | None) -> Path | None:
    """The newest checkpoint in `folder` whose checksums match; None where there is none at all.

    The ranks of `group`, which all call it, share the reading; without a group one process reads.

    Raises:
        StageError: where there are checkpoints, and none is whole.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    names = [[path.name for path in candidates(folder)]]
    if group is not None:
        dist.broadcast_object_list(names, src=0, group=group)
    for name in names[0]:
        found = [list(faults(folder / name, rank, size))]
        if group is not None:
            mine, found = found[0], [[]] * size
            dist.all_gather_object(found, mine, group=group)
        wrong = [fault for each in found for fault in each]
        if not wrong:
            return folder / name
        _say_damaged(folder / name, wrong)
    if names[0]:
        raise _all_damaged(folder)
    return None


def newest(finetune: Path, group: dist.ProcessGroup | None = None) -> Path:
    """The newest whole checkpoint of a finetune folder, for readers alone.

    Args:
        group: ranks that all call it, and share the reading.

    Raises:
        StageError: where there is none.
    """
    found = _newest_whole(finetune / "checkpoints", group)
    if found is None:
        raise StageError(f"{finetune}: holds no checkpoint; run stage=finetune first")
    return found


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

"""Tensors that many ranks hold in blocks, to a folder of torch.distributed.checkpoint and back.

The folder knows whole tensors only: what is written by one division into blocks is read by any
other. Checksums of all files lie beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pipeline.manifest import StageError

CHECKSUMS = "checksums.json"
# Written, and their checksums taken, at the same time.
FILES_A_RANK = 4
# What torch.distributed.checkpoint pickles its index with; nothing else is unpickled.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "uint8"},
    "pathlib": {"PosixPath", "Path"},
    "pathlib._local": {"PosixPath", "Path"},
}


@dataclass(frozen=True)
class Piece:
    """A block of the tensor `name` of shape `whole`: `tensor` lies at `offsets` of it."""

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def key(self) -> str:
        """Its name in a state dict of pieces."""
        return f"{self.name} {self.offsets}"

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it lies, as torch.distributed.checkpoint says it."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn} {tuple(index.offset)}"


class _SavePlanner(DefaultSavePlanner):
    """Writes this rank's pieces; the state dict is {Piece.key: piece}."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(piece.name, torch.Size(piece.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=piece.chunk,
                    properties=TensorProperties(dtype=piece.tensor.dtype),
                    size=torch.Size(piece.whole),
                ),
            )
            for piece in self.state_dict.values()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[_key(index)].tensor


class _LoadPlanner(DefaultLoadPlanner):
    """Fills this rank's pieces of what `folder` holds; the state dict is {Piece.key: piece}."""

    def __init__(self, folder: Path) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.folder = folder

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for piece in self.state_dict.values():
            stored = self.metadata.state_dict_metadata.get(piece.name)
            if stored is None or stored.size != torch.Size(piece.whole):
                raise StageError(
                    f"{self.folder}: {piece.name} is "
                    f"{'absent' if stored is None else tuple(stored.size)}; must be of shape "
                    f"{piece.whole}: it is another model's; choose variant=NAME for this one, or "
                    "force=true"
                )
            chunks.setdefault(piece.name, []).append(piece.chunk)
        items = []
        for name, wanted in chunks.items():
            stored = self.metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, stored, wanted)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[_key(index)].tensor


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads the index without running what a pickle may ask for."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            files = {stored.relative_path for stored in metadata.storage_data.values()}
            outside = [name for name in files if Path(name).name != name]
            if outside:
                raise ValueError(f"names a file outside the checkpoint, {outside[0]!r}")
        # Whatever a file that is no such pickle makes of the unpickler.
        except Exception as error:
            raise StageError(
                f"{self.path}/.metadata: is not the index of a checkpoint that this program wrote "
                f"({error}); take another checkpoint, of a source that you trust"
            ) from error
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Writer(FileSystemWriter):
    """Writes a rank's files in threads, and fails where one of them fails.

    FileSystemWriter's own threads print what they raise, and the save goes on without their files.
    """

    def _write_data(self, planner, file_queue) -> torch.futures.Future:
        threads, self.thread_count = self.thread_count, 1
        with ThreadPoolExecutor(threads) as pool:
            write = super()._write_data
            parts = [pool.submit(write, planner, file_queue) for _ in range(threads)]
        results = torch.futures.Future()
        results.set_result([result for part in parts for result in _done(part).value()])
        return results


def _done(part):
    """A thread's result; of a failed write the operating system's error, not what followed it."""
    try:
        return part.result()
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None


def on_lead(group: dist.ProcessGroup, action: Callable[[], None]) -> None:
    """Let rank 0 of the group act; where it fails, raise the same error on every rank.

    Raises:
        OSError, StageError: as rank 0 did.
    """
    failure: list[Exception | None] = [None]
    if group.rank() == 0:
        try:
            action()
        except (OSError, StageError) as error:
            failure[0] = error
    dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise failure[0]


def write_pieces(folder: Path, pieces: list[Piece], group: dist.ProcessGroup) -> list[str]:
    """Write all ranks' pieces, and checksums of all that the folder then holds.

    Every rank of `group` (gloo) calls it.

    Returns:
        The names of the files of all ranks.

    Raises:
        OSError: on every rank, where one of them could not write.
    """
    try:
        dcp.save(
            {piece.key: piece for piece in pieces},
            # Nothing to copy ahead: the pieces are in host memory, or few.
            storage_writer=_Writer(folder, thread_count=FILES_A_RANK, per_thread_copy_ahead=0),
            planner=_SavePlanner(),
            process_group=group,
        )
    except dcp.api.CheckpointException as error:
        rank, cause = _first_failure(error)
        raise OSError(getattr(cause, "errno", None), f"rank {rank}: {_words(cause)}") from error
    # torch.distributed.checkpoint names a rank's files by it; the others are the first rank's.
    patterns = [f"__{group.rank()}_*"] + ["[!_]*"] * (group.rank() == 0)
    try:
        mine = _checksums([path for pattern in patterns for path in folder.glob(pattern)])
    except OSError as error:
        mine = error
    everyones: list[dict[str, str] | OSError] = [{}] * group.size()
    dist.all_gather_object(everyones, mine, group=group)
    for found in everyones:
        if isinstance(found, OSError):
            raise found
    sums = {name: value for found in everyones for name, value in found.items()}
    text = json.dumps(sums, indent=2, sort_keys=True) + "\n"
    on_lead(group, lambda: write_synced(folder / CHECKSUMS, text))
    return [*sums, CHECKSUMS]


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _first_failure(error: dcp.api.CheckpointException) -> tuple[int, BaseException]:
    """A rank and what happened there; Ctrl-C is raised again as itself."""
    for cause, _ in error.failures.values():
        if isinstance(cause, KeyboardInterrupt):
            raise cause
    # Each rank's failure comes with its traceback; the first says what happened.
    rank, (cause, _) = next(iter(error.failures.items()))
    return rank, cause


def _words(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or repr(error)).splitlines()[0]


def read_pieces(folder: Path, pieces: list[Piece], group: dist.ProcessGroup | None = None) -> None:
    """Fill the pieces' tensors; every rank of `group` calls it, or one process alone.

    Raises:
        StageError: where a tensor is absent or of another shape, or the files cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # Reading by one process alone is intended here.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(
                {piece.key: piece for piece in pieces},
                storage_reader=_Reader(folder),
                planner=_LoadPlanner(folder),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.api.CheckpointException as error:
        _, cause = _first_failure(error)
        if isinstance(cause, StageError):
            raise cause from None
        raise StageError(f"{folder}: cannot be read: {_words(cause)}") from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a folder holds.

    Raises:
        StageError: where its index is not one that write_pieces wrote.
    """
    found = _Reader(folder).read_metadata().state_dict_metadata
    return {name: tuple(stored.size) for name, stored in found.items()}


def faults(folder: Path, rank: int = 0, size: int = 1) -> Iterator[str]:
    """What is wrong with the files of this rank's share of the folder: absent, cut or altered."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        mine = sorted(sums.items())[rank::size]
    except (OSError, ValueError, AttributeError) as error:
        yield f"{CHECKSUMS}: {error}"
        return

    def fault(item: tuple[str, str]) -> str | None:
        name, expected = item
        try:
            same = _checksum(folder / name) == expected
        except FileNotFoundError:
            return f"{name}: absent"
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None if same else f"{name}: its checksum is another"

    with ThreadPoolExecutor(FILES_A_RANK) as pool:
        yield from filter(None, pool.map(fault, mine))


def _checksums(paths: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor(FILES_A_RANK) as pool:
        return dict(zip((path.name for path in paths), pool.map(_checksum, paths), strict=True))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

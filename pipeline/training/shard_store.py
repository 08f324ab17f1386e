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
from collections.abc import Iterator
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
    """Fills this rank's pieces; the state dict is {Piece.key: piece}."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for piece in self.state_dict.values():
            stored = self.metadata.state_dict_metadata.get(piece.name)
            if stored is None or stored.size != torch.Size(piece.whole):
                raise ValueError(
                    f"{piece.name}: {'absent' if stored is None else tuple(stored.size)} in the "
                    f"checkpoint; must be of shape {piece.whole}; it is another model's"
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
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def write_pieces(folder: Path, pieces: list[Piece], group: dist.ProcessGroup) -> None:
    """Write all ranks' pieces, and checksums of all that the folder then holds.

    Every rank of `group` (gloo) calls it.

    Raises:
        OSError: on every rank, where one of them could not write.
    """
    try:
        dcp.save(
            {piece.key: piece for piece in pieces},
            storage_writer=FileSystemWriter(folder, thread_count=FILES_A_RANK),
            planner=_SavePlanner(),
            process_group=group,
        )
    except dcp.api.CheckpointException as error:
        rank, words = _first_failure(error)
        raise OSError(f"rank {rank}: {words}") from error
    # torch.distributed.checkpoint names a rank's files by it; the others are the first rank's.
    patterns = [f"__{group.rank()}_*"] + ["[!_]*"] * (group.rank() == 0)
    mine = _checksums([path for pattern in patterns for path in folder.glob(pattern)])
    everyones: list[dict[str, str]] = [{}] * group.size()
    dist.all_gather_object(everyones, mine, group=group)
    if group.rank() == 0:
        sums = {name: value for found in everyones for name, value in found.items()}
        with (folder / CHECKSUMS).open("w") as file:
            file.write(json.dumps(sums, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _first_failure(error: dcp.api.CheckpointException) -> tuple[int, str]:
    """A rank and the line that says what happened there; Ctrl-C is raised again as itself."""
    for cause, _ in error.failures.values():
        if isinstance(cause, KeyboardInterrupt):
            raise cause
    # Each rank's failure comes with its traceback; the first says what happened.
    rank, (cause, _) = next(iter(error.failures.items()))
    return rank, (str(cause) or repr(cause)).splitlines()[0]


def read_pieces(folder: Path, pieces: list[Piece], group: dist.ProcessGroup | None = None) -> None:
    """Fill the pieces' tensors; every rank of `group` calls it, or one process alone.

    Raises:
        ValueError: where a tensor is absent or of another shape.
    """
    try:
        with warnings.catch_warnings():
            # Reading by one process alone is intended here.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(
                {piece.key: piece for piece in pieces},
                storage_reader=_Reader(folder),
                planner=_LoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.api.CheckpointException as error:
        raise ValueError(_first_failure(error)[1]) from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a folder holds."""
    found = _Reader(folder).read_metadata().state_dict_metadata
    return {name: tuple(stored.size) for name, stored in found.items()}


def faults(folder: Path, rank: int = 0, size: int = 1) -> Iterator[str]:
    """What is wrong with the files of this rank's share of the folder: absent, cut or altered."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, json.JSONDecodeError) as error:
        yield f"{CHECKSUMS}: {error}"
        return
    mine = sorted(sums)[rank::size]
    found = _checksums([folder / name for name in mine if (folder / name).is_file()])
    for name in mine:
        if name not in found:
            yield f"{name}: absent"
        elif found[name] != sums[name]:
            yield f"{name}: its checksum is another"


def _checksums(paths: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor(FILES_A_RANK) as pool:
        return dict(zip((path.name for path in paths), pool.map(_checksum, paths), strict=True))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Folders of named tensors in safetensors files: read lazily, written in shards of bounded size.

A folder written here holds PREFIX-00001.safetensors, ... and an index in Hugging Face's form that
says which file holds which tensor. Hugging Face's own folders are read as well.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

INDEX = "weights.index.json"
HF_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 1024**3
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message names the file and the remedy."""


class WeightFolder:
    """The tensors of a folder by name; a tensor is read from its file when asked for.

    Args:
        folder: holds safetensors files, with an index or without.
        allow_pickle: where there are no safetensors files, read pickled ones, with torch.load's
            weights_only=True.

    Raises:
        WeightsError: on a folder without weights, with pickled ones only, a file that cannot be
            read or is missing, or a tensor that lies in two files.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, _SafetensorsFile | _PickledFile] | None = None
        for path in _weight_files(folder, allow_pickle):
            for name in self._opened(path).names():
                if name in self._file_of:
                    raise WeightsError(
                        f"{folder}: tensor {name} lies in {self._file_of[name].name} and in "
                        f"{path.name}; remove the file that does not belong there"
                    )
                self._file_of[name] = path

    def __iter__(self) -> Iterator[str]:
        """Names, file by file."""
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        if name not in self._file_of:
            raise WeightsError(
                f"{self.folder}: no tensor {name}; it holds {len(self)} tensors such as "
                f"{', '.join(list(self)[:3])}; check that it is the right folder"
            )
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`, without reading its values."""
        return self._opened(self.file_of(name)).shape(name)

    def dtype(self, name: str) -> str:
        """How tensor `name` is stored, in safetensors' terms, such as "BF16"."""
        return self._opened(self.file_of(name)).dtype(name)

    def nbytes(self, name: str) -> int:
        """Bytes of tensor `name`, which is of one of DTYPES."""
        dtypes = {told: dtype for dtype, told in DTYPES.items()}
        return prod(self.shape(name)) * dtypes[self.dtype(name)].itemsize

    def read(self, name: str, within: tuple[slice, ...] = ()) -> torch.Tensor:
        """Tensor `name`, or what is `within` it, on the CPU, in the dtype that it is stored in.

        Only what is asked for is read from the file, and nothing of it stays in memory.

        Args:
            within: slices of step 1 of the first dimensions.

        Raises:
            WeightsError: on a dtype that is not of DTYPES, or a file that was cut meanwhile.
        """
        return self._opened(self.file_of(name)).read(name, within)

    def _opened(self, path: Path) -> _SafetensorsFile | _PickledFile:
        """The opened file: one at a time, so that a large model passes through little RAM."""
        if self._open is None or self._open[0] != path:
            self._open = None
            pickled = path.suffix != ".safetensors"
            self._open = (path, _PickledFile(path) if pickled else _SafetensorsFile(path))
        return self._open[1]


def read_weight(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a folder, read lazily. To read many, keep a `WeightFolder`."""
    return WeightFolder(folder).read(name)


def iterate_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor of a folder, in the order of its files, one in memory each."""
    weights = WeightFolder(folder)
    for name in weights:
        yield name, weights.read(name)


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    index: str = INDEX,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Write named tensors as they come, at most one shard of them in memory, and their index.

    Args:
        index: its name; HF_INDEX makes a folder that transformers loads.
        shard_bytes: a shard is written before it would exceed this; a larger tensor is one alone.

    Returns:
        {"tensors", "parameters", "bytes", "shards"}

    Raises:
        WeightsError: where a file cannot be written, as on a full disk.
    """
    prefix = index.split(".")[0]
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    counts = {"tensors": 0, "parameters": 0, "bytes": 0, "shards": 0}
    held = 0

    def flush() -> None:
        counts["shards"] += 1
        file = f"{prefix}-{counts['shards']:05d}.safetensors"
        with _writing(folder / file):
            save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        counts["tensors"] += 1
        counts["parameters"] += tensor.numel()
        counts["bytes"] += tensor.nbytes
    if shard:
        flush()
    content = {"metadata": {"total_size": counts["bytes"]}, "weight_map": weight_map}
    with _writing(folder / index):
        (folder / index).write_text(json.dumps(content, indent=2) + "\n")
    return counts


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file and the remedy where writing fails, as on a full disk."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: cannot be written ({error}); free space on that disk or set outputs to "
            "another"
        ) from error


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files to read: of several sets of weights in a folder, the one that transformers reads.

    Of file names that transformers does not look for, all safetensors files, else pickled ones.
    """
    known = [INDEX, "model.safetensors", HF_INDEX]
    known += ["pytorch_model.bin", "pytorch_model.bin.index.json"] if allow_pickle else []
    for path in (folder / name for name in known):
        if path.is_file():
            return _indexed_files(path) if path.suffix == ".json" else [path]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    pickled = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    pickled = [path for path in pickled if path.name != "training_args.bin"]
    if pickled and not allow_pickle:
        raise WeightsError(
            f"{folder}: weights are pickled ({', '.join(path.name for path in pickled[:4])}); "
            "pickles can run code: fetch the model's safetensors, or set model.allow_pickle=true "
            "to read them with weights_only"
        )
    if not pickled:
        raise WeightsError(
            f"{folder}: no *.safetensors file; fetch the model again with stage=fetch force=true, "
            "or set model.source to a folder that holds its weights"
        )
    return pickled


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index}: not an index of files of tensors ({error!r}); fetch the model again"
        ) from error
    # What lies elsewhere is in no hash of the folder's files: its changes would go unseen.
    outside = [name for name in names if name in ("", "..") or Path(str(name)).name != name]
    if outside:
        raise WeightsError(
            f"{index}: names {', '.join(map(repr, outside[:4]))}: must be names of files in that "
            "folder; move the files there and correct the index"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{index}: names {', '.join(missing[:4])}, which the folder lacks; fetch the model "
            "again"
        )
    return [index.parent / name for name in names]


class _SafetensorsFile:
    """A safetensors file, of which byte ranges are read.

    Not through safetensors' mapping of the file: of a column slice that reads every page of the
    tensor from the disk, and mapped pages count as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # It checks that header and size of the file fit.
            with safe_open(path, framework="pt"):
                pass
            self._file = path.open("rb", buffering=0)
            # Open as long as this object: else its end would warn of a file left open.
            weakref.finalize(self, self._file.close)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path}: truncated or unreadable ({error}); fetch the model again"
            ) from error
        length = int.from_bytes(self._file.read(8), "little")
        entries = json.loads(self._file.read(length))
        # By name, which is how safetensors lays out tensors of one dtype.
        self._entries = {name: entries[name] for name in sorted(entries) if name != "__metadata__"}
        self._data = 8 + length

    def names(self) -> Iterable[str]:
        return self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        return self._entries[name]["dtype"]

    def read(self, name: str, within: tuple[slice, ...]) -> torch.Tensor:
        shape, stored = self.shape(name), self.dtype(name)
        dtype = next((dtype for dtype, told in DTYPES.items() if told == stored), None)
        if dtype is None:
            raise WeightsError(
                f"{self.path}: {name} is stored as {stored}; must be one of "
                f"{', '.join(DTYPES.values())}; fetch the model's weights without quantisation"
            )
        within += (slice(None),) * (len(shape) - len(within))
        bounds = [range(size)[part] for size, part in zip(shape, within, strict=True)]
        if any(bound.step != 1 for bound in bounds):
            raise ValueError(f"{name}: within={within}: every step must be 1")
        tensor = torch.empty([len(bound) for bound in bounds], dtype=dtype)
        target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        at = self._data + self._entries[name]["data_offsets"][0]
        done = 0
        for first, count in _runs(shape, bounds):
            done = self._fill(target, done, at + first * dtype.itemsize, count * dtype.itemsize)
        return tensor

    def _fill(self, target: memoryview, done: int, at: int, count: int) -> int:
        """Read `count` bytes from `at` of the file to `done` of the target; where that ends."""
        end = done + count
        while done < end:
            # One call reads at most 2 GiB.
            found = os.preadv(self._file.fileno(), [target[done:end]], at)
            if not found:
                raise WeightsError(
                    f"{self.path}: ends at byte {at}, within a tensor; fetch the model again"
                )
            done, at = done + found, at + found
        return end


class _PickledFile:
    """The tensors of a pickled file."""

    def __init__(self, path: Path) -> None:
        self._tensors = _unpickle(path)

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return DTYPES.get(self._tensors[name].dtype, str(self._tensors[name].dtype))

    def read(self, name: str, within: tuple[slice, ...]) -> torch.Tensor:
        return self._tensors[name][within]


def _runs(shape: tuple[int, ...], bounds: list[range]) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of each run that a block is in the flattened tensor."""
    # Dimensions that are taken whole make one run with the next one outside them.
    inner = len(shape) - 1
    while inner > 0 and len(bounds[inner]) == shape[inner]:
        inner -= 1
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    count = prod(len(bound) for bound in bounds[inner:])
    first = tuple(bound.start for bound in bounds[inner:])
    for outer in itertools.product(*bounds[:inner]):
        yield sum(i * stride for i, stride in zip(outer + first, strides, strict=True)), count


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # On damaged bytes torch's unpickler fails with whatever its reading of them runs into.
    except Exception as error:
        raise WeightsError(
            f"{path}: not readable with weights_only: it is damaged or holds more than tensors "
            f"({shorten(repr(error), 200)}); fetch the model's safetensors instead"
        ) from error
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise WeightsError(
            f"{path}: holds a {type(content).__name__} that is not one of tensors by name; fetch "
            "the model's safetensors instead"
        )
    return content

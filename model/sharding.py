"""Where a rank's part of each Megatron parameter lies in the whole tensor (TP=1 form).

Tensor parallelism gives a rank a shard, which is a few blocks of whole rows of itself; ZeRO gives
it a fragment, a run of elements of the flattened shard. Both are told as blocks of the whole, in
which checkpoints are written and read, so that neither decides how a checkpoint looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .config import ModelConfig
from .mapping import EMBEDDING, OUTPUT, MappingError, megatron_shape


@dataclass(frozen=True)
class Block:
    """`sizes` elements from `offsets` of the whole, which lie in the part from `start` on.

    `start` counts elements of the flattened part (shard or fragment), where the block is one run.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


def padded_vocab(vocab_size: int, size: int) -> int:
    """Rows of the embedding under tensor parallelism: the next multiple of `size`."""
    return -(-vocab_size // size) * size


def check_tensor_parallel(config: ModelConfig, size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model.

    Raises:
        MappingError: where KV heads or the ffn size are no multiple of `size`.
    """
    for field, value in (
        ("KV heads", config.num_kv_heads),
        ("ffn_hidden_size", config.ffn_hidden_size),
    ):
        if size < 1 or value % size:
            legal = [r for r in range(1, value + 1) if value % r == 0][:12]
            raise MappingError(
                f"tensor parallel size {size}: {field} ({value}) must be a multiple of it, such as "
                f"{legal}; set parallel.tensor"
            )


def shard_shape(name: str, config: ModelConfig, size: int) -> tuple[int, ...]:
    """Shape of the parameter on each of `size` tensor-parallel ranks."""
    shape = megatron_shape(name, config)
    if "norm" in name:
        return shape
    if name in (EMBEDDING, OUTPUT):
        return (padded_vocab(config.vocab_size, size) // size, *shape[1:])
    if _splits_columns(name):
        return (shape[0], shape[1] // size)
    return (shape[0] // size, *shape[1:])


def shard_blocks(name: str, config: ModelConfig, rank: int, size: int) -> list[Block]:
    """The blocks that tensor-parallel rank `rank` of `size` holds of the parameter.

    linear_qkv: the rank's KV groups. linear_fc1: [gate_r; up_r]. linear_proj and linear_fc2: the
    rank's columns. Embedding and output: the rank's rows, without those beyond the vocabulary.
    Norms: whole.

    Raises:
        MappingError: on an unknown name, a size that does not divide the model or a rank outside
            it.
    """
    check_tensor_parallel(config, size)
    if not 0 <= rank < size:
        raise MappingError(f"tensor parallel rank {rank}: must be from 0 to {size - 1}")
    whole, shard = megatron_shape(name, config), shard_shape(name, config, size)
    if "norm" in name:
        return [Block((0,), whole, 0)]
    if _splits_columns(name):
        return [Block((0, rank * shard[1]), shard, 0)]
    if "linear_fc1" in name:
        rows, width = shard[0] // 2, shard[1]
        return [
            Block((half * whole[0] // 2 + rank * rows, 0), (rows, width), half * rows * width)
            for half in range(2)
        ]
    first = rank * shard[0]
    rows = min(shard[0], max(0, whole[0] - first))
    return [Block((first, 0), (rows, shard[1]), 0)] if rows else []


def fragment_blocks(blocks: list[Block], start: int, stop: int) -> list[Block]:
    """What elements `start` to `stop` of the flattened shard hold of its blocks.

    A run of elements that begins or ends within a row makes up to three blocks: the rest of the
    first row, whole rows, the beginning of the last one. Their `start` counts from the fragment's
    first element.
    """
    found = []
    for block in blocks:
        at = max(start, block.start)
        end = min(stop, block.start + prod(block.sizes))
        width = block.sizes[-1]
        while at < end:
            row, column = divmod(at - block.start, width)
            whole_rows = (end - at) // width
            if len(block.sizes) == 1 or column or not whole_rows:
                sizes = (min(width - column, end - at),)
                sizes = sizes if len(block.sizes) == 1 else (1, *sizes)
            else:
                sizes = (whole_rows, width)
            inner = (column,) if len(block.sizes) == 1 else (row, column)
            offsets = tuple(a + b for a, b in zip(block.offsets, inner, strict=True))
            found.append(Block(offsets, sizes, at - start))
            at += prod(sizes)
    return found


def _splits_columns(name: str) -> bool:
    return "linear_proj" in name or "linear_fc2" in name

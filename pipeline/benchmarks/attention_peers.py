"""Who is measured: this project's kernels, and whatever else a user could pick, on the same mask.

Shapes: T packed tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels import dense
from kernels.pattern import Pattern
from kernels.reference import reference_attention
from pipeline.schema import PeerSetting

# The choice of sparse_attention's own, and its GPU backends by name.
OURS = ("longgen", "longgen_triton", "longgen_hopper")
FLEX = {"flex_triton": "TRITON", "flex_flash": "FLASH"}
DENSE = tuple(f"dense_{name}" for name in dense.BY_NAME)
SPARSE = (*OURS, "reference", *FLEX, "fa4_window")
ATTENTION = (*SPARSE, *DENSE)
# Of a mask, so many (query, key) pairs are looked at together.
MASK_ELEMENTS = 2**24
# Each setting and each mask is a compilation of its own; past the limit torch runs uncompiled.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Attention:
    """attend(q, k, v) -> out over `pattern`, differentiable.

    heads_first: takes and gives [1, N, T, H], made beforehand, in place of [T, N, H].
    """

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    pattern: Pattern
    heads_first: bool = False


def _candidates(
    pattern: Pattern, bounds: Sequence[int], rows: range, k_block: int, head: int, total: int
) -> np.ndarray:
    """Blocks of keys of which these queries of the packed row may see something."""
    found = [np.empty(0, np.int64)]
    for start, stop in pairwise(bounds):
        first, last = max(rows.start, start), min(rows.stop, stop)
        if first < last:
            ranges = pattern.key_ranges(first - start, last - start, head, total)
            for a, b in ranges.runs:
                found.append(np.arange((start + a) // k_block, (start + b - 1) // k_block + 1))
            if ranges.strided is not None:
                keys = start + np.arange(*ranges.strided[:3]) * pattern.block
                inside = np.append(np.arange(0, pattern.block, k_block), pattern.block - 1)
                found.append(((keys[:, None] + inside) // k_block).ravel())
    blocks = np.unique(np.concatenate(found))
    return blocks[blocks * k_block < bounds[-1]]


# The settings of a peer share their masks; a new case needs others.
@lru_cache(maxsize=4)
def block_mask(
    pattern: Pattern,
    bounds: tuple[int, ...],
    heads: int,
    kv_heads: int,
    q_block: int,
    k_block: int,
    device: torch.device,
) -> BlockMask:
    """The pattern as FlexAttention's mask: exact token by token, blocks seen whole marked as full.

    Looks at the blocks of Pattern.key_ranges only, by Pattern.visible, so that no mask of T x T is
    made and nothing compiled.
    """
    tokens, ratio = bounds[-1], heads // kv_heads
    lengths = torch.tensor(bounds).diff()
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    start_T = torch.tensor(bounds[:-1]).repeat_interleave(lengths).to(device)

    def see_one(b, h, q, k):
        return pattern.visible(q, k, h // ratio, kv_heads)

    def see_packed(b, h, q, k):
        seen = pattern.visible(q - start_T[q], k - start_T[k], h // ratio, kv_heads)
        return seen & (document_T[q] == document_T[k])

    see = see_one if len(bounds) == 2 else see_packed
    rows, columns = -(-tokens // q_block), -(-tokens // k_block)
    masks = heads if pattern.heads_differ else 1
    some = torch.zeros(masks, rows, columns, dtype=torch.bool, device=device)
    whole = torch.zeros_like(some)
    in_q, in_k = torch.arange(q_block, device=device), torch.arange(k_block, device=device)
    for head in range(0, masks, ratio):
        found = [
            _candidates(
                *(pattern, bounds, range(row * q_block, (row + 1) * q_block)),
                *(k_block, head // ratio, kv_heads),
            )
            for row in range(rows)
        ]
        widest = max(len(blocks) for blocks in found)
        together = max(1, MASK_ELEMENTS // (widest * q_block * k_block))
        for first in range(0, rows, together):
            part = found[first : first + together]
            padded = np.stack([np.pad(x, (0, widest - len(x)), constant_values=-1) for x in part])
            block = torch.from_numpy(padded).to(device)
            row = torch.arange(first, first + len(part), device=device)
            q = (row[:, None] * q_block + in_q)[:, None, :, None]
            k = (block[..., None] * k_block + in_k)[:, :, None, :]
            inside = (q < tokens) & (k < tokens) & (block >= 0)[:, :, None, None]
            q, k = q.clamp(max=tokens - 1), k.clamp(0, tokens - 1)
            seen = see(0, head, q, k) & inside
            at, column = (block >= 0).nonzero(as_tuple=True)
            place = row[at], block[at, column]
            for table, values in ((some, seen.any((2, 3))), (whole, seen.all(3).all(2))):
                table[head][place] = values[at, column]
        some[head : head + ratio] = some[head].clone()
        whole[head : head + ratio] = whole[head].clone()

    def in_order(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = table.int().argsort(dim=-1, descending=True, stable=True)
        return table.sum(-1, dtype=torch.int32)[None], order.int()[None]

    return BlockMask.from_kv_blocks(
        *in_order(some & ~whole),
        *in_order(whole),
        BLOCK_SIZE=(q_block, k_block),
        mask_mod=see,
        seq_lengths=(tokens, tokens),
    )


def _flex(
    backend: str,
    setting: PeerSetting,
    pattern: Pattern,
    bounds: Sequence[int],
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> Attention:
    mask = block_mask(
        pattern, tuple(bounds), heads, kv_heads, setting.q_block, setting.k_block, device
    )
    attend = flex_attention
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        # Else a compiled backward gives its saved tensors away and cannot be run again.
        torch._functorch.config.donated_buffer = False
        attend = torch.compile(flex_attention, dynamic=False)
    options = {"BACKEND": FLEX[backend], **setting.options}

    def run(q, k, v):
        return attend(
            q, k, v, block_mask=mask, enable_gqa=heads != kv_heads, kernel_options=options
        )

    return Attention(run, pattern, heads_first=True)


def _flash_attn_4_window(pattern: Pattern, bounds: Sequence[int]) -> Attention:
    """A pattern of its own: the window alone."""
    interface = import_module("flash_attn.cute.interface")
    if len(bounds) > 2:
        raise ValueError("fa4_window is measured on one document only")

    def run(q, k, v):
        window = pattern.window - 1, 0
        out, _ = interface.flash_attn_func(
            q[None], k[None], v[None], causal=True, window_size=window
        )
        return out[0]

    return Attention(run, Pattern(sink_tokens=0, window=pattern.window))


def attention(
    backend: str,
    setting: PeerSetting | None,
    pattern: Pattern,
    bounds: Sequence[int],
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> Attention:
    """The contender of this name, ready to be called.

    Raises:
        ImportError, ValueError, ...: where it cannot run here; the message says why.
    """
    if backend in FLEX:
        found = PeerSetting(peer=backend) if setting is None else setting
        return _flex(backend, found, pattern, bounds, heads, kv_heads, device)
    if backend == "fa4_window":
        return _flash_attn_4_window(pattern, bounds)
    if backend in DENSE:
        name = backend.removeprefix("dense_")
        return Attention(
            lambda q, k, v: dense.dense_attention(q, k, v, bounds, backend=name), pattern
        )
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    if backend == "reference":
        return Attention(
            lambda q, k, v: reference_attention(q, k, v, pattern, cu_seqlens)[0].to(q.dtype),
            pattern,
        )
    from kernels.sparse_attention import sparse_attention

    ours = backend.removeprefix("longgen").removeprefix("_")
    options = {"backend": ours} if ours else {}
    return Attention(
        lambda q, k, v: sparse_attention(q, k, v, pattern, cu_seqlens, **options), pattern
    )

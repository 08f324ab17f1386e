"""Decoding: one new token over a cache's slots, as a share of what a copy reaches beside it.

Shapes: B rows, N query heads, G KV heads, P heads whose positions differ, S slots, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from kernels.pattern import Pattern
from pipeline.benchmarks.stopwatch import Stopwatch

DECODE = ("longgen_decode", "sdpa_decode", "copy")
# The caches that take turns are so many times the GPU's L2 together, and at least two.
TIMES_L2 = 8
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Caches:
    """Caches of the same shape that hold other values, and a new token for each row."""

    q_BLNH: torch.Tensor
    k_BGSH: list[torch.Tensor]
    v_BGSH: list[torch.Tensor]
    pattern: Pattern
    q_positions_BL: torch.Tensor
    k_positions_BPS: torch.Tensor
    has_empty_slots: bool

    @property
    def bytes(self) -> int:
        """Of one cache's keys and values: what a call has to read."""
        return 2 * self.k_BGSH[0].nbytes


def slot_positions(pattern: Pattern, length: int, kv_heads: int) -> torch.Tensor:
    """Positions [P, S] of what a cache holds for the query at length - 1, -1 where a head has less.

    The new token's own key is among them.
    """
    heads = kv_heads if pattern.heads_differ else 1
    own = torch.tensor([length - 1])
    rows = [torch.cat([pattern.live(length - 1, head, kv_heads), own]) for head in range(heads)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def make_caches(
    pattern: Pattern,
    length: int,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Caches:
    """Random normal keys and values in the slots that are live at this length."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    positions_PS = slot_positions(pattern, length, kv_heads)
    shape = batch, kv_heads, positions_PS.shape[1], head_dim
    count = 2
    if device.type == "cuda":
        size = 2 * random(*shape).nbytes
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        count = max(count, -(-TIMES_L2 * l2 // size))
    return Caches(
        random(batch, 1, heads, head_dim),
        [random(*shape) for _ in range(count)],
        [random(*shape) for _ in range(count)],
        pattern,
        torch.full((batch, 1), length - 1, dtype=torch.int32, device=device),
        positions_PS.to(device, torch.int32).expand(batch, -1, -1).contiguous(),
        bool((positions_PS < 0).any()),
    )


def _ours(caches: Caches, number: int) -> torch.Tensor:
    from kernels.decode import decode_attention

    k, v = caches.k_BGSH[number], caches.v_BGSH[number]
    positions = () if caches.pattern.is_full else (caches.q_positions_BL, caches.k_positions_BPS)
    return decode_attention(caches.q_BLNH, k, v, caches.pattern, *positions)[0]


def _sdpa(caches: Caches, number: int) -> torch.Tensor:
    if caches.has_empty_slots:
        raise ValueError("sdpa_decode sees every slot; here some are empty")
    k, v = caches.k_BGSH[number], caches.v_BGSH[number]
    q_BNLH = caches.q_BLNH.transpose(1, 2)
    gqa = q_BNLH.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q_BNLH, k, v, enable_gqa=gqa).transpose(1, 2)


def _copy(caches: Caches, spare: torch.Tensor, number: int) -> torch.Tensor:
    spare.copy_(caches.k_BGSH[number])
    return spare


def _in_turn(call: Callable[[int], torch.Tensor], count: int, device: torch.device) -> Call:
    """One call per cache; on a GPU as a CUDA graph, as a server would, lest the host be timed."""

    def each() -> torch.Tensor:
        for number in range(count):
            out = call(number)
        return out

    if device.type != "cuda":
        return each
    each()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = each()
    return lambda: (graph.replay(), out)[1]


def measure_decode(
    caches: Caches, backends: list[str], watch: Stopwatch, tolerance: float
) -> dict[str, dict[str, object]]:
    """Of each backend: ms (a list), error against another, gb_per_s and share_of_copy, or reason.

    Bytes are the keys and values that a call has to read; of the copy, those read and written. What
    differs by more than `tolerance` is not timed.
    """
    device, count = caches.q_BLNH.device, len(caches.k_BGSH)
    spare = torch.empty_like(caches.k_BGSH[0])
    attend = {
        "longgen_decode": partial(_ours, caches),
        "sdpa_decode": partial(_sdpa, caches),
        "copy": partial(_copy, caches, spare),
    }
    found: dict[str, dict[str, object]] = {name: {} for name in backends}
    outs, calls = {}, {}
    for name in backends:
        try:
            outs[name] = attend[name](0).float()
            calls[name] = _in_turn(attend[name], count, device)
        except Exception as error:
            found[name]["reason"] = f"{type(error).__name__}: {error}"
    for name in set(outs) - {"copy"}:
        others = [other for other in outs if other not in ("copy", name)]
        if others:
            wanted = outs[others[0]]
            error = ((outs[name] - wanted).norm() / wanted.norm()).item()
            found[name] |= {"error": error, "checked_against": others[0]}
            # NaN is above no tolerance and below none.
            if not error <= tolerance:
                found[name]["reason"] = f"differs from {others[0]} by {error:.1e}"
                calls.pop(name, None)
    rates = {}
    for name, times in watch.rounds(calls).items():
        if isinstance(times, Exception):
            found[name]["reason"] = f"{type(times).__name__}: {times}"
            continue
        found[name]["ms"] = [time / count for time in times]
        moved = 2 * spare.nbytes if name == "copy" else caches.bytes
        rates[name] = moved / sorted(found[name]["ms"])[len(times) // 2] / 1e6
        found[name]["gb_per_s"] = rates[name]
    for name in rates.keys() - {"copy"}:
        if "copy" in rates:
            found[name]["share_of_copy"] = rates[name] / rates["copy"]
    return found

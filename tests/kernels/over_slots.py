"""Queries over a cache's slots by the definition, and random cases, for test_decode and test_chunk.

Shapes: B rows, L new tokens, N query heads, G KV heads, P heads whose positions differ, S slots,
H head dim.
"""

from dataclasses import replace

import torch

from kernels.pattern import Pattern
from tests.closeness import assert_close_by_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRST, TOTAL = 1, 5
PATTERNS = {
    "full": Pattern.full(),
    "sinks_window": Pattern(sink_tokens=5, window=37, block=16),
    "no_sinks": Pattern(sink_tokens=0, window=11, block=4),
    "strided": Pattern(sink_tokens=3, window=19, block=8, stride=4),
    "per_head": Pattern(sink_tokens=3, window=19, block=6, stride=5, phase="per_head"),
}
# Each makes of an honest call (pattern, place of the shard) one with an error of one.
PLANTS = {
    "window-1": lambda p, first: (replace(p, window=p.window - 1), first),
    "window+1": lambda p, first: (replace(p, window=p.window + 1), first),
    "sinks-1": lambda p, first: (replace(p, sink_tokens=p.sink_tokens - 1), first),
    "sinks+1": lambda p, first: (replace(p, sink_tokens=p.sink_tokens + 1), first),
    "stride+1": lambda p, first: (replace(p, stride=p.stride + 1), first),
    "block+1": lambda p, first: (replace(p, block=p.block + 1), first),
    "shared phase": lambda p, first: (replace(p, phase="shared"), first),
    "next head's phase": lambda p, first: (p, first + 1),
}


def attention_over_slots(
    q_BLNH, k_BGSH, v_BGSH, pattern, q_positions_BL, k_positions_BPS, first=FIRST, total=TOTAL
):
    """out [B, L, N, H] and LSE [B, L, N] in float64; zeros and -inf for queries that see no key."""
    q, k, v = (x.double() for x in (q_BLNH, k_BGSH, v_BGSH))
    heads, kv_heads = q.shape[2], k.shape[1]
    ratio = heads // kv_heads
    k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    k_positions = k_positions_BPS.expand(-1, kv_heads, -1).repeat_interleave(ratio, 1)[:, :, None]
    q_positions = q_positions_BL[:, None, :, None]
    kv_head = first + torch.arange(heads, device=q.device).view(1, -1, 1, 1) // ratio
    seen = pattern.visible(q_positions, k_positions, kv_head, total)
    seen = seen & (k_positions >= 0) & (q_positions >= 0)
    scores = (q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None]) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


def tensors(batch, new_tokens, heads, kv_heads, slots, head_dim, dtype=torch.float32, seed=0):
    """Random q [B, L, N, H], k and v [B, G, S, H]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, new_tokens, heads, head_dim)] + [(batch, kv_heads, slots, head_dim)] * 2
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def assert_close(found, expected, tolerance=2e-6):
    """Both out and LSE; exact where a query sees nothing."""
    (out, lse), (wanted, wanted_lse) = found, expected
    assert lse.dtype == torch.float32
    blind = wanted_lse.isinf()
    assert torch.equal(lse.isinf(), blind)
    assert not out[blind].any()
    assert_close_by_norm(out, wanted, tolerance, "out")
    assert_close_by_norm(lse[~blind], wanted_lse[~blind], tolerance, "LSE")

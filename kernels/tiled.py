"""Sparse attention in plain PyTorch, tile by tile: the CPU path, right on every device.

Work and memory follow the pattern's pairs: for each tile of queries only the keys of
`Pattern.key_ranges` are gathered.
Shapes: T packed tokens, N query heads, G KV heads, R = N / G, H head dim, Q queries and K keys of a
tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .call import Call

QUERY_TILE = 128


def supports(q_TNH: torch.Tensor, call: Call) -> None:
    """Every call can run here."""


def _tiles(call: Call, kv_heads: int) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """(KV heads, queries, key indices, mask [Q, K]) of each tile; indices into the packed row."""
    pattern, total = call.pattern, call.total_kv_heads
    groups = [slice(h, h + 1) for h in range(kv_heads)]
    for group in groups if pattern.heads_differ else [slice(0, kv_heads)]:
        head = call.first_kv_head + group.start
        for start, stop in zip(call.bounds[:-1], call.bounds[1:], strict=True):
            for q0 in range(0, stop - start, QUERY_TILE):
                q1 = min(q0 + QUERY_TILE, stop - start)
                keys = pattern.key_ranges(q0, q1, head, total).positions()
                keys = torch.from_numpy(keys)
                mask = pattern.visible(torch.arange(q0, q1)[:, None], keys[None], head, total)
                yield group, slice(start + q0, start + q1), keys + start, mask


def _group_queries(x_TNH: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[Q, N, H] -> [G, R * Q, H] in float32, so that K and V are never repeated."""
    queries, heads, head_dim = x_TNH.shape
    x = x_TNH.float().view(queries, kv_heads, heads // kv_heads, head_dim)
    return x.permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)


def _ungroup_queries(x: torch.Tensor, queries: int) -> torch.Tensor:
    """[G, R * Q, H] -> [Q, N, H]."""
    kv_heads, _, head_dim = x.shape
    x = x.view(kv_heads, -1, queries, head_dim).permute(2, 0, 1, 3)
    return x.reshape(queries, -1, head_dim)


def forward(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, N, H], LSE [N, T] float32): FlashAttention's recurrences (arXiv 2205.14135)."""
    kv_heads = k_TGH.shape[1]
    ratio = q_TNH.shape[1] // kv_heads
    out = q_TNH.new_empty(q_TNH.shape)
    lse = q_TNH.new_empty(q_TNH.shape[1], q_TNH.shape[0], dtype=torch.float32)
    for group, rows, keys, mask in _tiles(call, kv_heads):
        heads = slice(group.start * ratio, group.stop * ratio)
        width = group.stop - group.start
        keys, mask = keys.to(q_TNH.device), mask.to(q_TNH.device)
        q = _group_queries(q_TNH[rows, heads], width)
        k = k_TGH[keys, group].float().transpose(0, 1)
        v = v_TGH[keys, group].float().transpose(0, 1)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(call.scale)
        scores.masked_fill_(~mask.repeat(ratio, 1), float("-inf"))
        row_lse = scores.logsumexp(-1)
        p = scores.sub_(row_lse[..., None]).exp_()
        queries = rows.stop - rows.start
        out[rows, heads] = _ungroup_queries(torch.bmm(p, v), queries).to(out.dtype)
        lse[heads, rows] = row_lse.view(-1, queries)
    return out, lse


def backward(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    d_out_TNH: torch.Tensor,
    d_lse_NT: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [T, N, H], dk [T, G, H], dv [T, G, H])."""
    kv_heads = k_TGH.shape[1]
    ratio = q_TNH.shape[1] // kv_heads
    dq = q_TNH.new_empty(q_TNH.shape)
    dk = torch.zeros(k_TGH.shape, dtype=torch.float32, device=k_TGH.device)
    dv = torch.zeros_like(dk)
    delta = (d_out_TNH.float() * out_TNH.float()).sum(-1).T
    if d_lse_NT is not None:
        delta = delta - d_lse_NT
    for group, rows, keys, mask in _tiles(call, kv_heads):
        heads = slice(group.start * ratio, group.stop * ratio)
        width = group.stop - group.start
        keys, mask = keys.to(q_TNH.device), mask.to(q_TNH.device)
        q = _group_queries(q_TNH[rows, heads], width)
        d_out = _group_queries(d_out_TNH[rows, heads], width)
        k = k_TGH[keys, group].float().transpose(0, 1)
        v = v_TGH[keys, group].float().transpose(0, 1)
        p = torch.bmm(q, k.transpose(1, 2)).mul_(call.scale)
        p.sub_(lse_NT[heads, rows].reshape(width, -1, 1)).exp_()
        p.masked_fill_(~mask.repeat(ratio, 1), 0)
        ds = torch.bmm(d_out, v.transpose(1, 2))
        ds.sub_(delta[heads, rows].reshape(width, -1, 1)).mul_(p).mul_(call.scale)
        queries = rows.stop - rows.start
        dq[rows, heads] = _ungroup_queries(torch.bmm(ds, k), queries).to(dq.dtype)
        dk[:, group].index_add_(0, keys, torch.bmm(ds.transpose(1, 2), q).transpose(0, 1))
        dv[:, group].index_add_(0, keys, torch.bmm(p.transpose(1, 2), d_out).transpose(0, 1))
    return dq, dk.to(k_TGH.dtype), dv.to(v_TGH.dtype)

"""What went in and what came out, as plain numbers for audit.json, the report and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.mix import Choice, Pool
from data_prep.pack import Plan
from data_prep.sources import Skips

_FIRST_EDGE = 64


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents and tokens by length: buckets [start, stop) in tokens, doubling from 64."""
    if not len(lengths):
        return []
    edges = [0, _FIRST_EDGE]
    while edges[-1] <= lengths.max():
        edges.append(2 * edges[-1])
    documents, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths)
    return [
        {"start": start, "stop": stop, "documents": int(n), "tokens": int(t)}
        for start, stop, n, t in zip(edges[:-1], edges[1:], documents, tokens, strict=True)
    ]


@dataclass(frozen=True)
class LeftOut:
    """Documents that training does not see, by reason: boolean [documents] each."""

    held_out: np.ndarray
    copies_of_held_out: np.ndarray
    repeated: np.ndarray
    contaminated: np.ndarray
    of_other_length: np.ndarray


def source_row(
    pool: Pool,
    left_out: LeftOut,
    kept: np.ndarray,
    choice: Choice,
    share: int | None,
    skips: Skips,
) -> dict[str, Any]:
    """One source's line of the table: documents and tokens before and after mixing.

    `kept`, boolean [documents], is what length upsampling keeps of the others than `left_out`;
    `share` the token budget. A document that is left out for several reasons counts for each.
    """
    reasons = vars(left_out)
    dropped = ~np.logical_or.reduce([kept, *reasons.values()])
    return {
        "source": pool.name,
        "skipped": dict(skips.counts),
        "first_skipped": skips.first,
        "read": _sums(pool.lengths),
        **{reason: _sums(pool.lengths[mask]) for reason, mask in reasons.items()},
        "dropped_by_upsampling": _sums(pool.lengths[dropped]),
        "train": {
            **_sums(choice.lengths),
            "distinct_documents": len(np.unique(choice.documents)),
            "cut_tokens": int(pool.lengths[choice.documents[-1]] - choice.lengths[-1]),
        },
        "epochs": round(choice.epochs, 4),
        "share_tokens": share,
        "histogram_read": length_histogram(pool.lengths),
        "histogram_train": length_histogram(choice.lengths),
    }


def packing_row(plan: Plan) -> dict[str, Any]:
    """Rows, tokens, fill rate (tokens over all places), and pieces by length of one packed file.

    Of a split document the first piece alone begins with <bos>.
    """
    tokens = int(plan.length.sum())
    pieces = np.bincount(plan.document) if len(plan.document) else np.empty(0, np.int64)
    return {
        "rows": plan.rows,
        "tokens": tokens,
        "padding": plan.rows * plan.seq_length - tokens,
        "fill_rate": round(plan.fill_rate, 6),
        "pieces": len(plan.length),
        "split_documents": int((pieces > 1).sum()),
        "histogram_pieces": length_histogram(plan.length),
    }


def describe(row: dict[str, Any]) -> str:
    """One line of the per-source table, for a log."""
    read, train, held = row["read"], row["train"], row["held_out"]
    return (
        f"{row['source']}: read {read['documents']:,} documents / {read['tokens']:,} tokens, held "
        f"out {held['documents']:,} / {held['tokens']:,}, train {train['documents']:,} / "
        f"{train['tokens']:,} ({row['epochs']:.2f} epochs)"
    )


def _sums(lengths: np.ndarray) -> dict[str, int]:
    return {"documents": len(lengths), "tokens": int(lengths.sum())}

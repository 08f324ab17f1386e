"""stage=inspect: what data_prep has made: totals, sources, lengths, rows as text, and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_prep.shards import PackedRows
from data_prep.tokenizer_folder import open_tokenizer
from pipeline.figures import BLUE, DPI, VERMILLION
from pipeline.manifest import StageContext, StageError
from pipeline.schema import Config

INPUTS = ("fetch", "data_prep")
ALWAYS = True
# Of each document in a row that is shown.
SHOWN_CHARACTERS = 72


def depends_on(config: Config) -> dict[str, Any]:
    """What is shown."""
    return asdict(config.inspect)


def run(context: StageContext) -> dict[str, Any]:
    """Write lengths.png and rows.txt, and say what is there.

    Raises:
        StageError: when a file is not the one that data_prep wrote, or a row holds what no row can.
    """
    folder, log = context.folder("data_prep"), context.log
    counts = json.loads((folder / "audit.json").read_text())
    for line in source_table(counts):
        log.info(line)
    check_files(folder, counts["files"])
    log.info(f"{len(counts['files'])} files are as they were written")
    tokenizer = open_tokenizer(context.folder("fetch") / "model")
    told = []
    for name in ("train", "held_out"):
        rows = PackedRows(folder / name)
        check_rows(rows, counts[name], counts["vocab_size"])
        shown = min(context.config.inspect.rows, len(rows))
        for number in np.linspace(0, len(rows) - 1, shown).astype(int) if shown else ():
            told += [
                f"{name}, row {number}:",
                *row_lines(rows, number, counts["bos_id"], tokenizer.decode),
            ]
    for line in told:
        log.info(line)
    (context.out / "rows.txt").write_text("\n".join(told) + "\n", encoding="utf-8")
    length_figure(counts["sources"]).savefig(context.out / "lengths.png", dpi=DPI)
    return {"files": len(counts["files"]), "rows": counts["train"]["rows"]}


def source_table(counts: Mapping[str, Any]) -> Iterator[str]:
    """Totals, and a line for each source, in tokens; a share is of the training tokens."""
    total = sum(row["train"]["tokens"] for row in counts["sources"])
    yield (
        f"{counts['train']['rows']:,} rows of {counts['seq_length']:,} tokens, "
        f"{counts['train']['fill_rate']:.2%} full ({counts['packing']}); held out: "
        f"{counts['held_out']['rows']:,} rows, {counts['held_out_documents']:,} documents"
    )
    yield (
        f"{'source':20} {'documents':>11} {'tokens read':>15} {'training':>15} {'share':>7} "
        f"{'of budget':>9} {'epochs':>6} {'over 32K':>8} {'over 128K':>9}"
    )
    for row in counts["sources"]:
        train = row["train"]["tokens"]
        budget = "" if row["share_tokens"] is None else f"{train / row['share_tokens']:.3%}"
        long = [
            f"{tokens_from(row['histogram_train'], start) / max(1, train):.1%}"
            for start in (1 << 15, 1 << 17)
        ]
        yield (
            f"{row['source']:20} {row['read']['documents']:>11,} {row['read']['tokens']:>15,} "
            f"{train:>15,} {train / total:>7.2%} {budget:>9} {row['epochs']:>6.2f} "
            f"{long[0]:>8} {long[1]:>9}"
        )


def tokens_from(histogram: Sequence[Mapping[str, int]], start: int) -> int:
    """Tokens in documents of `start` tokens or more; `start` begins a bucket."""
    return sum(bucket["tokens"] for bucket in histogram if bucket["start"] >= start)


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold the files against the hashes of data_prep's manifest.

    Raises:
        StageError: on the first that differs.
    """
    for name, wanted in files.items():
        path = folder / name
        found = None
        if path.exists():
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != wanted["sha256"]:
            state = "is missing" if found is None else f"has the hash {found[:16]}..."
            raise StageError(
                f"{path}: {state}; must be {wanted['bytes']:,} bytes with the hash "
                f"{wanted['sha256'][:16]}...; write it again with stage=data_prep force=true"
            )


def check_rows(rows: PackedRows, counts: Mapping[str, int], vocab_size: int) -> None:
    """Hold every row against what was counted.

    Raises:
        StageError: on ids outside the vocabulary, or other totals.
    """
    tokens = padding = 0
    for number, row in enumerate(rows):
        if row.tokens.min() < 0 or row.tokens.max() >= vocab_size or row.padding < 0:
            raise StageError(
                f"{rows.prefix}: row {number}: ids {row.tokens.min()} to {row.tokens.max()}, "
                f"padding {row.padding}; must be ids below {vocab_size} and padding from 0; write "
                "it again with stage=data_prep force=true"
            )
        tokens += int(row.document_lengths.sum())
        padding += row.padding
    if (len(rows), tokens, padding) != (counts["rows"], counts["tokens"], counts["padding"]):
        raise StageError(
            f"{rows.prefix}: {len(rows)} rows, {tokens} tokens, {padding} of padding; must be "
            f"{counts['rows']}, {counts['tokens']}, {counts['padding']}; write it again with "
            "stage=data_prep force=true"
        )


def row_lines(rows: PackedRows, number: int, bos_id: int, decode: Any) -> Iterator[str]:
    """The pieces of a row: place, whether a document begins there or goes on from another row,
    and how the text begins and ends."""
    row = rows[number]
    start = 0
    for length in row.document_lengths.tolist():
        piece = row.tokens[start : start + length].tolist()
        begins = "begins " if piece[0] == bos_id else "goes on"
        opening, ending = decode(piece[:SHOWN_CHARACTERS]), decode(piece[-SHOWN_CHARACTERS:])
        yield (
            f"  {start:>7}..{start + length:<7} {begins} {opening[:SHOWN_CHARACTERS]!r} ... "
            f"{ending[-SHOWN_CHARACTERS:]!r}"
        )
        start += length
    if row.padding:
        yield f"  {start:>7}..{start + row.padding:<7} padding"


def length_figure(sources: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens by document length for each source, as read and as trained on."""
    figure = Figure(figsize=(6.4, 1.2 + 1.8 * len(sources)), layout="constrained")
    panels = figure.subplots(len(sources), 1, squeeze=False, sharex=True)[:, 0]
    for axes, row in zip(panels, sources, strict=True):
        for key, colour, label in (
            ("histogram_read", BLUE, "as read"),
            ("histogram_train", VERMILLION, "for training"),
        ):
            buckets = row[key]
            total = max(1, sum(bucket["tokens"] for bucket in buckets))
            edges = [max(32, bucket["start"]) for bucket in buckets]
            shares = [100 * bucket["tokens"] / total for bucket in buckets]
            axes.stairs(shares, [*edges, buckets[-1]["stop"]], color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_title(row["source"], loc="left", fontsize=9)
        axes.set_ylabel("% of tokens")
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("document length in tokens")
    return figure

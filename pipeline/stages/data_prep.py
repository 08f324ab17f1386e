"""stage=data_prep: text sources become packed rows, held-out rows and whole held-out documents."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from data_prep import audit, mix
from data_prep.pack import Plan, pack
from data_prep.shards import (
    IndexedReader,
    IndexedWriter,
    PackedRowsWriter,
    disk_errors,
    token_dtype,
    write_whole,
)
from data_prep.sources import (
    STDLIB,
    DataError,
    Skips,
    Source,
    fingerprint,
    read_documents,
)
from data_prep.tokenizer import ModelTokenizer, load_tokenizer, tokenize_documents
from pipeline.manifest import StageContext, StageError
from pipeline.packages import folder_name
from pipeline.schema import Config, DataSection

INPUTS = ("fetch",)
RESUMABLE = False
LOG_SECONDS = 10.0


def depends_on(config: Config) -> dict[str, Any]:
    """The data section without what changes no result, and the state of source files that no
    package holds."""
    data = asdict(config.data)
    for key in ("name", "data_root", "workers"):
        del data[key]
    sources = resolve_sources(config.data, None)
    return {
        **data,
        "local_files": {source.name: fingerprint(source) for source in sources},
    }


def resolve_sources(data: DataSection, packages: Path | None) -> list[Source]:
    """The sources as data_prep reads them.

    Args:
        packages: fetch's folder of unpacked packages; None gives only sources outside packages.

    Raises:
        DataError: on no source, a repeated name, and what Source refuses.
    """
    names = [section.name for section in data.sources]
    if not names or len(set(names)) != len(names):
        raise DataError(
            f"data.sources: names {names}: must be one or more, each once; set data.sources"
        )
    sources = []
    for section in data.sources:
        if section.package is not None and packages is None:
            continue
        path = Path(section.path)
        if section.package is not None:
            path = packages / folder_name(section.package) / section.path.lstrip("/")
        elif section.path != STDLIB:
            path = path.expanduser().absolute()
        sources.append(
            Source(section.name, path, section.format, section.glob, section.field, section.weight)
        )
    return sources


def run(context: StageContext) -> dict[str, Any]:
    """Write train.*, held_out.* (packed rows), held_out_documents.* and audit.json.

    Tokens of every document read go to temporary files first, since the mix needs all lengths;
    in memory stay a few numbers per document.

    Raises:
        DataError: see data_prep.
    """
    data, out, log = context.config.data, context.out, context.log
    mix.check_held_out(data.held_out)
    # refuses a wrong packing before the hours of tokenising
    pack(np.empty(0, np.int64), data.seq_length, data.packing)
    upsampling = mix.Upsampling(**asdict(data.upsample)) if data.upsample else None
    sources = resolve_sources(data, context.folder("fetch") / "packages")
    shares: list[int | None] = [None] * len(sources)
    if data.tokens is not None:
        shares = mix.share_budget(data.tokens, [source.weight for source in sources])
    elif len({source.weight for source in sources}) > 1:
        log.warning("data.tokens=null: every document is used once, weights have no effect")
    tokenizer = load_tokenizer(context.folder("fetch") / "model")
    if tokenizer.vocab_size > context.config.model.vocab_size:
        raise StageError(
            f"{context.folder('fetch') / 'model'}: the tokenizer has {tokenizer.vocab_size} ids; "
            f"must be at most model.vocab_size={context.config.model.vocab_size}; put the "
            "model's own tokenizer there, or correct model.vocab_size"
        )
    log.info(
        f"tokenizer: {tokenizer.vocab_size:,} ids, <bos> {tokenizer.bos_id}; "
        f"{data.workers} processes"
    )

    scratch = out / "scratch"
    scratch.mkdir()
    pools, skips = [], []
    for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
        skips.append(Skips(data.strict))
        pools.append(
            _tokenize_source(
                source, tokenizer, data, upsampling, share, skips[-1], scratch / str(number), log
            )
        )
        if skips[-1].counts:
            log.warning(f"{source.name}: left out {skips[-1].describe()}")

    held = mix.hold_out(pools, data.held_out, data.held_out_tokens)
    copies = mix.copies_of_held_out(pools, held)
    rows, choices = [], []
    for i, pool in enumerate(pools):
        kept = mix.kept(pool.lengths, pool.keep_draw, upsampling) & ~held[i] & ~copies[i]
        choices.append(mix.choose(pool.name, pool.lengths, kept, shares[i], data.seed))
        rows.append(
            audit.source_row(
                pool, held[i], copies[i], kept, choices[i], shares[i], dict(skips[i].counts)
            )
        )
        log.info(audit.describe(rows[i]))
        if choices[i].epochs > 1:
            log.warning(
                f"{pool.name}: smaller than its share of {shares[i]:,} tokens, so its documents "
                f"repeat: {choices[i].epochs:.2f} epochs"
            )

    stores = [IndexedReader(scratch / str(number)) for number in range(len(sources))]
    dtype = token_dtype(tokenizer.vocab_size)
    train_items, train_lengths = _in_random_order(
        [choice.documents for choice in choices], [choice.lengths for choice in choices], data.seed
    )
    held_items, held_lengths = _in_random_order(
        [np.flatnonzero(mask) for mask in held],
        [pool.lengths[mask] for pool, mask in zip(pools, held, strict=True)],
        data.seed,
    )
    plans = {}
    for name, items, lengths in (
        ("train", train_items, train_lengths),
        ("held_out", held_items, held_lengths),
    ):
        plans[name] = pack(lengths, data.seq_length, data.packing)
        _write_rows(out / name, plans[name], items, stores, data.seed, dtype, tokenizer.bos_id, log)
    _write_held_out_documents(
        out / "held_out_documents", held_items, stores, sources, scratch, dtype
    )
    del stores
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()

    counts = {
        "seq_length": data.seq_length,
        "packing": data.packing,
        "bos_id": tokenizer.bos_id,
        "vocab_size": tokenizer.vocab_size,
        "train": audit.packing_row(plans["train"]),
        "held_out": audit.packing_row(plans["held_out"]),
        "held_out_documents": len(held_items),
        "sources": rows,
    }
    write_whole(out / "audit.json", (json.dumps(counts, indent=2) + "\n").encode())
    log.info(
        f"{plans['train'].rows:,} rows of {data.seq_length:,} tokens for training "
        f"({plans['train'].fill_rate:.2%} full), {plans['held_out'].rows:,} held out"
    )
    return counts


def _tokenize_source(
    source: Source,
    tokenizer: ModelTokenizer,
    data: DataSection,
    upsampling: mix.Upsampling | None,
    share: int | None,
    skips: Skips,
    prefix: Path,
    log: logging.Logger,
) -> mix.Pool:
    """Write a source's tokens, an item per document, and a line of JSON per document id.

    Stops reading when what training may use fills the source's share and a document for the
    held-out split has come.
    """
    lengths, held_draws, keep_draws, digests = [], [], [], []
    usable = 0
    documents = read_documents(source, skips, data.seed)
    ids_path = prefix.with_suffix(".ids")
    with (
        disk_errors(ids_path),
        ids_path.open("w", encoding="utf-8") as ids,
        IndexedWriter(prefix, "int32") as writer,
        _progress(f"tokenize {source.name}", "tokens", share, log) as advance,
    ):
        for document in tokenize_documents(documents, tokenizer, data.workers):
            size = len(document.tokens)
            writer.add(document.tokens)
            ids.write(json.dumps(document.id) + "\n")
            lengths.append(size)
            held_draws.append(mix.draw(data.seed, "held out", source.name, document.id))
            keep_draws.append(mix.draw(data.seed, "keep", source.name, document.id))
            digests.append(document.digest)
            advance(size)
            long = upsampling is None or size >= upsampling.threshold
            if held_draws[-1] >= data.held_out and (long or keep_draws[-1] < upsampling.keep_short):
                usable += size
            if share is not None and usable >= share and min(held_draws) < data.held_out:
                break
    return mix.Pool(
        source.name,
        np.array(lengths, np.int64),
        np.array(held_draws),
        np.array(keep_draws),
        np.array(digests, np.uint64),
    )


def _in_random_order(
    documents: list[np.ndarray], lengths: list[np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(source, document) pairs int64 [items, 2] over all sources, shuffled, and lengths [items]."""
    source = np.repeat(np.arange(len(documents)), [len(part) for part in documents])
    items = np.stack([source, np.concatenate(documents)], axis=1)
    order = np.random.default_rng(seed).permutation(len(items))
    return items[order], np.concatenate(lengths)[order]


def _write_rows(
    prefix: Path,
    plan: Plan,
    items: np.ndarray,
    stores: list[IndexedReader],
    seed: int,
    dtype: str,
    pad_id: int,
    log: logging.Logger,
) -> None:
    """Write a plan's rows in shuffled order; `items` are (source, document) of plan.document."""
    with (
        PackedRowsWriter(prefix, plan.seq_length, dtype, pad_id) as writer,
        _progress(f"write {prefix.name}", "rows", plan.rows, log) as advance,
    ):
        for row in np.random.default_rng(seed).permutation(plan.rows):
            pieces = []
            for piece in range(plan.row_start[row], plan.row_start[row + 1]):
                source, document = items[plan.document[piece]]
                start = plan.start[piece]
                pieces.append(stores[source][document][start : start + plan.length[piece]])
            writer.add(pieces)
            advance(1)


def _write_held_out_documents(
    prefix: Path,
    items: np.ndarray,
    stores: list[IndexedReader],
    sources: list[Source],
    scratch: Path,
    dtype: str,
) -> None:
    wanted = {(int(source), int(document)) for source, document in items}
    ids = {}
    for number in range(len(sources)):
        with (scratch / f"{number}.ids").open(encoding="utf-8") as lines:
            for document, line in enumerate(lines):
                if (number, document) in wanted:
                    ids[number, document] = json.loads(line)
    names = []
    with IndexedWriter(prefix, dtype) as writer:
        for source, document in items.tolist():
            tokens = stores[source][document]
            writer.add(tokens)
            names.append(
                {
                    "id": ids[source, document],
                    "source": sources[source].name,
                    "tokens": len(tokens),
                }
            )
    write_whole(
        prefix.with_name(prefix.name + ".json"), (json.dumps(names, indent=1) + "\n").encode()
    )


@contextmanager
def _progress(what: str, unit: str, total: int | None, log: logging.Logger) -> Iterator[Any]:
    """Yields advance(n): a bar on a terminal, otherwise a line every LOG_SECONDS."""
    if sys.stderr.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn())
        with Progress(*columns, TextColumn(unit)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.update(task, advance=n)
        return
    started = spoken = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, spoken
        done += n
        now = time.monotonic()
        if now - spoken >= LOG_SECONDS:
            spoken = now
            of = f" of {total:,}" if total else ""
            log.info(f"{what}: {done:,}{of} {unit}, {done / (now - started):,.0f} a second")

    yield advance

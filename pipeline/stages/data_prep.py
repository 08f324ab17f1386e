"""stage=data_prep: text sources become packed rows, held-out rows and whole held-out documents.

Each source is cut into units, which processes tokenize into `units/`; what is there when a run is
killed, the next one finds. The mix needs all lengths, so the rows are written afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import audit, mix
from data_prep.contamination import EvaluationRuns
from data_prep.corpus import Corpus, Shard, SourceUnits, read_counted
from data_prep.mixture import Mixture
from data_prep.needles import Needles
from data_prep.pack import Plan, pack
from data_prep.pool import Pool
from data_prep.readers import read_whole
from data_prep.rows import TokenFiles, index_rows, plan_rows
from data_prep.shards import IndexedWriter, disk_errors, token_dtype, write_whole
from data_prep.sources import STDLIB, DataError, Skips, Source, list_files, other_splits
from data_prep.tokenizer import Encoder, ModelTokenizer, load_tokenizer
from data_prep.worker import CheckTask, HashTask, Setup
from pipeline.advice import held_out_shortage
from pipeline.contents import Entry, SourceFiles, look
from pipeline.manifest import (
    PARTIAL,
    StageContext,
    StageError,
    read_manifest,
    read_record,
    stage_id,
)
from pipeline.packages import folder_name
from pipeline.progress import track_parts
from pipeline.schema import Config
from pipeline.schema_of_data import DataSection, SourceSection, UpsampleSection

INPUTS = ("fetch",)
RESUMABLE = True
# A second run on one output does not wait: hours later it would only find that nothing is left.
EXCLUSIVE = True
AUDIT = "audit.json"


def depends_on(config: Config) -> dict[str, Any]:
    """The data section without what changes no result, such as where source_files lie."""
    data = asdict(config.data)
    for key in ("name", "data_root", "mixture", "mixtures", "workers", "engine"):
        del data[key]
    if config.data.shard is None:
        del data["shard"]
    avoided = data["decontaminate"]["sources"] if data["decontaminate"] else []
    for source in (*data["sources"], *avoided):
        if source["package"] is None:
            del source["path"]
    return data


def source_files(config: Config) -> dict[str, SourceFiles]:
    """The files of each source that no package holds."""
    avoided = config.data.decontaminate.sources if config.data.decontaminate else []
    sections = [*config.data.sources, *avoided]
    local = [section for section in sections if section.package is None]
    found = {}
    for section, source in zip(local, resolve_sources(sections, None), strict=True):
        place = {key: getattr(section, key) for key in ("path", "glob", "format", "split")}
        found[source.name] = SourceFiles(place, source.folder, partial(list_files, source))
    return found


def resolve_sources(sections: list[SourceSection], packages: Path | None) -> list[Source]:
    """Sources as data_prep reads them.

    Args:
        packages: fetch's folder of unpacked packages; None gives only sources outside packages.

    Raises:
        DataError: on no source, a repeated name, and what Source refuses.
    """
    names = [section.name for section in sections]
    if not names or len(set(names)) != len(names):
        raise DataError(
            f"data.sources: names {names}: must be one or more, each once; set data.sources"
        )
    sources = []
    for section in sections:
        if section.package is not None and packages is None:
            continue
        path = Path(section.path)
        if section.package is not None:
            path = packages / folder_name(section.package) / section.path.lstrip("/")
        elif section.path != STDLIB:
            path = path.absolute()
        fields = (section.format, section.glob, section.field, section.weight, section.where)
        sources.append(Source(section.name, path, *fields, _needles(section), section.split))
    return sources


def run(context: StageContext) -> dict[str, Any]:
    """Write train.*, held_out.* (packed rows), held_out_documents.* and audit.json.

    With data.shard: only this part of the units, in `units/`.

    Raises:
        DataError: see data_prep.
    """
    data, out, log = context.config.data, context.out, context.log
    if (out / AUDIT).exists():
        # written last: the run before was killed while it tidied up
        return _tidied(out)
    shard = None if data.shard is None else Shard.parse(data.shard)
    # refuses a wrong packing before the hours of tokenising
    pack(np.empty(0, np.int64), data.seq_length, data.packing)
    wanted = [_wanted(section, data) for section in data.sources]
    packages = context.folder("fetch") / "packages"
    sources = resolve_sources(data.sources, packages)
    for source in sources:
        if others := other_splits(source):
            log.warning(
                f"source {source.name}: split {source.split!r} is read; files that are not, by "
                f"split: {others} (set the source's split, null for all)"
            )
    shares: list[int | None] = [None] * len(sources)
    if data.tokens is not None:
        shares = mix.share_budget(data.tokens, [source.weight for source in sources])
    elif len({source.weight for source in sources}) > 1:
        log.warning("data.tokens=null: every document is used once, weights have no effect")
    tokenizer = _tokenizer(context)
    workers = data.workers or len(os.sched_getaffinity(0))
    log.info(
        f"tokenizer: {tokenizer.vocab_size:,} ids, <bos> {tokenizer.bos_id}; {workers} processes"
    )
    for left in out.iterdir():
        if left.name not in ("units", PARTIAL):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    scratch = out / "scratch"
    scratch.mkdir()
    record = read_record(out / PARTIAL) or {}
    read = _look(context.config, record.get("config", {}).get("source_files", {}))
    setup = _setup(data, packages, tokenizer, scratch)
    shards = [] if shard else finished_shards(context)
    folders = [out / "units", *(folder / "units" for folder in shards)]
    with Pool(workers, setup) as pool:
        corpus = Corpus(
            [
                SourceUnits(i, source, wanted[i], shares[i], folders, data.seed, data.strict, shard)
                for i, source in enumerate(sources)
            ]
        )
        _take_in_what_is_there(corpus, pool, log)
        _tokenize(corpus, pool, log)
        _refuse_changed_files(read, context.config, out)
        if shard:
            shutil.rmtree(scratch)
            return _shard_counts(shard, corpus, log)
        while True:
            reads = [read_counted(units) for units in corpus.sources]
            mixture = Mixture(
                reads,
                corpus.sources,
                data.held_out,
                data.held_out_tokens,
                data.deduplicate,
                data.seed,
            )
            if not mixture.ask_for_more():
                break
            _tokenize(corpus, pool, log)
            _refuse_changed_files(read, context.config, out)
        counts = mixture.choose(log)
        packed = _write(context, mixture, tokenizer, setup.dtype, pool)
        files = sorted(path for path in out.iterdir() if path.suffix in (".bin", ".idx"))
        files += [out / "held_out_documents.json"]
        hashes = dict(_perform(pool, [HashTask(path) for path in files]))
    counts = {
        "seq_length": data.seq_length,
        "packing": data.packing,
        "bos_id": tokenizer.bos_id,
        "vocab_size": tokenizer.vocab_size,
        "engine": _engine_version(tokenizer.engine),
        **packed,
        "held_out_documents": len(mixture.held_items),
        "sources": counts,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": hashes[HashTask(path)]}
            for path in files
        },
    }
    write_whole(out / AUDIT, (json.dumps(counts, indent=2) + "\n").encode())
    return _tidied(out)


def check(config: Config, folder: Path, log: logging.Logger) -> None:
    """Refuse held-out documents that the chain's evaluation cannot use, before hours of training.

    Raises:
        StageError: where none is long enough.
    """
    if config.stage == "chain" and (lacking := held_out_shortage(config, folder)):
        raise StageError(lacking)


def _tidied(out: Path) -> dict[str, Any]:
    """The counts of a run whose files are all there, without what only making them needed."""
    for name in ("scratch", "units"):
        if (out / name).exists():
            shutil.rmtree(out / name)
    return json.loads((out / AUDIT).read_text())


def finished_shards(context: StageContext) -> list[Path]:
    """The folders of shards that were made for this configuration, of all n of one n.

    Raises:
        StageError: where some are there, but of no n all.
    """
    own = read_record(context.out / PARTIAL)
    found: dict[int, dict[int, Path]] = {}
    for folder in sorted(context.out.parent.iterdir()) if own else ():
        manifest = read_manifest(folder)
        if manifest is None or "shard" not in manifest["config"]:
            continue
        config = dict(manifest["config"])
        shard = Shard.parse(config.pop("shard"))
        if stage_id("data_prep", config, manifest["inputs"]) == own["id"]:
            found.setdefault(shard.count, {})[shard.number] = folder
    for count in sorted(found, reverse=True):
        if len(found[count]) == count:
            context.log.info(f"merging {count} shards, which can be removed afterwards")
            return list(found[count].values())
    if found:
        count = max(found, key=lambda n: len(found[n]))
        missing = [str(Shard(i, count)) for i in range(count) if i not in found[count]]
        raise StageError(
            f"{context.out.parent}: of {count} shards {', '.join(missing[:8])} "
            f"{'is' if len(missing) == 1 else 'are'} missing; run stage=data_prep "
            f"data.shard={missing[0]}, or remove the folders of the others to do without shards: "
            f"{', '.join(folder.name for folder in found[count].values())}"
        )
    return []


def _needles(section: SourceSection) -> Needles | None:
    wanted = section.needles
    if wanted is None:
        return None
    return Needles(tuple(wanted.characters), tuple(wanted.pairs), wanted.copies, wanted.seed)


def _wanted(section: SourceSection, data: DataSection) -> mix.Wanted:
    upsample: UpsampleSection | None = section.upsample or data.upsample
    upsampling = mix.Upsampling(**asdict(upsample)) if upsample else None
    return mix.Wanted(data.held_out, upsampling, section.min_tokens, section.max_tokens)


def _tokenizer(context: StageContext) -> ModelTokenizer:
    folder = context.folder("fetch") / "model"
    vocab_size = context.config.model.vocab_size
    tokenizer, why = load_tokenizer(folder, context.config.data.engine)
    if tokenizer.vocab_size > vocab_size:
        raise StageError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids; must be at most "
            f"model.vocab_size={vocab_size}; put the model's own tokenizer there, or correct "
            "model.vocab_size"
        )
    context.log.info(f"token ids by {tokenizer.engine}: {why}")
    return tokenizer


def _engine_version(engine: str) -> str:
    return f"{engine} {metadata.version(engine)}"


def _setup(data: DataSection, packages: Path, tokenizer: ModelTokenizer, scratch: Path) -> Setup:
    """What the processes read, written to `scratch`."""
    path = scratch / "tokenizer.json"
    with disk_errors(path):
        path.write_text(tokenizer.serialized, encoding="utf-8")
    runs, length = None, 0
    if data.decontaminate is not None:
        length, runs = data.decontaminate.tokens, scratch / "evaluation_runs.npy"
        encoder = Encoder(tokenizer.serialized, tokenizer.engine)
        sources = resolve_sources(data.decontaminate.sources, packages)
        texts = (
            encoder.encode(text)
            for source in sources
            for _, text in read_whole(source, Skips(strict=True))
        )
        with disk_errors(runs):
            np.save(runs, EvaluationRuns.of(texts, length).hashes)
    dtype = token_dtype(tokenizer.vocab_size)
    return Setup(path, tokenizer.engine, tokenizer.bos_id, dtype, runs, length)


def _take_in_what_is_there(corpus: Corpus, pool: Pool, log: logging.Logger) -> None:
    found = [prefix for units in corpus.sources for prefix in units.find()]
    if found:
        log.info(f"{len(found)} of {sum(len(u.order) for u in corpus.sources)} units are there")
        _perform(pool, [CheckTask(prefix) for prefix in found])


def _perform(pool: Pool, tasks: list) -> list[tuple[Any, Any]]:
    waiting = iter(tasks)
    return list(pool.run(lambda: next(waiting, None)))


def _tokenize(corpus: Corpus, pool: Pool, log: logging.Logger) -> None:
    """Make the units that are needed."""
    needs = [units.need for units in corpus.sources]
    total = None if None in needs else sum(needs)
    with track_parts("tokenize", "tokens", log) as told:
        for task, summary in pool.run(corpus.next_task):
            corpus.finish(task, summary)
            done = corpus.tokens()
            parts = done / total if total else corpus.bytes_done() / (corpus.bytes_all() or 1)
            told(done, min(1.0, parts))


def _look(config: Config, known: dict[str, Entry]) -> dict[str, Entry]:
    """What the sources' files hold now."""
    return {
        name: look(files, [known[name]] if name in known else [])
        for name, files in source_files(config).items()
    }


def _refuse_changed_files(before: dict[str, Entry], config: Config, out: Path) -> None:
    """Drop the units of files that were changed between one unit of them and another.

    Raises:
        DataError: where one was.
    """
    after = _look(config, before)
    changed = [name for name in before if after[name]["content"] != before[name]["content"]]
    if changed:
        shutil.rmtree(out / "units")
        raise DataError(
            f"sources {', '.join(changed)}: their files changed while they were read; wait until "
            "nothing writes there, and run again"
        )


def _shard_counts(shard: Shard, corpus: Corpus, log: logging.Logger) -> dict[str, Any]:
    rows = [
        {
            "source": units.source.name,
            "units": len(units.done),
            "of_units": len(units.units),
            "documents": sum(summary.documents for summary in units.done.values()),
            "tokens": sum(summary.tokens for summary in units.done.values()),
            "skipped": dict(units.skips(sorted(units.done)).counts),
        }
        for units in corpus.sources
    ]
    for row in rows:
        log.info(f"shard {shard}: {row['source']}: {row['tokens']:,} tokens")
    return {"shard": str(shard), "sources": rows}


def _write(
    context: StageContext, mixture: Mixture, tokenizer: ModelTokenizer, dtype: str, pool: Pool
) -> dict[str, Any]:
    """Write the packed files and the held-out documents; their rows of the table."""
    data, out, log = context.config.data, context.out, context.log
    counts = {}
    for name, items, lengths in (
        ("train", mixture.train_items, mixture.train_lengths),
        ("held_out", mixture.held_items, mixture.held_lengths),
    ):
        plan = pack(lengths, data.seq_length, data.packing)
        pieces = mixture.pieces(items)
        places = (out / name, plan, pieces, mixture.files, dtype, tokenizer.bos_id)
        tasks = plan_rows(*places, out / "scratch", data.seed)
        _write_rows(name, tasks, plan, pool, log)
        index_rows(out / name, plan, dtype)
        counts[name] = audit.packing_row(plan)
    _write_held_out_documents(out / "held_out_documents", mixture, dtype)
    log.info(
        f"{counts['train']['rows']:,} rows of {data.seq_length:,} tokens for training "
        f"({counts['train']['fill_rate']:.2%} full), {counts['held_out']['rows']:,} held out"
    )
    return counts


def _write_rows(
    name: str, tasks: Iterator[Any], plan: Plan, pool: Pool, log: logging.Logger
) -> None:
    rows = 0
    with track_parts(f"write {name}", "rows", log) as told:
        for task, _ in pool.run(lambda: next(tasks, None)):
            rows += task.last - task.first
            told(rows, rows / plan.rows)


def _write_held_out_documents(prefix: Path, mixture: Mixture, dtype: str) -> None:
    items = mixture.held_items
    names = [
        read.names(set(items[items[:, 0] == number, 1].tolist()))
        for number, read in enumerate(mixture.reads)
    ]
    told = []
    files = TokenFiles(mixture.files, np.dtype(dtype))
    with IndexedWriter(prefix, dtype) as writer:
        for (source, document), piece in zip(items.tolist(), mixture.pieces(items), strict=True):
            tokens = np.empty(piece["length"], dtype)
            files.read(piece, tokens)
            writer.add(tokens)
            told.append(
                {
                    "id": names[source][document],
                    "source": mixture.pools[source].name,
                    "tokens": len(tokens),
                }
            )
    files.close()
    write_whole(
        prefix.with_name(prefix.name + ".json"), (json.dumps(told, indent=1) + "\n").encode()
    )

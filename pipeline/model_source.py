"""Where a model's weights come from, and the shape that its config.json states."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

from omegaconf import OmegaConf

from model.config import ModelConfig
from model.mapping import MappingError, config_from_hf
from pipeline import packages
from pipeline.manifest import StageError
from pipeline.schema import DIMENSIONS, ModelSection

SOURCES = (
    'a folder with a Hugging Face Llama, a .gguf file, a hub id such as "NAME/MODEL", '
    '"pypi:NAME==VERSION" or "random"'
)
ROOT = Path(__file__).resolve().parents[1]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Keys of a model section that config.json states. Some formats keep the last two as float32.
SHAPE_FIELDS = (*DIMENSIONS, "tie_embeddings", "norm_eps", "rope_base")


def source_kind(source: str) -> str:
    """Which kind of source this is: "random", "pypi", "gguf", "folder" or "hub".

    Raises:
        StageError: on a path that does not exist or a string that is none of them.
    """
    path = local_path(source)
    if source == "random":
        return "random"
    if source.startswith("pypi:"):
        packages.check_spec(source)
        return "pypi"
    if path.is_dir():
        return "folder"
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    looks_local = path.is_absolute() or source.startswith(".") or path.suffix == ".gguf"
    if HUB_ID.fullmatch(source) and not path.exists() and not looks_local:
        return "hub"
    found = "is neither a folder nor a .gguf file" if path.exists() else "is not there"
    raise StageError(f"model.source={source!r}: {found}; must be {SOURCES}; set model.source")


def local_path(source: str) -> Path:
    """Where a local source lies; one that is not below the working directory, in the repository."""
    path = Path(source)
    own = ROOT / path
    return own if not path.exists() and own.exists() else path


def read_config(folder: Path) -> ModelConfig:
    """The shape of a Hugging Face folder's model.

    Raises:
        StageError: where config.json is missing or no JSON.
        MappingError: on another architecture than Llama, or a feature that is not supported.
    """
    path = folder / "config.json"
    try:
        return config_from_hf(json.loads(path.read_text()))
    except MappingError as error:
        raise MappingError(f"{folder}: {error}") from error
    except (OSError, ValueError) as error:
        raise StageError(
            f"{path}: cannot be read as JSON ({error}); set model.source to a Hugging Face folder, "
            "or fetch the model again with stage=fetch force=true"
        ) from error


def with_weights(folder: Path) -> Path:
    """The folder itself, where all weights that it links to are there.

    Raises:
        StageError: where a local model was removed after stage=fetch.
    """
    for path in sorted(folder.glob("*")):
        if path.is_symlink() and not path.exists():
            raise StageError(
                f"{path.readlink()}: the model's weights are no longer there; put them back, or "
                "set model.source to the folder where they are"
            )
    return folder


def shape_of(model: ModelConfig) -> dict[str, int | float | bool]:
    """The keys of a model section that describe `model`."""
    values = {key: getattr(model, key) for key in (*DIMENSIONS, "tie_embeddings", "norm_eps")}
    return {**values, "rope_base": model.rope["rope_theta"]}


def fill_shape(section: ModelSection) -> None:
    """Read what the section leaves null from the config.json of its folder.

    Raises:
        StageError: where there is no such folder, or no config.json in it.
        MappingError: see read_config.
    """
    missing = [key for key in SHAPE_FIELDS if getattr(section, key) is None]
    if section.source is None:
        raise StageError(
            "model.source: has no value; set model.source=FOLDER of a Hugging Face Llama, choose "
            "model=NAME (conf/model), or start from a recipe with experiment=NAME"
        )
    if not missing and section.name is not None:
        return
    kind = source_kind(section.source)
    if missing and kind != "folder":
        first = f"download it (hf download {section.source} --local-dir FOLDER) and set "
        remedy = f"{first}model.source=FOLDER, or " if kind == "hub" else ""
        raise StageError(
            f"model.source={section.source!r}: the shape is not stated (model.{missing[0]} has no "
            f"value), and is read from the config.json of a local folder only; {remedy}choose a "
            "conf/model file with model=NAME"
        )
    if missing:
        shape = shape_of(read_config(local_path(section.source)))
        for key in missing:
            setattr(section, key, shape[key])
    section.name = section.name or local_path(section.source).resolve().name


def check_shape(
    model: ModelConfig, section: ModelSection, folder: Path, log: logging.Logger
) -> None:
    """Refuse a checkpoint of another shape than the configuration's model section.

    Raises:
        StageError: after the conf/model file that describes this checkpoint has been logged.
    """
    wrong = []
    shape = shape_of(model)
    for key, found in shape.items():
        expected = getattr(section, key)
        if not math.isclose(found, expected, rel_tol=1e-6 if isinstance(found, float) else 0):
            wrong.append(f"model.{key}: found {found}, expected {expected}")
    if not wrong:
        return
    log.info("this checkpoint as a conf/model file:\n%s", section_yaml(section, shape))
    raise StageError(
        f"{folder / 'config.json'}: a checkpoint of another shape: {'; '.join(wrong)}; save the "
        "lines above as conf/model/NAME.yaml and set model=NAME, set model=auto for a local "
        "folder, or choose another model.source"
    )


def section_yaml(section: ModelSection, shape: dict[str, int | float | bool]) -> str:
    """A conf/model file of the section's source with this shape."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(section.source).name).lower() or "model"
    values = {"name": name, "source": section.source, "revision": section.revision, **shape}
    return OmegaConf.to_yaml({key: value for key, value in values.items() if value is not None})

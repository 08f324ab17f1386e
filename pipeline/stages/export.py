"""export: trained weights to a Hugging Face folder that runs with transformers and torch alone.

The folder holds config.json, safetensors, the tokenizer's files and byte-identical copies of the
model's own python files, which AutoModelForCausalLM loads with trust_remote_code=True. Weights pass
tensor by tensor: in memory are what is not yet written of one shard, one tensor and its sources.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import torch

import kernels
import model
from data_prep.tokenizer_folder import check_saved, save_tokenizer
from kernels.pattern import Pattern
from model.config import ModelConfig, resolve_schedule
from model.configuration_longgen import MIN_TRANSFORMERS
from model.mapping import hf_shapes, split
from model.modeling_longgen import LongGenForCausalLM
from model.weights import HF_INDEX, iterate_weights, write_weights
from pipeline.hf_folder import longgen_config
from pipeline.manifest import StageContext, StageError
from pipeline.progress import track_tensors
from pipeline.schema import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO_MAP = {
    "AutoConfig": "configuration_longgen.LongGenConfig",
    "AutoModelForCausalLM": "modeling_longgen.LongGenForCausalLM",
}
COPIED = (
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
# Files that may state the base's context, and their keys of it.
LENGTHS = (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length"))
ENTRY = "modeling_longgen.py"
# README.md of the exported folder; the repository's README has the same code.
PAGE = """\
# {name}: {layers} layers, {full} with full attention

Made by LongGen for texts of up to {positions:,} tokens. It needs torch and transformers {needs} or
newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

`trust_remote_code=True` runs the Python files of this folder. `config=model.config` lets the
tokenizer load without asking for that once more.
"""


def inputs(config: Config) -> tuple[str, ...]:
    """The stages that the export reads: with export.source=convert no training is needed."""
    trained = () if config.export.source == "convert" else ("finetune",)
    return ("fetch", "convert", *trained)


INPUTS = inputs


def depends_on(config: Config) -> dict:
    """Values that decide the exported folder, besides its inputs."""
    values = {
        "export": asdict(config.export),
        "seq_length": config.data.seq_length,
        "code": hashlib.sha256(b"".join(p.read_bytes() for p in python_files())).hexdigest()[:16],
    }
    if config.export.source == "convert":
        values |= {"pattern": asdict(config.pattern), "schedule": asdict(config.schedule)}
    return values


def python_files() -> list[Path]:
    """The model's file and all that it imports relatively, each once."""
    found, waiting = [], [Path(model.__file__).parent / ENTRY]
    while waiting:
        path = waiting.pop(0)
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r"^\s*from \.(\w+) import", path.read_text(), re.MULTILINE):
            beside = path.parent / f"{name}.py"
            # model/__init__.py binds the kernels as siblings of the model's modules.
            kernel = Path(kernels.__file__).parent / beside.name
            waiting.append(beside if beside.exists() else kernel)
    return found


def _set_length(path: Path, key: str, length: int) -> None:
    """Give a copied file that states a length the export's: the base's would cut longer texts."""
    values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if values.get(key) not in (None, length):
        values[key] = length
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _source(context: StageContext) -> tuple[ModelConfig, Iterable[tuple[str, torch.Tensor]]]:
    """The shape of the model to export and its Megatron weights."""
    config = context.config
    if config.export.source == "finetune":
        from pipeline.training.checkpoint import read_weights

        folder = context.folder("finetune")
        return ModelConfig.load(folder / "model.json"), read_weights(folder)
    if config.export.source != "convert":
        raise StageError(
            f"export.source={config.export.source!r}: must be finetune or convert; set "
            "export.source"
        )
    folder = context.folder("convert")
    source = ModelConfig.load(folder / "model.json")
    schedule = resolve_schedule(config.schedule.full, config.schedule.count, source.num_layers)
    pattern = Pattern(**asdict(config.pattern))
    return replace(source, is_full=schedule, pattern=pattern), iterate_weights(folder)


def _hf_tensors(
    weights: Iterable[tuple[str, torch.Tensor]], model_config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Megatron tensors as Hugging Face's, one by one; refuses weights that are not whole."""
    missing = hf_shapes(model_config)
    for name, tensor in weights:
        parts = split(name, tensor, model_config)
        # Nothing may outlive its use here: the next tensor is read before this name gets it.
        del tensor
        while parts:
            hf_name = next(iter(parts))
            missing.pop(hf_name, None)
            # Parts of one tensor share its memory, of which a shard would hold more than it counts.
            yield hf_name, parts.pop(hf_name).to(dtype, copy=True)
    if missing:
        raise StageError(
            f"{len(missing)} tensors of the model are absent from its weights, such as "
            f"{next(iter(missing))}; run the stage that wrote them again with force=true"
        )


def run(context: StageContext) -> dict:
    """Write the Hugging Face folder.

    Raises:
        StageError: on an unknown export.source or export.dtype, or weights that are not whole.
        MappingError, WeightsError: on a tensor that has no place, a file that cannot be used.
    """
    config, out, fetched = context.config, context.out, context.folder("fetch") / "model"
    if config.export.dtype not in DTYPES:
        raise StageError(
            f"export.dtype={config.export.dtype!r}: must be one of {', '.join(DTYPES)}; set "
            "export.dtype"
        )
    dtype = DTYPES[config.export.dtype]
    model_config, weights = _source(context)
    positions = max(model_config.max_positions, config.data.seq_length)
    model_config = replace(model_config, max_positions=positions)
    shapes = hf_shapes(model_config)
    size = sum(map(prod, shapes.values())) * dtype.itemsize
    tensors = _hf_tensors(weights, model_config, dtype)
    tensors = track_tensors(tensors, "export: written", len(shapes), size, context.log)
    counts = write_weights(out, tensors, index=HF_INDEX)
    exported = longgen_config(model_config, fetched)
    exported.architectures = [LongGenForCausalLM.__name__]
    exported.auto_map = AUTO_MAP
    exported.dtype = dtype
    exported.save_pretrained(out)
    save_tokenizer(fetched, out)
    check_saved(out)
    copied = {path for pattern in COPIED for path in fetched.glob(pattern) if path.is_file()}
    for path in (*sorted(copied), *python_files()):
        shutil.copyfile(path, out / path.name)
    for name, key in LENGTHS:
        _set_length(out / name, key, model_config.max_positions)
    page = PAGE.format(
        name=config.name,
        layers=model_config.num_layers,
        full=sum(model_config.is_full),
        positions=model_config.max_positions,
        needs="{}.{}".format(*MIN_TRANSFORMERS),
    )
    (out / "README.md").write_text(page)
    context.log.info("exported %(tensors)d tensors in %(shards)d shards, %(bytes)d bytes", counts)
    return counts

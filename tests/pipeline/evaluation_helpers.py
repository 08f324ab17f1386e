"""A run's finished folders, made small, for the stages that evaluate and report it."""

import json
import logging
from dataclasses import asdict

import numpy as np

from data_prep.shards import IndexedWriter
from pipeline.hf_folder import longgen_config
from pipeline.manifest import StageContext
from pipeline.schema import Config
from pipeline.schema_of_eval import EvalSection, NiahSection, PerplexitySection
from pipeline.stages.export import AUTO_MAP, python_files
from tests.data_prep.helpers import save_model_folder
from tests.tiny import tiny_config, tiny_llama

VOCABULARY = 512


def small_config() -> Config:
    """Perplexity on two documents of 60 tokens, needles at two lengths and two depths."""
    config = Config(name="small", device="cpu")
    config.model.name, config.wandb.mode = "tiny", "disabled"
    config.model.max_positions = 32
    config.data.seq_length = 64
    config.export.dtype = "fp32"
    config.eval = EvalSection(
        prefill_chunk=48,
        perplexity=PerplexitySection(documents=2, min_length=50, max_length=60, bucket=16),
        niah=NiahSection(lengths=[150, 170], depths=[0, 50], samples=1),
    )
    return config


def held_out(lengths=(40, 80, 300, 60, 55), seed=0) -> list[np.ndarray]:
    """Documents of random ids, <bos> (0) first."""
    rng = np.random.default_rng(seed)
    return [np.concatenate([[0], rng.integers(2, 350, n - 1)]) for n in lengths]


def write_held_out(folder, documents) -> None:
    """held_out_documents.* as data_prep writes them."""
    folder.mkdir(parents=True)
    with IndexedWriter(folder / "held_out_documents", "uint16") as writer:
        for document in documents:
            writer.add(document)
    names = [{"id": str(i), "source": "s", "tokens": len(d)} for i, d in enumerate(documents)]
    (folder / "held_out_documents.json").write_text(json.dumps(names))


def write_inputs(root) -> None:
    """fetch, data_prep and export folders of a tiny model with random weights."""
    base = tiny_config(vocab_size=VOCABULARY)
    tiny_llama(base).save_pretrained(save_model_folder(root / "fetch" / "model"))
    write_held_out(root / "data_prep", held_out())
    hybrid = tiny_config(vocab_size=VOCABULARY, is_full=(False, True, True, False))
    out = root / "export"
    tiny_llama(hybrid, seed=1).save_pretrained(out)
    config = longgen_config(hybrid)
    config.auto_map = AUTO_MAP
    config.save_pretrained(out)
    for path in python_files():
        (out / path.name).write_bytes(path.read_bytes())
    for stage in ("fetch", "export"):
        (root / stage / "manifest.json").write_text(json.dumps({"id": f"{stage}-id"}))


def context(root, config, stage) -> StageContext:
    """A stage's context whose folders are those of `root`."""
    out = root / f"{stage}.partial"
    out.mkdir(exist_ok=True)
    return StageContext(config, out, lambda name: root / name, logging.getLogger("test"))


def write_manifests(root, seconds: dict[str, float], counts: dict[str, dict]) -> None:
    """A manifest per stage with these seconds and counts."""
    for stage, value in seconds.items():
        (root / stage).mkdir(parents=True, exist_ok=True)
        manifest = {
            "stage": stage,
            "seconds": value,
            "counts": counts.get(stage, {}),
            "versions": {"torch": "9.8.7"},
        }
        (root / stage / "manifest.json").write_text(json.dumps(manifest))


def exported_config(**changes) -> dict:
    """config.json of an exported hybrid of four layers."""
    shape = tiny_config(**{"is_full": (False, True, True, False), **changes})
    values = longgen_config(shape).to_dict()
    assert values["pattern"] == asdict(shape.pattern)
    return values

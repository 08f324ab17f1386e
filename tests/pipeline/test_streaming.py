"""Convert and export pass a model on in little memory: tensor by tensor, shard by shard."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.mapping import megatron_shape, megatron_to_hf_names
from pipeline import hf_folder
from pipeline.manifest import StageContext
from pipeline.schema import DIMENSIONS, Config, ModelSection
from pipeline.stages import convert, export
from tests.data_prep.helpers import save_model_folder
from tests.memory import measure, sparse_llama

ROPE = {"rope_type": "default", "rope_theta": 1e4}
# 62 MB in bfloat16; its largest tensors are 4.2 MB.
WIDE = ModelConfig(
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1792,
    num_heads=4,
    num_kv_heads=1,
    head_dim=128,
    vocab_size=4096,
    max_positions=4096,
    norm_eps=1e-5,
    tie_embeddings=False,
    rope=ROPE,
    sparse_rope=ROPE,
    is_full=(True,) * 8,
)
SHARD = 16 * 2**20


def stage_context(root: Path, stage: str, model: ModelConfig, source="finetune") -> StageContext:
    """The stage's context over the folders of `root`; its own is made."""
    shape = {key: getattr(model, key) for key in DIMENSIONS}
    section = ModelSection(name="wide", source="folder", norm_eps=model.norm_eps, **shape)
    config = Config(name="test", model=section)
    config.export.source, config.export.dtype = source, "bf16"
    (root / stage).mkdir()
    log = logging.getLogger("test.streaming")
    return StageContext(config, root / stage, lambda name: root / name, log)


def run_convert(root: Path, model: ModelConfig) -> dict:
    return convert.run(stage_context(root, "convert", model))


def run_export(root: Path, model: ModelConfig, source: str) -> dict:
    return export.run(stage_context(root, "export", model, source))


def small_shards() -> None:
    """In the measured process: shards of SHARD bytes, and all imported that a stage imports."""
    import pipeline.training.checkpoint  # noqa: F401

    torch.set_num_threads(1)
    # The comparison of logits takes one layer, and has a bound of its own.
    hf_folder.MAX_COMPARED_BYTES = 0
    for stage in (convert, export):
        stage.write_weights = partial(stage.write_weights, shard_bytes=SHARD)


def whole_model_at_once() -> None:
    """The mistake: a dict of the model's tensors before the first is written."""
    small_shards()
    for stage in (convert, export):
        write = stage.write_weights
        stage.write_weights = lambda out, tensors, write=write, **how: write(
            out, dict(tensors).items(), **how
        )


def bound(model: ModelConfig, folder: Path, element: int) -> int:
    """Twice the largest shard written, and the largest tensor read, of `element` bytes each."""
    shapes = (megatron_shape(name, model) for name in megatron_to_hf_names(model))
    tensor = max(torch.Size(shape).numel() for shape in shapes) * element
    return 2 * max(path.stat().st_size for path in folder.glob("*.safetensors")) + tensor


def finetuned(root: Path, model: ModelConfig, group) -> None:
    """A finetune folder with one checkpoint: masters and both moments, as one process writes."""
    from pipeline.training.engine import MOMENTS
    from pipeline.training.shard_store import Piece, write_pieces

    folder = root / "finetune" / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    model.save(root / "finetune" / "model.json")
    pieces = []
    for name in megatron_to_hf_names(model):
        whole = megatron_shape(name, model)
        for kind in ("master", *MOMENTS):
            pieces.append(Piece(f"{kind}.{name}", whole, (0,) * len(whole), torch.zeros(whole)))
    write_pieces(folder, pieces, group)
    (folder.parent / "latest").write_text(folder.name)


@pytest.mark.parametrize("prepare", [small_shards, whole_model_at_once])
def test_convert_holds_less_than_two_shards_and_a_tensor(tmp_path, prepare):
    sparse_llama(tmp_path / "fetch" / "model", WIDE, 2**30)
    found = measure(run_convert, tmp_path, WIDE, prepare=prepare)
    assert found["result"]["shards"] > 3
    assert (found["anonymous"] < bound(WIDE, tmp_path / "convert", 2)) == (prepare is small_shards)
    # The libraries' code, and of the files nothing.
    assert found["mapped_files"] < 2 * SHARD


@pytest.mark.parametrize("prepare", [small_shards, whole_model_at_once])
def test_export_of_a_checkpoint_does_too(tmp_path, prepare, layout):
    sparse_llama(save_model_folder(tmp_path / "fetch" / "model"), WIDE, 2**30)
    finetuned(tmp_path, WIDE, layout.host_group)
    found = measure(run_export, tmp_path, WIDE, "finetune", prepare=prepare)
    assert found["result"]["shards"] > 3
    assert (found["anonymous"] < bound(WIDE, tmp_path / "export", 4)) == (prepare is small_shards)
    assert found["mapped_files"] < 2 * SHARD

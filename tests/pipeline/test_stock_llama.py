"""An all-full export as a plain Llama; and the base of the demo, which was made so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaForCausalLM

from model.mapping import config_from_hf
from pipeline.hf_folder import longgen_config
from pipeline.schema import ModelSection, section_shape
from pipeline.stages.fetch import local_path
from pipeline.stock_llama import save_stock_llama
from tests.closeness import assert_close_by_norm
from tests.data_prep.helpers import save_model_folder
from tests.tiny import tiny_config, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "model/demo_base"


def export(folder, **changes):
    """A folder as the stage writes it, and the Llama whose weights it has."""
    shape = tiny_config(**changes)
    llama = tiny_llama(shape)
    llama.save_pretrained(save_model_folder(folder))
    longgen_config(shape).save_pretrained(folder)
    return llama


def test_the_folder_is_that_llama(tmp_path):
    llama = export(tmp_path / "export", kv_heads=4)
    command = [sys.executable, "-m", "pipeline.stock_llama"]
    command += [str(tmp_path / "export"), str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(1, 40)[None]
    for name, tensor in llama.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert_close_by_norm(found(ids).logits, llama(ids).logits, 1e-5)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert config_from_hf(values) == config_from_hf(llama.config.to_dict())
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not list((tmp_path / "out").glob("*.py"))


def test_sparse_layers_and_other_folders_are_refused(tmp_path):
    export(tmp_path / "export", is_full=(False, True, True, False))
    with pytest.raises(ValueError, match="2 of 4 layers are sparse.*train with schedule.full=all"):
        save_stock_llama(tmp_path / "export", tmp_path / "out")
    for folder in (tmp_path / "gone", BASE):
        with pytest.raises(ValueError, match="is no export; must be a run's folder export"):
            save_stock_llama(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_demos_base_is_small_and_of_its_recipes_shape():
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 4_000_000
    section = ModelSection(**OmegaConf.load(ROOT / "conf/model/demo.yaml"))
    values = json.loads((BASE / "config.json").read_text())
    assert config_from_hf(values) == section_shape(section)
    assert len(AutoTokenizer.from_pretrained(BASE)) == section.vocab_size
    card = (BASE / "README.md").read_text()
    train = OmegaConf.load(ROOT / "conf/experiment/demo_base.yaml").train
    steps, tokens = re.search(r"([\d,]+) steps of\s+([\d,]+) tokens", card).groups()
    assert (steps, tokens) == (f"{train.steps:,}", f"{train.rows_per_step * 256:,}")


def test_a_source_of_the_repository_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("model/demo_base") == BASE
    (tmp_path / "model/demo_base").mkdir(parents=True)
    assert local_path("model/demo_base") == Path("model/demo_base")
    assert local_path("gone/away") == Path("gone/away")

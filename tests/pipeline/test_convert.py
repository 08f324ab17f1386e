import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.mapping import MappingError, megatron_to_hf_names, split
from model.weights import WeightFolder, WeightsError, iterate_weights, read_weight
from pipeline import hf_folder
from pipeline.hf_folder import load_source
from pipeline.manifest import StageContext, StageError
from pipeline.model_source import read_config
from pipeline.schema import Config, ModelSection
from pipeline.stages import convert

SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 67,
    "max_positions": 128,
    "norm_eps": 1e-5,
    "rope_base": 1e4,
}


def save_llama(folder: Path, tied: bool = False, **saving) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=67,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, **saving)
    return model


def edit_weights(folder: Path, **changes) -> None:
    """Set tensors of model.safetensors by name (with _ for .), or remove them with None."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def context(tmp_path) -> StageContext:
    (tmp_path / "fetch").mkdir()
    (tmp_path / "out").mkdir()
    section = ModelSection(name="tiny", source="random", **SHAPE)
    return StageContext(
        config=Config(name="test", model=section),
        out=tmp_path / "out",
        folder=lambda name: tmp_path / name,
        log=logging.getLogger("test"),
    )


@pytest.fixture
def source(context) -> Path:
    return context.folder("fetch") / "model"


def assert_converted(context: StageContext, model: LlamaForCausalLM) -> None:
    config = ModelConfig.load(context.out / "model.json")
    found = {}
    for name, tensor in iterate_weights(context.out):
        found |= split(name, tensor, config)
    state = model.state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_folder_gives_back_every_tensor(context, source, tied, shards, dtype):
    context.config.model.tie_embeddings = tied
    model = save_llama(source, tied).to(dtype)
    model.save_pretrained(source, max_shard_size="8KB" if shards == "many" else "1GB")
    if shards == "many":
        (source / "model.safetensors").unlink(missing_ok=True)
        assert len(list(source.glob("*.safetensors"))) > 3
    counts = convert.run(context)
    assert_converted(context, model)
    assert counts["bit_exact"] == 3 * 9 + 2 + (not tied)
    assert counts["tensors"] == 3 * 6 + 2 + (not tied)
    assert counts["parameters"] == sum(p.numel() for p in model.parameters())
    config = ModelConfig.load(context.out / "model.json")
    assert config.is_full == (True,) * 3
    assert dict(config.rope) == dict(config.sparse_rope)


def test_bits_survive_that_compare_unequal(context, source):
    """NaN and negative zero are carried over, and count as equal to themselves."""
    save_llama(source)
    edit_weights(source, model__norm__weight=torch.tensor([float("nan"), -0.0] * 16))
    convert.run(context)
    norm = read_weight(context.out, "decoder.final_layernorm.weight")
    assert norm[0].isnan() and torch.signbit(norm[1])


@pytest.mark.parametrize("field", [*SHAPE, "tie_embeddings"])
def test_another_shape_in_config_is_refused_before_any_work(context, source, field):
    save_llama(source)
    value = getattr(context.config.model, field)
    setattr(context.config.model, field, not value if isinstance(value, bool) else value * 2)
    with pytest.raises(StageError, match=f"another shape: model.{field}: found .*, expected"):
        convert.run(context)
    assert not any(context.out.iterdir())


def test_another_shape_of_a_tensor_is_refused(context, source):
    save_llama(source)
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(source, **{name.replace(".", "__"): torch.zeros(32, 32)})
    with pytest.raises(StageError, match=rf"{name}: found \(32, 32\), expected \(16, 32\)"):
        convert.run(context)
    assert not any(context.out.iterdir())


def test_missing_and_unexpected_tensors_are_named(context, source):
    save_llama(source)
    edit_weights(
        source,
        model__layers__2__mlp__up_proj__weight=None,
        model__layers__3__mlp__up_proj__weight=torch.zeros(1),
    )
    with pytest.raises(StageError) as error:
        convert.run(context)
    assert "1 missing (model.layers.2.mlp.up_proj.weight)" in str(error.value)
    assert "1 unexpected (model.layers.3.mlp.up_proj.weight)" in str(error.value)
    assert not any(context.out.iterdir())


def test_rope_buffers_and_a_copy_of_tied_embeddings_are_ignored(context, source):
    context.config.model.tie_embeddings = True
    model = save_llama(source, tied=True)
    embedding = model.model.embed_tokens.weight.detach()
    extra = {
        "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4),
        "lm_head__weight": embedding.clone(),
    }
    edit_weights(source, **extra)
    assert len(convert.run(context)["ignored"]) == 2
    assert_converted(context, model)
    edit_weights(source, lm_head__weight=embedding + 1)
    with pytest.raises(StageError, match=r"1 unexpected \(lm_head\.weight\)"):
        convert.run(context)


def test_quantised_tensors_are_refused(context, source):
    save_llama(source)
    edit_weights(source, model__norm__weight=torch.ones(32, dtype=torch.int8))
    with pytest.raises(
        StageError, match=r"model\.norm\.weight is stored as I8; must be one of F32"
    ):
        convert.run(context)


def test_truncated_safetensors_are_named(context, source):
    save_llama(source)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: truncated"):
        convert.run(context)
    assert not any(context.out.iterdir())


def test_pickles_need_permission(context, source):
    model = save_llama(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin.*model\.allow_pickle=true"):
        convert.run(context)
    assert not any(context.out.iterdir())
    context.config.model.allow_pickle = True
    convert.run(context)
    assert_converted(context, model)


def test_unreadable_config_and_other_architectures(context, source):
    with pytest.raises(StageError, match=r"config\.json: cannot be read"):
        convert.run(context)
    save_llama(source)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"model_type": "mistral"}))
    with pytest.raises(MappingError, match="model_type='mistral'"):
        convert.run(context)
    (source / "config.json").write_text('{"model_type"')
    with pytest.raises(StageError, match=r"config\.json: cannot be read as JSON"):
        convert.run(context)


def test_verification_finds_one_changed_bit(context, source):
    save_llama(source)
    convert.run(context)
    config = ModelConfig.load(context.out / "model.json")
    weights = WeightFolder(source)
    assert convert.verify(context.out, weights, config, context.log) == 30
    path = context.out / "weights-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StageError, match="read back differs from"):
        convert.verify(context.out, weights, config, context.log)


def test_depends_on_the_shape_and_not_on_the_source(context):
    before = convert.depends_on(context.config)
    context.config.model.source = "elsewhere"
    context.config.train.steps += 1
    assert convert.depends_on(context.config) == before
    json.dumps(before)
    context.config.model.num_layers += 1
    assert convert.depends_on(context.config) != before


def test_order_is_that_of_the_forward_pass(context, source):
    save_llama(source)
    shutil.rmtree(context.out)
    context.out.mkdir()
    convert.run(context)
    config = ModelConfig.load(context.out / "model.json")
    index = json.loads((context.out / "weights.index.json").read_text())["weight_map"]
    assert list(index) == list(megatron_to_hf_names(config))


def test_weights_of_several_dtypes_keep_every_bit(context, source):
    model = save_llama(source)
    dtypes = {"q_proj": torch.float16, "k_proj": torch.bfloat16, "up_proj": torch.bfloat16}
    stored = load_file(source / "model.safetensors")
    for name in stored:
        stored[name] = stored[name].to(dtypes.get(name.split(".")[-2], torch.float32))
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    counts = convert.run(context)
    assert counts["bit_exact"] == len(stored) and counts["compared_logits"]
    exact = {name: tensor.float() for name, tensor in stored.items()}
    model.load_state_dict(exact)
    assert_converted(context, model)
    base = load_source(source)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in exact.items())


def test_settings_read_otherwise_than_transformers_reads_them_are_found(
    context, source, monkeypatch
):
    save_llama(source)
    wrong = replace(read_config(source), rope={"rope_type": "default", "rope_theta": 1e5})
    monkeypatch.setattr(hf_folder, "read_config", lambda folder: wrong)
    with pytest.raises(StageError, match="differ from transformers' by .*read otherwise"):
        convert.run(context)


def test_when_logits_are_not_compared(context, source, monkeypatch, caplog):
    save_llama(source)
    (source / "model.safetensors").rename(source / "other.safetensors")
    assert convert.run(context)["compared_logits"] is False
    assert "not compared with transformers'" in caplog.text
    (source / "other.safetensors").rename(source / "model.safetensors")
    monkeypatch.setattr(hf_folder, "MAX_COMPARED_BYTES", 1000)
    assert convert.run(context)["compared_logits"] is False

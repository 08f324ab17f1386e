import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from model import random_llama
from model.config import ModelConfig
from model.mapping import config_from_hf
from model.random_llama import save_random_llama, train_tokenizer


def shape(**changes) -> ModelConfig:
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "max_positions": 128,
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "rope": rope,
        "sparse_rope": rope,
        "is_full": (True, True),
    }
    return ModelConfig(**values | changes)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(random_llama, "TRAINING_BYTES", 200_000)


def test_folder_has_the_shape_asked_for_and_is_reproducible(tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for name in "ab":
        save_random_llama(shape(), tmp_path / name)
    save_random_llama(shape(), tmp_path / "c", seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b, c = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in "abc")
    assert config_from_hf(a.config.to_dict()) == shape()
    for name, tensor in a.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, b.state_dict()[name]), name
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(a.state_dict()[weight], c.state_dict()[weight])
    texts = [(tmp_path / name / "tokenizer.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]


def test_tokenizer_is_lossless_and_starts_like_llama(tmp_path):
    save_random_llama(shape(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 300
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "def f(x):\n\treturn 12345  # caf\u00e9 \u4f60\u597d \x00\x07 \U0001f600 </x>"
    ids = tokenizer(text).input_ids
    assert ids[0] == 1 and 1 not in ids[1:]
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]
    # Trained: fewer tokens than bytes.
    assert len(ids) < len(text.encode())


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=258: must be at least 259.*model.vocab_size"):
        train_tokenizer(258, 128)
    assert len(train_tokenizer(259, 128)) == 259

# ruff: noqa: E402
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from model import gguf_import
from model.gguf_import import GGUFError, import_gguf
from tests.closeness import assert_close_by_norm

SPECIAL = ["<unk>", "<s>", "</s>"]
MERGES = ["1 2", "\u0120 \u0120"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(TOKENS),
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, quantised: bool = False, **changes) -> None:
    """A GGUF file of a Llama as llama.cpp writes it. `changes`: keys to set, or drop with None."""
    config = model.config
    values = {
        "architecture": "llama",
        "pre": "smollm",
        "bos": 1,
        "scaling": None,
        "rotated": 16,
        "layers": 2,
        "extra": None,
        "drop": None,
    } | changes
    writer = GGUFWriter(path, values["architecture"])
    writer.add_name("tiny")
    writer.add_block_count(values["layers"])
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(values["rotated"])
    if values["scaling"]:
        writer.add_string("llama.rope.scaling.type", values["scaling"])
        writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(values["pre"])
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    if values["bos"] is not None:
        writer.add_bos_token_id(values["bos"])
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, array = gguf_tensor(name, tensor)
        if name == values["drop"]:
            continue
        if quantised and array.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    if values["extra"]:
        writer.add_tensor(values["extra"], np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensor(name: str, tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """Name and values in a GGUF file: the rows of q and k are paired for interleaved RoPE."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    array = tensor.detach().float().numpy()
    if name in top:
        return top[name], array
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
    if heads:
        array = array.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(array.shape).copy()
    return f"blk.{layer}.{PARTS[part]}.weight", array


@pytest.mark.parametrize("tied", [False, True])
def test_imported_model_is_the_original_in_bfloat16(tmp_path, tied):
    model = llama(tied)
    write_gguf(tmp_path / "tiny.gguf", model)
    counts = import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    assert counts["quantisation"] == {"F32": 2 * 9 + 2 + (not tied)}
    imported = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(imported.state_dict()[name], tensor.bfloat16().float()), name
    for key in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "head_dim"):
        assert getattr(imported.config, key) == getattr(model.config, key), key
    assert imported.config.tie_word_embeddings == tied
    assert (imported.config.bos_token_id, imported.config.eos_token_id) == (1, 2)
    # Rounding the original's weights is all that the import has done to its logits.
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    ids = torch.arange(40).reshape(1, -1)
    with torch.no_grad():
        assert_close_by_norm(imported(ids).logits, model(ids).logits, 1e-5)


def test_quantised_tensors_equal_what_transformers_imports(tmp_path):
    model = llama(True)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, quantised=True)
    counts = import_gguf(path, tmp_path / "hf")
    assert counts["quantisation"] == {"Q8_0": 2 * 7 + 1, "F32": 5}
    imported = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert len(theirs) == 20
    for name, tensor in theirs.items():
        assert torch.equal(imported[name], tensor.bfloat16().float()), name
    original = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    kind = GGMLQuantizationType.Q8_0
    rounded = torch.from_numpy(dequantize(quantize(original, kind), kind)).bfloat16().float()
    assert torch.equal(imported["model.layers.0.mlp.up_proj.weight"], rounded)
    assert not np.array_equal(rounded.numpy(), original)


def test_digits_are_split_again(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama(True))
    import_gguf(path, tmp_path / "hf")
    raw = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    mended = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert raw.convert_ids_to_tokens(raw("x12").input_ids) == ["x", "12"]
    assert mended.convert_ids_to_tokens(mended("x12").input_ids) == ["x", "1", "2"]
    assert mended.convert_ids_to_tokens(mended("  3").input_ids) == ["\u0120\u0120", "3"]
    assert mended.decode(mended(gguf_import.PROBE).input_ids) == gguf_import.PROBE
    assert (mended.unk_token, mended.bos_token, mended.eos_token) == tuple(SPECIAL)
    assert mended.decode(mended("a \u2581 b").input_ids) == "a \u2581 b"
    assert mended.model_max_length == 256


def test_a_vocabulary_that_needs_no_mending_is_kept(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama(True), pre="gpt-2")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    kept = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert kept.convert_ids_to_tokens(kept("x12").input_ids) == ["x", "12"]


def test_linear_rope_scaling_travels(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama(True), scaling="linear")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    rope = LlamaConfig.from_pretrained(tmp_path / "hf").rope_parameters
    assert rope == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "qwen2"}, "general.architecture='qwen2'; must be 'llama'"),
        ({"pre": "qwen2"}, "splits text as 'qwen2'; must be"),
        ({"bos": None}, "no bos token"),
        ({"scaling": "yarn"}, "scaling 'yarn'; must be"),
        ({"rotated": 8}, "rope of 8 of 16 dimensions"),
        ({"extra": "rope_freqs.weight"}, "unexpected: .'rope_freqs.weight'"),
        ({"extra": "blk.0.attn_q.bias"}, "unexpected: .'blk.0.attn_q.bias'"),
        ({"drop": "blk.1.ffn_up.weight"}, "missing: .'blk.1.ffn_up.weight'"),
        ({"drop": "token_embd.weight"}, "lacks token_embd.weight"),
        ({"layers": 1}, "unexpected: .'blk.1.attn_k.weight'"),
    ],
)
def test_refusals_name_file_value_and_remedy(tmp_path, changes, message):
    write_gguf(tmp_path / "tiny.gguf", llama(True), **changes)
    with pytest.raises(GGUFError, match=f"tiny.gguf.*{message}"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")


def test_misshapen_tensor_is_refused(tmp_path):
    model = llama(True)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(32))
    write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(GGUFError, match=r"output_norm\.weight: shape \(32,\); must be \(64,\)"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")


@pytest.mark.parametrize("keep", [0, 3, 100, 6000, -1000])
def test_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama(True))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GGUFError, match=r"tiny\.gguf: truncated"):
        import_gguf(path, tmp_path / "hf")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "tensors that differ: .'model.layers.0.mlp.up_proj.weight'.,"),
        ("config", "tensors that differ: .., logits of the same weights equal: False"),
        ("tokenizer", "token ids equal: False"),
    ],
)
def test_a_saved_folder_that_differs_is_refused(tmp_path, monkeypatch, what, words):
    write_gguf(tmp_path / "tiny.gguf", llama(True))
    save = LlamaForCausalLM.save_pretrained

    def save_other(model, out):
        weight, eps = model.model.layers[0].mlp.up_proj.weight.data, model.config.rms_norm_eps
        if what == "weights":
            weight[0, 0] += 1
        else:
            model.config.rms_norm_eps = 1e-3
        save(model, out)
        model.config.rms_norm_eps = eps
        if what == "weights":
            weight[0, 0] -= 1

    if what != "tokenizer":
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_other)
    else:
        monkeypatch.setattr(gguf_import, "PROBE", "never tokenised alike")
        loaded = gguf_import.AutoTokenizer.from_pretrained

        def load_other(source, **options):
            tokenizer = loaded(source, **options)
            if "gguf_file" not in options:
                tokenizer.add_tokens(["never"])
            return tokenizer

        monkeypatch.setattr(gguf_import.AutoTokenizer, "from_pretrained", load_other)
    with pytest.raises(GGUFError, match=f"differs from the imported model.*{words}"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")

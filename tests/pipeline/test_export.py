"""The export stage: a folder that transformers and torch load alone, equal to what was trained."""

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kernels.pattern import Pattern
from model.config import ModelConfig
from model.mapping import config_from_hf, megatron_to_hf_names, merge
from model.modeling_longgen import LongGenForCausalLM
from model.weights import WeightsError, write_weights
from pipeline.hf_folder import load_source
from pipeline.manifest import StageContext, StageError
from pipeline.schema import Config, PatternSection, ScheduleSection
from pipeline.stages import export
from tests.closeness import assert_close_by_norm
from tests.model.small import PATTERNS, VOCAB, ids, widen

ROOT = Path(export.__file__).parents[2]
SPARSE = PATTERNS["per_head"]

GENERATE = """
import json, re, sys, torch
source, root, prompt = sys.argv[1:]
assert root not in sys.path, sys.path
exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1])
assert tokenizer("w5").input_ids == AutoTokenizer.from_pretrained(source)("w5").input_ids == [5]
assert tokenizer.decode([5, 6]) == "w5 w6"
found = model.generate(torch.tensor([json.loads(prompt)]), max_new_tokens=16, do_sample=False)
ours = {name for name in sys.modules if name.split(".")[0] in ("model", "kernels", "pipeline")}
assert not ours, ours
cache = model(found, use_cache=True).past_key_values
print(found[0].tolist(), cache.live_bytes(0), model.dtype)
"""


def make_source(folder: Path, tied: bool = False) -> LlamaForCausalLM:
    """A stock Llama folder with tokenizer and generation_config."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=[2, 0],
    )
    llama = LlamaForCausalLM(config).eval()
    widen(llama)
    llama.generation_config.temperature = 0.25
    llama.generation_config.do_sample = True
    llama.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    (folder / "pickled.bin").write_bytes(b"not to be copied")
    return llama


def megatron_weights(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The stock folder's shape and Megatron tensors."""
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    names = megatron_to_hf_names(config).items()
    return config, {name: merge(name, [tensors[p] for p in parts], config) for name, parts in names}


@pytest.fixture
def make(tmp_path):
    """A maker of contexts: fetch and convert are there; keywords change the configuration."""

    def context(tied=False, source="convert", dtype="fp32", seq_length=1024, full="middle"):
        folders = {name: tmp_path / name for name in ("fetch", "convert", "finetune", "export")}
        for folder in folders.values():
            folder.mkdir()
        make_source(folders["fetch"] / "model", tied)
        shape, tensors = megatron_weights(folders["fetch"] / "model")
        shape.save(folders["convert"] / "model.json")
        write_weights(folders["convert"], tensors.items())
        config = Config(pattern=PatternSection(**SPARSE), schedule=ScheduleSection(full, None))
        config.export.source, config.export.dtype = source, dtype
        config.data.seq_length = seq_length
        log = logging.getLogger("test")
        return StageContext(config, folders["export"], folders.__getitem__, log)

    return context


def test_the_folder_runs_without_the_repository(make, tmp_path):
    """By the code of its own README, from the folder itself, and nothing is asked."""
    context = make(full="bottom")
    export.run(context)
    here = LongGenForCausalLM.from_pretrained(context.out)
    assert here.config.is_full == [True, True, False]
    assert here.config.pattern == {**here.config.pattern, **SPARSE}
    prompt = ids(40)
    source = context.folder("fetch") / "model"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, str(source), str(ROOT), str(prompt.tolist())],
        cwd=context.out,
        stdin=subprocess.DEVNULL,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "trust_remote_code" not in result.stdout + result.stderr
    expected = here.generate(prompt[None], max_new_tokens=16, do_sample=False)
    cache = here(expected, use_cache=True).past_key_values
    last = result.stdout.strip().splitlines()[-1]
    assert last == f"{expected[0].tolist()} {cache.live_bytes(0)} torch.float32"


def test_the_readme_shows_the_exports_own_code():
    def code(page):
        return re.search(r"```python\n(from transformers.*?)```", page, re.DOTALL)[1]

    here = code((ROOT / "README.md").read_text())
    assert re.sub("folder = .*", 'folder = "."  # this folder', here) == code(export.PAGE)


def test_files_are_copied_byte_for_byte(make):
    context = make()
    counts = export.run(context)
    names = {path.name for path in context.out.iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert {"modeling_longgen.py", "cache.py", "tokens.py", "rope.py"} <= code
    assert {"pattern.py", "sparse_attention.py", "dense.py", "tiled.py"} <= code
    for name in code:
        folder = "model" if (ROOT / "model" / name).exists() else "kernels"
        assert (context.out / name).read_bytes() == (ROOT / folder / name).read_bytes()
    fetched = context.folder("fetch") / "model"
    for name in ("tokenizer.json", "generation_config.json"):
        assert (context.out / name).read_bytes() == (fetched / name).read_bytes()
    weights = {name for name in names if name.endswith((".safetensors", ".bin", ".pt"))}
    assert weights == {"model-00001.safetensors"}
    assert "weights.index.json" not in names
    assert counts["shards"] == 1 and counts["tensors"] == 3 + 3 * 9


def test_the_exports_lengths_are_its_own(make):
    """The base's would cut texts with truncation=True, and refuse to generate from long ones."""
    context = make(seq_length=200)
    fetched = context.folder("fetch") / "model"
    for name, key in (
        ("tokenizer_config", "model_max_length"),
        ("generation_config", "max_length"),
    ):
        values = json.loads((fetched / f"{name}.json").read_text()) | {key: 64}
        (fetched / f"{name}.json").write_text(json.dumps(values))
    export.run(context)
    tokenizer = AutoTokenizer.from_pretrained(context.out)
    model = LongGenForCausalLM.from_pretrained(context.out)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 200
    assert model.generation_config.max_length == 200
    assert model.generation_config.temperature == 0.25
    assert model.generate(ids(1, 190), do_sample=False, eos_token_id=-1).shape == (1, 200)
    assert "transformers 5." in (context.out / "README.md").read_text()


def test_lengths_that_the_base_does_not_state_stay_out(make):
    context = make(seq_length=200)
    fetched = context.folder("fetch") / "model"
    export.run(context)
    # Special tokens that the base's files leave to a class are named.
    for name, added in (("tokenizer_config", {"bos_token"}), ("generation_config", set())):
        base, own = (
            json.loads((folder / f"{name}.json").read_text()) for folder in (fetched, context.out)
        )
        assert own.keys() - base.keys() == added


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1"])
def test_an_older_transformers_is_told_so_at_load(monkeypatch, version):
    # Of what `import transformers` gives here: some of its imports put another module in its place.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    code = (ROOT / "model" / "configuration_longgen.py").read_text()
    with pytest.raises(ImportError, match=f"transformers {version} cannot load.*or newer; pip"):
        exec(compile(code.replace("from .pattern", "from kernels.pattern"), "copy", "exec"), {})


def test_a_loaded_export_is_saved_again_with_its_code(make, tmp_path, monkeypatch):
    """As trainers do: the copy loads and computes the same."""
    context = make()
    export.run(context)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("sys.path", sys.path[:])
    loaded = AutoModelForCausalLM.from_pretrained(context.out, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(ids(1, 90)).logits, loaded(ids(1, 90)).logits)
    assert type(again).__module__.startswith("transformers_modules")


def test_copied_files_import_relatively_only():
    allowed = {"__future__", "collections", "dataclasses", "functools", "importlib", "inspect"}
    allowed |= {"itertools", "json", "logging", "math", "numpy", "os", "torch", "transformers"}
    allowed |= {"triton", "typing"}
    for path in export.python_files():
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and not words[1].startswith("."):
                assert words[1].split(".")[0] in allowed, (path.name, line)
            # Of "from . import NAME" neither transformers nor the stage sees what it needs.
            assert words[:2] != ["from", "."], (path.name, line)


@pytest.mark.parametrize("tied", [True, False])
def test_all_layers_full_is_the_stock_model(make, tied):
    context = make(tied=tied, full="all")
    export.run(context)
    llama = LlamaForCausalLM.from_pretrained(context.folder("fetch") / "model").eval()
    exported = LongGenForCausalLM.from_pretrained(context.out).eval()
    assert exported.config.tie_word_embeddings == tied
    assert_close_by_norm(exported(ids(2, 90)).logits, llama(ids(2, 90)).logits, 1e-5)
    config = exported.config
    assert (config.bos_token_id, config.eos_token_id) == (1, [2, 0])
    assert exported.generation_config.temperature == 0.25
    for name, tensor in llama.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name


def test_the_source_loads_with_every_layer_full(make):
    context = make(tied=True)
    folder = context.folder("fetch") / "model"
    llama = LlamaForCausalLM.from_pretrained(folder).eval()
    ours = load_source(folder)
    assert ours.config.is_full == [True] * 3
    assert_close_by_norm(ours(ids(1, 90)).logits, llama(ids(1, 90)).logits, 1e-5)
    assert load_source(folder, torch.bfloat16).dtype == torch.bfloat16


def test_a_pickled_source_loads_only_where_allowed(make):
    folder = make().folder("fetch") / "model"
    llama = LlamaForCausalLM.from_pretrained(folder).eval()
    (folder / "model.safetensors").unlink()
    torch.save(llama.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickled"):
        load_source(folder)
    ours = load_source(folder, allow_pickle=True)
    assert torch.equal(ours.lm_head.weight, llama.lm_head.weight)


def test_finetuned_weights_and_shape_are_exported(make, monkeypatch):
    context = make(source="finetune", dtype="bf16", seq_length=4096)
    shape, tensors = megatron_weights(context.folder("fetch") / "model")
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    pattern = Pattern(sink_tokens=1, window=5, block=2)
    sparse_rope = {"rope_type": "default", "rope_theta": 1e6}
    hybrid = replace(shape, is_full=(False, False, True), pattern=pattern, sparse_rope=sparse_rope)
    hybrid.save(context.folder("finetune") / "model.json")

    def read_weights(folder):
        assert folder == context.folder("finetune")
        # A checkpoint names tensors in an order of its own.
        return reversed(trained.items())

    monkeypatch.setattr("pipeline.training.checkpoint.read_weights", read_weights)
    export.run(context)
    config = json.loads((context.out / "config.json").read_text())
    assert config["is_full"] == [False, False, True]
    assert config["pattern"]["window"] == 5
    assert config["rope"]["rope_theta"] == 5e4
    assert config["sparse_rope"] == sparse_rope
    assert config["max_position_embeddings"] == 4096
    assert config["dtype"] == "bfloat16"
    stock = load_file(context.folder("fetch") / "model" / "model.safetensors")
    with safe_open(context.out / "model-00001.safetensors", "pt") as file:
        assert set(file.keys()) == set(stock)
        for name, tensor in stock.items():
            assert torch.equal(file.get_tensor(name), (tensor + 1).bfloat16()), name


def test_inputs_and_dependencies_follow_the_source():
    config = Config()
    assert export.inputs(config) == ("fetch", "convert", "finetune")
    before = export.depends_on(config)
    config.schedule.full = "top"
    assert export.depends_on(config) == before
    config.export.source = "convert"
    assert export.inputs(config) == ("fetch", "convert")
    before = export.depends_on(config)
    config.pattern.window = 7
    assert export.depends_on(config) != before
    json.dumps(before)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("source", "teacher", "finetune or convert"), ("dtype", "int4", "bf16, fp16, fp32")],
)
def test_unknown_choices_are_refused(make, key, value, words):
    context = make()
    setattr(context.config.export, key, value)
    with pytest.raises(StageError, match=words):
        export.run(context)


def test_weights_that_are_not_whole_are_refused(make):
    context = make()
    shape, tensors = megatron_weights(context.folder("fetch") / "model")
    del tensors["decoder.layers.1.mlp.linear_fc1.weight"]
    write_weights(context.folder("convert"), tensors.items())
    with pytest.raises(StageError, match="2 tensors .* model.layers.1.mlp.gate_proj"):
        export.run(context)


def test_a_truncated_file_is_refused(make):
    context = make()
    path = next(context.folder("convert").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        export.run(context)

"""A model's folder may hold Python: none of it runs, and nobody is asked whether it may."""

import ast
import json

import pytest
from transformers import AutoTokenizer

from model.modeling_longgen import LongGenForCausalLM
from pipeline.evaluated_model import load_model
from pipeline.manifest import StageError
from pipeline.stages import evaluate, generate
from tests.data_prep.helpers import save_model_folder
from tests.pipeline.evaluation_helpers import context, small_config, write_inputs
from tests.pipeline.test_import_rules import FILES, ROOT
from tests.tiny import tiny_config, tiny_llama

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({ran!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that a folder's code would make; to any question the answer is yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "ran"


def add_code(folder, ran):
    """Name code of the folder's own for its configuration, model and tokenizer."""
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", auto_map=auto)
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
        tokenizer_class="OwnTokenizer",
    )


@pytest.mark.parametrize("kind", ["llama", "own"])
def test_code_of_a_models_folder_does_not_run(tmp_path, ran, kind):
    folder = save_model_folder(tmp_path / "other")
    tiny_llama(tiny_config(vocab_size=512)).save_pretrained(folder)
    add_code(folder, ran)
    edit(folder / "config.json", model_type=kind)
    write_inputs(tmp_path)
    add_code(tmp_path / "fetch" / "model", ran)
    config = small_config()
    config.eval.folders, config.eval.models = {"other": str(folder)}, ["other"]
    config.generate.prompt, config.generate.model = "The quick", "base"
    for stage in (evaluate, generate):
        try:
            stage.run(context(tmp_path, config, stage.__name__.rpartition(".")[2]))
        except (StageError, ValueError) as error:
            assert "trust_remote_code" in str(error) or "without code of its own" in str(error)
    assert not ran.exists()
    # The code does work.
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


def test_the_export_is_loaded_by_its_own_class(tmp_path, ran):
    write_inputs(tmp_path)
    copy = tmp_path / "export" / "modeling_longgen.py"
    copy.write_text(f"open({str(ran)!r}, 'w')\n" + copy.read_text())
    assert type(load_model("final", context(tmp_path, small_config(), "evaluate"))) is (
        LongGenForCausalLM
    )
    assert not ran.exists()


def test_every_auto_class_is_told_to_run_no_code():
    calls = [
        (path, node)
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and getattr(node.func.value, "id", "").startswith("Auto")
    ]
    assert calls
    for path, node in calls:
        given = {key.arg: getattr(key.value, "value", None) for key in node.keywords}
        assert given.get("trust_remote_code") is False or None in given, f"{path}:{node.lineno}"

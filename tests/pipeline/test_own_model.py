"""A model and texts of one's own: what is read from the folder, what is inherited, what is warned
of."""

import json
import logging
from functools import cache

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from model.config import describe_schedule, resolve_schedule
from pipeline.advice import MIN_BASES, advice, min_base
from pipeline.model_source import check_shape, read_config
from pipeline.overrides import with_experiment
from pipeline.schema import CHAIN, Config, ModelSection
from pipeline.stages import data_prep, evaluate
from pipeline.validation import ConfigError, parse
from tests.pipeline.running import ROOT, refused, run
from tests.pipeline.test_fetch import SHAPE, hf_folder

TEXT = "data.sources=[{name: mine, path: /texts}]"
OWN = ("data.seq_length=8192", TEXT)


@cache
def base(*groups):
    """As composed; some tenths of a second, so done once."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[*groups, "device=cpu"])


def recipe(experiment, *overrides):
    """The parsed configuration of a recipe with these keys set."""
    groups = [word for word in overrides if word.partition("=")[0] in ("model", "pattern")]
    keys = [word for word in overrides if word not in groups]
    composed = base(f"experiment={experiment}", *groups)
    return parse(OmegaConf.merge(composed, OmegaConf.from_dotlist(keys)))


def own(*overrides):
    return recipe("own", *OWN, *overrides)


def advised(found: Config, *arguments, stages=CHAIN) -> list[str]:
    return list(advice(found, stages, arguments))


@pytest.fixture
def llama(tmp_path):
    """A Llama's folder, of other norms and RoPE than the schema's defaults."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return hf_folder(tmp_path / "my llama", rms_norm_eps=1e-6, rope_parameters=rope)


def test_shape_and_name_are_the_folders(llama):
    found = own(f"model.source='{llama}'")
    assert {key: getattr(found.model, key) for key in SHAPE} == SHAPE
    model = found.model
    assert (model.norm_eps, model.rope_base, model.tie_embeddings) == (1e-6, 5e5, False)
    assert (found.name, model.name) == ("my-llama", "my llama")


def test_a_run_of_its_own_has_nothing_of_the_demos(llama):
    found = own(f"model.source='{llama}'", "model.num_layers=32")
    assert found.rope.base is None and found.rope.sparse_base is None
    assert (found.pattern.sink_tokens, found.pattern.window) == (64, 2048)
    kinds = resolve_schedule(found.schedule.full, found.schedule.count, 32)
    assert describe_schedule(kinds) == "S10 F12 S10"
    assert own("model=llama_1b", "name=x").model.num_layers == 16


def test_what_the_configuration_states_is_kept_and_checked_by_fetch(llama, caplog):
    section = own(f"model.source='{llama}'", "model.num_layers=3").model
    assert section.num_layers == 3
    log = logging.getLogger("test")
    with caplog.at_level("INFO"), pytest.raises(Exception, match="num_layers: found 1, expected 3"):
        check_shape(read_config(llama), section, llama, log)
    printed = yaml.safe_load(caplog.messages[0].partition("\n")[2])
    assert printed["name"] == "my-llama"
    check_shape(read_config(llama), ModelSection(**printed), llama, log)


def test_fetch_refuses_another_shape_before_data_prep(llama, tmp_path, capsys):
    keys = (f"model.source={llama}", f"outputs={tmp_path / 'out'}")
    # Also where the folder is fetched already.
    for state in ("fetch: starts", "fetch: up to date"):
        code, lines = run(capsys, *keys)
        assert code == 2 and "data_prep: starts" not in lines
        assert any(line.startswith(state) for line in lines)
        assert "model.num_layers: found 1, expected 8" in lines[-1]
        assert "set model=NAME, set model=auto for a local folder" in lines[-1]


REFUSED = {
    "model=llama_1b data.seq_length=null": r"data.seq_length: has no value; set it to the new",
    "model.source=null": r"model.source: has no value; set model.source=FOLDER",
    "model.source=NAME/MODEL": r"the shape is not stated \(model.num_layers has no value\).*"
    r"download it \(hf download NAME/MODEL --local-dir FOLDER\) and set model.source=FOLDER, or",
    "model.source=random": r"of a local folder only; choose a conf/model file with model=NAME",
    "model.source=/nowhere": r"model.source='/nowhere': is not there; must be a folder",
    "model=llama_1b data.sources=[]": r"at least one source; choose data=NAME, or set data.sources",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_model_without_a_shape_is_refused(overrides):
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        own(*overrides.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, r"my llama: config.json: model_type='qwen2': must be 'llama'"),
        ({"hidden_size": None}, r"my llama: config.json: hidden_size=None: must be a whole"),
    ],
)
def test_another_architecture_is_refused_by_name(llama, change, message):
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        own(f"model.source='{llama}'")
    path.unlink()
    with pytest.raises(ConfigError, match="config.json: cannot be read as JSON"):
        own(f"model.source='{llama}'")


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["model=llama_1b"], True),
        (["model.source=/x", "stage=plan"], True),
        (["+data.sources=[]"], True),
        (["data=stdlib", "--cfg", "job"], True),
        (["-m", "model=llama_1b,tiny"], True),
        (["model=llama_1b", "experiment=demo"], False),
        (["model.num_layers=3", "data.seq_length=64", "pattern=strided"], False),
        (["generate.prompt=model=x", "--config-name=model"], False),
        ([], False),
    ],
)
def test_a_model_or_data_without_an_experiment_is_no_demo(arguments, added):
    assert with_experiment(arguments) == [*arguments, *["experiment=own"] * added]


def test_what_an_experiment_gives_to_another_model_is_said():
    arguments = "experiment=demo", "model=llama_1b"
    told = advised(recipe("demo", "model=llama_1b"), *arguments)
    (line,) = [line for line in told if "replaced" in line]
    assert line.startswith("model replaced on the command line; the experiment still gives name=")
    assert "name=demo, rope.base=500000.0, schedule.full=[3, 4]" in line
    assert "pattern.window=128" in line
    ablation = "pattern=strided_tiny", "train.lr=1"
    assert advised(recipe("demo", *ablation), "experiment=demo", *ablation) == []
    told = advised(own("model=llama_1b"), "experiment=own", "model=llama_1b")
    assert not any("replaced" in line for line in told)


def test_lengths_follow_the_rows():
    found = own("model=llama_1b")
    assert (found.eval.perplexity.min_length, found.eval.perplexity.max_length) == (8192, 8192)
    assert found.eval.perplexity.bucket == found.train.position_bucket == 512
    assert found.eval.niah.lengths == [1024, 2048, 4096, 8192]
    assert found.eval.ruler.lengths == found.eval.babilong.lengths == [8192]
    assert own("model=llama_1b", "data.seq_length=300").eval.niah.lengths == [300]
    kept = own("model=llama_1b", "eval.perplexity.max_length=512", "eval.niah.lengths=[64]")
    assert kept.eval.perplexity.min_length == 512 and kept.eval.niah.lengths == [64]


def test_an_evaluation_that_stops_short_is_said():
    found = recipe(
        "tiny", "eval.perplexity={min_length: 256, max_length: 256}", "data.seq_length=8192"
    )
    (line,) = [line for line in advised(found) if "stops short" in line]
    assert line.startswith(
        "evaluation stops short of the 8,192 tokens of a row: eval.perplexity.max_length at 256, "
        "eval.niah.lengths at 1,024; set them, or null"
    )
    assert not any("short" in line for line in advised(found, stages=("generate",)))


def test_an_extension_without_a_rope_change_is_said():
    found = recipe("llama2_7b_128k", "rope.base=null")
    assert advised(found) == [
        "rope.base=null keeps the model's own 10000, and rows of 131,072 tokens exceed the 4,096 "
        "that the model was trained on: the lower bound for 131,072 tokens is 7.8e+06 (arXiv "
        "2405.14591); set rope.base=7.8e+06, or rope.base=10000 to keep it"
    ]
    assert "rope.base=10000 is low" in advised(recipe("demo", "rope.base=1e4"))[0]
    assert advised(recipe("demo", "rope.base=1e4"), stages=("generate",)) == []
    assert advised(recipe("llama2_7b_128k", "rope.base=8e6")) == []
    # A base above the bound already: it is raised by the ratio of the contexts.
    (line,) = advised(recipe("llama2_7b_128k", "rope.base=null", "model.rope_base=1e7"))
    assert "usually raised with the context; set rope.base=3.2e+08, or rope.base=1e+07" in line


def test_min_bases_are_the_papers_and_follow_its_definition():
    assert (min_base(32768), min_base(131072)) == (6.4e5, 7.8e6)
    assert (min_base(5000), min_base(10**7)) == (8.4e4, 5.1e8)

    def holds(base: float, length: int) -> bool:
        frequencies = base ** (-np.arange(0, 128, 2) / 128)
        return bool((np.cos(np.arange(length)[:, None] * frequencies).sum(1) >= 0).all())

    for length in (1024, 2048, 8192):
        # The table has two digits.
        assert not holds(0.95 * MIN_BASES[length], length)
        assert any(holds(step * MIN_BASES[length], length) for step in (0.99, 1, 1.01, 1.02))


def test_rows_that_a_window_covers_are_said():
    line = advised(recipe("tiny", "pattern.window=2048"))[-1]
    assert line.startswith("pattern.window=2048: with 16 sink tokens it covers rows of 1,024")


def test_an_evaluation_without_documents_is_refused_before_training(stages, at, capsys):
    def act(context):
        documents = [{"tokens": 9}, {"tokens": 40}]
        (context.out / "held_out_documents.json").write_text(json.dumps(documents))
        return {}

    stages.acts["data_prep"] = act
    stages.modules["data_prep"].check = data_prep.check
    message = refused(capsys, at.outputs)
    assert message.startswith(
        "eval.perplexity.min_length=1024: the longest of 2 held-out documents has 40 tokens; lower"
    )
    assert stages.calls == ["fetch", "data_prep"]
    assert run(capsys, at.outputs, "eval.perplexity.min_length=40")[0] == 0


def test_a_report_reads_what_was_evaluated(stages, at, capsys):
    stages.modules["evaluate"].AS_RECORDED = evaluate.AS_RECORDED
    stages.modules["evaluate"].ANOTHER = evaluate.ANOTHER
    stages.modules["report"].REMADE = True
    stages.modules["evaluate"].depends_on = lambda c: {"samples": c.eval.niah.samples}
    assert run(capsys, at.outputs, "eval.niah.samples=5")[0] == 0
    code, lines = run(capsys, at.outputs, "stage=report")
    assert code == 0 and "report: up to date, skipped" in lines[-1]
    message = refused(capsys, at.outputs)
    assert "samples: 5 -> 2" in message and "choose eval.name=NAME, which evaluates into" in message
    # Of another training it is not.
    message = refused(capsys, at.outputs, "stage=report", "train.seed=9")
    assert message.endswith("redo it first by stage=evaluate force=true")


def test_stages_that_need_no_text_need_no_source():
    assert own("model=llama_1b", "data.sources=[]", "stage=plan").data.sources == []


def test_every_open_value_of_auto_is_named_in_it():
    values = OmegaConf.load(ROOT / "conf/model/auto.yaml")
    assert set(values) == {*SHAPE, "name", "source", "norm_eps", "rope_base", "tie_embeddings"}
    assert set(values.values()) == {None}

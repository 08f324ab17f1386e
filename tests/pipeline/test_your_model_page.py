"""docs/your_model.md: its recipe composes, and its commands run one after another as they stand."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.advice import MIN_BASES
from pipeline.overrides import with_experiment
from pipeline.runner import execute
from pipeline.schema import CHAIN
from pipeline.stage_folders import stages_of
from pipeline.validation import parse
from tests.pipeline.running import ROOT, fresh_logger
from tests.pipeline.small_run import SHAPE, save_llama, save_text

PAGE = (ROOT / "docs/your_model.md").read_text()
COMMANDS = [
    words[2:]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for words in (shlex.split(line, comments=True) for line in block.splitlines())
    if words[:2] == ["python", "pipeline/run.py"]
]
# The page's run at the least cost; keys that a command sets stay as they are there.
REDUCED = {
    "device": "cpu",
    "wandb.mode": "disabled",
    "data.seq_length": "128",
    "data.workers": "1",
    "data.held_out": "0.25",
    "pattern": "sink_tiny",
    "pattern.window": "32",
    "train.steps": "2",
    "train.rows_per_step": "2",
    "train.warmup_steps": "1",
    "train.precision": "fp32",
    "export.dtype": "fp32",
    "eval.niah.samples": "1",
    "generate.max_new_tokens": "4",
}


def command(root, words, *more):
    """What pipeline/run.py composes of the page's words, folders and the recipe below `root`."""
    words = [word.replace("/models/my-llama", str(root / "my-llama")) for word in words]
    overrides = [*with_experiment(words), *more, f"hydra.searchpath=[file://{root / 'conf'}]"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=overrides)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The page's two folders, and its recipe."""
    folder = tmp_path_factory.mktemp("page")
    save_llama(folder / "my-llama")
    save_text(folder / "texts")
    recipe = re.search(r"Save this as\s+`conf/(\S+)`.*?```yaml\n(.*?)```", PAGE, re.S)
    path = folder / "conf" / recipe[1]
    path.parent.mkdir(parents=True)
    text = recipe[2].replace("/models", str(folder))
    path.write_text(text.replace("/texts", str(folder / "texts")))
    return folder


def test_commands_compose_to_the_folders_model(root):
    assert len(COMMANDS) >= 10
    # Hydra takes some tenths of a second for each: once for each recipe.
    bases = {}
    for words in COMMANDS:
        recipe = [word for word in words if word.startswith(("experiment=", "model."))]
        if recipe[0] not in bases:
            bases[recipe[0]] = command(root, words)
        words = [word for word in words if word not in recipe]
        config = parse(OmegaConf.merge(bases[recipe[0]], OmegaConf.from_dotlist(words)))
        words += recipe
        assert {key: getattr(config.model, key) for key in SHAPE} == SHAPE, words
        assert (config.data.seq_length, config.eval.perplexity.max_length) == (8192, 8192)
        assert config.rope.base == 1e5 and config.pattern.window == 2048
        assert config.name == ("mine" if "experiment=mine" in words else "my-llama")
        assert stages_of(config) in (CHAIN, (config.stage,))


def test_bounds_of_the_rope_base_are_the_codes():
    rows = re.findall(r"^\| (?:context|`rope.base`) \|( \d.*)\|$", PAGE, re.M)
    lengths, bases = ([cell.replace(",", "") for cell in row.split("|")] for row in rows)
    shown = dict(zip(map(int, lengths), map(float, bases), strict=True))
    assert shown == {length: MIN_BASES[length] for length in shown}


@pytest.mark.slow
def test_commands_run_one_after_another(root, capfd):
    for words in COMMANDS:
        given = {word.partition("=")[0] for word in words}
        keys = [f"{key}={value}" for key, value in REDUCED.items() if key not in given]
        if "experiment=mine" not in words:
            keys = ["device=cpu"]
        composed = command(root, words, *keys, f"outputs={root / 'outputs'}")
        with fresh_logger():
            assert execute(composed) == 0, (words, capfd.readouterr().out)
    run = root / "outputs/mine"
    pages = ["main/report", "main/report_long", "full/report"]
    assert all((run / page / "index.html").is_file() for page in pages)
    assert "mine/full" in (run / "main/report/index.html").read_text()
    assert "long" not in {path.name for path in run.iterdir()}

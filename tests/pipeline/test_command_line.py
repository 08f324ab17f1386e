"""A command line before there is a configuration: --help, errors, prompts, sweeps."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pipeline import command_line, runner
from pipeline.command_help import help_text, section_meanings
from pipeline.refusals import flat
from pipeline.schema import STAGES, Config
from tests.pipeline.running import defaults

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "pipeline/run.py")


@pytest.fixture
def start(monkeypatch):
    """A maker of (exit code, [what was to be run: configuration, arguments]) of run.py's main."""

    def start(*arguments):
        runs = []
        monkeypatch.setattr(runner, "execute", lambda *told: runs.append(told) or 0)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as ended:
            return ended.code, runs
        return 0, runs

    return start


def test_help_lists_every_key_stage_and_recipe():
    values = OmegaConf.to_container(defaults())
    text = help_text(values, width=100)
    lines = [line.split()[0] for line in text.splitlines() if line.strip()]
    shown = {line.partition("=")[0] for line in lines}
    assert {*flat(values)} <= shown | {"suite"} and {*STAGES} <= shown
    assert {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")} <= shown
    assert max(map(len, text.splitlines())) <= 110


def test_help_shows_values_and_what_keys_mean():
    text = " ".join(help_text(OmegaConf.to_container(defaults()), width=100).split())
    assert "train.lr=0.002 " in text
    assert "train.weights_from=null the finetune folder of another run, whose newest" in text
    assert "generate.temperature=0.0 0: the likeliest token each time" in text
    assert "finetune Extend the context of the converted model in the hybrid." in text
    assert "demo_full Control of demo: every layer full." in text
    meanings = section_meanings(Config)
    assert meanings["parallel.restarts"].startswith("how often run.py starts its workers again")
    assert meanings["schedule"] == "Which layers are full: see model.config.resolve_schedule."


def test_help_and_mistakes_are_shown_without_torch():
    """It takes seconds to import. One process for both: main() can run twice."""
    code = f"""
import runpy, sys
for key in ("experiment=tiny", "train.lrr=1"):
    sys.argv = [{SCRIPT!r}, key, "--help"]
    try:
        runpy.run_path({SCRIPT!r}, run_name="__main__")
    except SystemExit as ended:
        print("exit code", ended.code)
print({{"torch", "transformers"}} & set(sys.modules))
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("exit code 2\nset()\n"), done.stderr
    assert "train.lr=0.002" in done.stdout
    wrong = "train.lrr: no such configuration key; did you mean train.lr? --help lists the keys"
    assert done.stderr == f"error: {wrong}\n"


MISTAKES = {
    "experiment=null": "experiment=null: must be one of demo, .*, or drop experiment=null",
    "experiment=typo": "experiment=typo: nearest: tiny; must be one of demo, demo_base, .*tiny",
    "suite=null": "suite=null: must be one of .*ruler_8k, suite_32k; .*or drop suite=null",
    "pattern=xyz": "pattern=xyz: must be one of sink, .*; set pattern",
    "+pattern=sink": "\\+pattern: has a value already, which pattern=NAME replaces; drop the \\+",
    "lr=1": r"lr: no such configuration key; did you mean train.lr\? --help lists",
    "modle=tiny": r"modle: no such configuration key; did you mean model\? --help lists",
    "train.lr=1,2": r"train.lr=1,2: several values; add -m .* train.lr=\[1,2\] for a list",
    "model.source=a(b": r"model.source=a\(b: the value cannot be read; .* 'model.source=\"a\(b\"'$",
    "data.sources=[{path: ~/x}]": r"data.sources=.* inside a list a text with any of ~ .* own: ",
    "foo": "foo: must be KEY=VALUE; --help lists the keys",
    "~nope": "Could not delete from config. 'nope' does not exist; --help lists the keys",
    "--config-name=nope": "Cannot find primary config 'nope'. .*path; --help lists the keys",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(start, capsys, argument):
    assert start(argument) == (2, [])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert re.match(f"error: {MISTAKES[argument]}", printed.err)


def test_the_argument_that_is_advised_works(start, capsys):
    path = 'It\'s {a} (b), "c" = \\d\\'
    start(f"generate.prompt_file={path}")
    (advised,) = shlex.split(capsys.readouterr().err.partition("inside the shell's: ")[2])
    _, runs = start(advised)
    assert runs[0][0].generate.prompt_file == path


def test_a_bug_in_a_run_shows_its_traceback_and_no_advice_of_hydras(start, capsys, monkeypatch):
    def fail(*told):
        raise TypeError("a bug")

    monkeypatch.setattr(sys, "argv", [SCRIPT, "experiment=tiny"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(runner, "execute", fail)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert printed.endswith("TypeError: a bug\n") and "HYDRA_FULL_ERROR" not in printed


PROMPTS = [
    *(
        "Hello, world",
        "It's a test",
        "[1, 2, 3]",
        "介绍一下你。",
        "a=b",
        "null",
        "007",
        "true",
        "-",
    ),
    *("f(x) {", '"Yes," he said. "No"', "a\\", 'a\\"', "cost ${x} \\${y}", "two\nlines", "", " a "),
]


def test_a_prompt_is_the_text_as_typed(start):
    """Also for workers, which get the same arguments again."""
    parser = OverridesParser.create()
    for prompt in PROMPTS:
        (argument,) = command_line.with_plain_prompt([f"generate.prompt={prompt}"])
        config = OmegaConf.create({"prompt": parser.parse_override(argument).value()})
        assert config.prompt == prompt
        assert command_line.with_plain_prompt([argument]) == [argument]
    text = "cost ${x}, 'a'"
    _, [(config, again)] = start("experiment=tiny", f"generate.prompt={text}")
    assert config.generate.prompt == text
    _, [(config, _)] = start(*again[1:])
    assert config.generate.prompt == text


@pytest.mark.parametrize(
    ("arguments", "job", "variant"),
    [
        (["train.lr=1e-4,3e-4"], ["train.lr=1e-4"], "lr_1e-4"),
        (["train.lr=1e-4", "train.seed=1,-1"], ["train.lr=1e-4", "train.seed=-1"], "seed_-1"),
        (["pattern=sink,strided", "+a.b=1,2"], ["pattern=sink", "+a.b=2"], "pattern_sink_b_2"),
        (
            ["train.seed=1,2", "data.seed=1,2"],
            ["train.seed=1", "data.seed=2"],
            "train.seed_1_data.seed_2",
        ),
        (["schedule.full=top,[0, 1]"], ["schedule.full=[0,1]"], "full_0-1"),
        (["train.seed=1,2", "variant=x"], ["train.seed=1", "variant=x"], None),
        (["variant=x,y", "train.seed=1,2"], ["variant=x", "train.seed=1"], None),
        (["experiment=a,b", "stage=x,y", "eval.shard=1/2,2/2"], ["experiment=a"], None),
        (["generate.seed=1,2", "plan.gpu=H200,A100-80G"], ["generate.seed=1"], None),
    ],
)
def test_each_job_of_a_sweep_has_its_variant(arguments, job, variant):
    assert command_line.sweep_variant(arguments, job) == variant


def test_a_sweep_runs_every_job_and_fails_where_one_does(start, tmp_path, capsys, monkeypatch):
    """Each in a process of its own, by arguments that workers can be started with too."""
    codes, jobs = [2, 0], []
    monkeypatch.setattr(
        command_line, "run_job", lambda job: jobs.append(job) or codes[len(jobs) - 1]
    )
    monkeypatch.chdir(tmp_path)
    # Left by another test's world in this process.
    monkeypatch.delenv("RANK", raising=False)
    sweep = ["experiment=tiny", "outputs=out", "train.lr=1e-4,3e-4", "-m"]
    assert start(*sweep) == (2, [])
    printed = capsys.readouterr().err
    assert "train.lr=0.0001 variant=lr_0.0001" in printed and "1 of 2 jobs failed" in printed
    assert [job[-1] for job in jobs] == ["variant=lr_0.0001", "variant=lr_0.0003"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    code, [(config, _)] = start(*jobs[1][1:])
    assert code == 0 and (config.train.lr, config.variant) == (3e-4, "lr_0.0003")
    # Wherever the flag stands.
    jobs.clear()
    assert start("experiment=tiny", "-m", "outputs=out", "train.lr=1e-4,3e-4") == (2, [])
    assert [job[-1] for job in jobs] == ["variant=lr_0.0001", "variant=lr_0.0003"]
    # One that was asked to stop ends the sweep.
    codes[:], jobs[:] = [143, 0], []
    assert start(*sweep)[0] == 143 and len(jobs) == 1


def test_a_sweep_is_not_for_torchrun(start, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert start("-m", "train.seed=1,2") == (2, [])
    assert "run it without torchrun" in capsys.readouterr().err

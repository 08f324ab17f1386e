"""A new user's installation: what resolves, the command it gives, README's call of the kernels."""

import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from packaging.version import parse
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHECK = runpy.run_path(str(ROOT / ".ci/check_install.py"))


@pytest.fixture(scope="module")
def index():
    """Skips where no package index answers."""
    pytest.importorskip("uv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_HTTP_RETRIES", "0")
        reason = CHECK["unreachable"]()
    if reason:
        pytest.skip(f"no package index is reachable: {reason.splitlines()[0]}")


def test_a_conflict_with_the_public_torch_is_an_error(tmp_path, index):
    text = (ROOT / "requirements.txt").read_text()
    planted = re.sub(r"^triton==[\d.]+", "triton==3.9.0", text, flags=re.M)
    assert planted != text
    (tmp_path / "requirements.txt").write_text(planted)
    packages, error = CHECK["resolve"]("3.12", [tmp_path / "requirements.txt"], ["torch===2.13.0"])
    assert not packages and "triton" in error and "No solution found" in error


def test_pips_index_is_used_and_nothing_else_of_its_settings(monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://global/simple\nfind-links = /wheels\n"
        "constraint = /constraints.txt\n[install]\nindex-url = https://mirror/simple\n"
    )
    for name in ("PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("UV_FIND_LINKS", "/wheels")
    found = CHECK["environment"]()
    assert {name for name in found if name.startswith("UV_")} - {"UV_CACHE_DIR"} == {
        "UV_DEFAULT_INDEX",
        "UV_PYTHON_DOWNLOADS",
    }
    assert found["UV_DEFAULT_INDEX"] == "https://mirror/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment/simple")
    assert CHECK["environment"]()["UV_DEFAULT_INDEX"] == "https://environment/simple"


def test_what_readers_and_the_product_name_is_checked():
    named = {"lm-eval==0.4.13", "wandb-workspaces==0.4.5", "transformers[serving]"}
    assert named <= set(CHECK["optional_packages"](ROOT))


def test_an_unreachable_index_is_said(monkeypatch, capsys):
    pytest.importorskip("uv")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    assert CHECK["main"]() == 0
    assert "NOT CHECKED, no package index is reachable" in capsys.readouterr().out


def test_setup_ends_with_pip_check(tmp_path):
    command = ["make", "-n", "setup", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert "pip check" in lines[-2] and lines[-1].startswith("touch")


def test_git_ignores_an_environment_that_is_a_symlink(tmp_path):
    shutil.copy(ROOT / ".gitignore", tmp_path)
    (tmp_path / ".venv").symlink_to(tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    command = ["git", "-C", str(tmp_path), "check-ignore", ".venv"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ".venv\n"


def test_longgen_is_run_py_from_any_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.chdir(tmp_path)
    overrides = ["experiment=tiny", "train.steps=3", "variant=mine"]
    monkeypatch.setattr(sys, "argv", ["longgen", "--cfg", "job", *overrides])
    main = EntryPoint("longgen", PROJECT["project"]["scripts"]["longgen"], "").load()
    assert inspect.getsourcefile(inspect.unwrap(main)) == str(ROOT / "pipeline/run.py")
    main()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        expected = compose("config", overrides=overrides)
    assert OmegaConf.create(capsys.readouterr().out) == expected
    assert not list(tmp_path.iterdir())


def test_an_installed_longgen_is_no_kernels_of_transformers():
    """transformers takes the distribution that has a package `kernels`, and its version."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    assert parse(PROJECT["project"]["version"]) < parse(KERNELS_MIN_VERSION)


@pytest.mark.slow
def test_editable_install_gives_the_command_and_the_packages(tmp_path):
    checkout, place, python = (
        tmp_path / "checkout",
        tmp_path / "elsewhere",
        tmp_path / "v/bin/python",
    )
    place.mkdir()
    for folder in ("conf", "kernels", "model", "data_prep", "pipeline", "tests"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, checkout)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    [packages] = (tmp_path / "v").glob("lib/python*/site-packages")
    # What is installed here, without installing it again.
    (packages / "here.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", "-e", checkout], check=True)

    def output(*command):
        environment = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
        options = {"cwd": place, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(command, check=True, **options).stdout

    keys = ["--cfg", "job", "experiment=tiny", "variant=mine"]
    command = output(python.with_name("longgen"), *keys)
    assert command == output(python, checkout / "pipeline/run.py", *keys) and "mine" in command
    code = (
        "import kernels.sparse_attention, importlib.util; print(kernels.__path__[0]);"
        "from transformers.utils import is_kernels_available;"
        "print(is_kernels_available(), importlib.util.find_spec('tests'))"
    )
    assert output(python, "-c", code).splitlines() == [str(checkout / "kernels"), "False None"]


def test_readmes_call_of_the_kernels_equals_sdpa_with_a_mask():
    section = (ROOT / "README.md").read_text().split("## Kernels alone")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    inputs = [found[name] for name in "qkv"]
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    positions = torch.arange(found["T"])
    mask = found["pattern"].visible(positions[:, None], positions[None, :])
    assert not mask.tril().equal(torch.ones_like(mask).tril())
    out = scaled_dot_product_attention(*copies, attn_mask=mask, enable_gqa=True)
    out.sum().backward()
    pairs = [(found["out"], out), *((x.grad, y.grad) for x, y in zip(inputs, copies, strict=True))]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_table_of_versions_names_the_pinned_ones():
    text = (ROOT / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.M))
    rows = re.findall(
        r"^\| 3\.1[12] \| (2\S+).*?\| (\S+) \| (\S+) \|",
        (ROOT / "docs/install.md").read_text(),
        re.M,
    )
    pinned = (pins["torch"], pins["triton"], pins["transformers"])
    assert [(torch.partition("+")[0], *others) for torch, *others in rows[:2]] == [pinned] * 2

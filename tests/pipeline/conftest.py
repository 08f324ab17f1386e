"""Fake stages in the runner's place, and where a command writes."""

from types import SimpleNamespace

import pytest

from pipeline import stage_folders
from tests.pipeline.fake_stages import FakeStages


@pytest.fixture
def stages(monkeypatch):
    fakes = FakeStages()
    monkeypatch.setattr(stage_folders, "stage_module", fakes.modules.__getitem__)
    return fakes


@pytest.fixture
def at(tmp_path):
    """The command's outputs, and its run's own folder."""
    return SimpleNamespace(
        outputs=f"outputs={tmp_path}", run=tmp_path / "tiny" / "main", root=tmp_path
    )

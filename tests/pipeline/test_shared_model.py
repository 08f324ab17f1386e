"""Models that processes share say what they say on one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.manifest import StageError
from pipeline.records import read_records
from pipeline.serving import join_ranks
from pipeline.stages import evaluate
from tests.closeness import assert_close_by_norm
from tests.pipeline.evaluation_helpers import context, small_config, write_inputs
from tests.training.worlds import run_world

MODELS = ["base", "final", "reduced", "base_reduced"]


def config_of(tensor):
    config = small_config()
    config.eval.models, config.eval.tensor = MODELS, tensor
    # Where both kinds of layers have one RoPE, their weights can be reduced.
    return config


def evaluated(root, tensor):
    """Run the stage as one rank of the world; the counts that it gives."""
    import os

    run = context(Path(root), config_of(tensor), "evaluate")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return evaluate.run(replace(run, rank=rank, size=size, meet=lambda place: dist.barrier()))


def folder(tmp_path, name, inputs):
    root = tmp_path / name
    root.mkdir()
    for stage in ("fetch", "data_prep", "export"):
        (root / stage).symlink_to(inputs / stage)
    return root


def records_of(root):
    found = read_records(root / "evaluate.partial" / "records.jsonl")
    return {(r["model"], r["task"], r["key"], r.get("start", 0)): r for r in found}


def test_two_teams_of_two_record_what_one_process_does(tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    write_inputs(inputs)
    alone, shared = (folder(tmp_path, name, inputs) for name in ("alone", "shared"))
    counts = evaluate.run(context(alone, config_of(1), "evaluate"))
    first, *others = run_world(4, evaluated, str(shared), 2)
    assert first == counts and others == [{}] * 3
    wanted, found = records_of(alone), records_of(shared)
    assert found.keys() == wanted.keys() and {key[0] for key in found} == set(MODELS)
    for key, record in found.items():
        other = wanted[key]
        same = record.keys() - {"nll", "manifest"}
        assert {k: record[k] for k in same} == {k: other[k] for k in same}
        if "nll" in record:
            assert_close_by_norm(record["nll"], other["nll"], 1e-5)
        told = shared / f"evaluate.partial/model_{record['manifest']}.json"
        assert json.loads(told.read_text())["tensor"] == 2
    # A record that is there is not made again, by either of a team.
    lines = (shared / "evaluate.partial/records.jsonl").read_text()
    run_world(4, evaluated, str(shared), 2)
    assert (shared / "evaluate.partial/records.jsonl").read_text() == lines


def test_processes_that_cannot_be_teams_are_refused(tmp_path):
    write_inputs(tmp_path)
    run = replace(context(tmp_path, config_of(2), "evaluate"), size=3)
    with pytest.raises(StageError, match="eval.tensor=2: must divide the 3 processes"):
        evaluate.run(run)


def test_a_served_model_s_ranks_share_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(StageError, match="2 processes on 1 CUDA GPUs: each needs its own"):
        join_ranks(torch.device("cuda"))


def test_a_folder_of_another_kind_cannot_be_shared(tmp_path):
    from pipeline.evaluated_model import model_config

    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt2"}')
    config = config_of(2)
    config.eval.folders = {"other": str(tmp_path / "other")}
    with pytest.raises(StageError, match="holds no model that several processes can share"):
        model_config("other", context(tmp_path, config, "evaluate"))

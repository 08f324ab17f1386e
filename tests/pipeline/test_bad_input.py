"""Bad models and bad text through whole runs: refused in one line, and mended by hand."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline.manifest import read_manifest
from pipeline.runner import Runner
from pipeline.validation import parse
from tests.pipeline.running import composed, refused, run
from tests.pipeline.small_run import save_llama, save_text, small, source, texts


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def root(tmp_path, llama):
    shutil.copytree(llama, tmp_path / "model")
    save_text(tmp_path / "text")
    return tmp_path


def finished(root, stage):
    """The finished folders of a shared stage."""
    folders = (root / "outputs/artifacts" / stage).glob("*")
    return [folder for folder in folders if not folder.name.endswith(".partial")]


def command(root, stage, *more):
    return small(root, root / "model", f"stage={stage}", *more)


def fetch_and(capsys, root, stage, *more):
    """What `stage` says after fetch; the command a user repeats is the same two stages."""
    assert run(capsys, *command(root, "fetch", *more))[0] == 0
    return run(capsys, *command(root, stage, *more))


def refused_after_fetch(capsys, root, stage, *more):
    assert run(capsys, *command(root, "fetch", *more))[0] == 0
    message = refused(capsys, *command(root, stage, *more))
    assert finished(root, stage) == []
    return message


def mended(capsys, root, stage, *more):
    code, lines = fetch_and(capsys, root, stage, *more)
    assert code == 0, lines
    (folder,) = finished(root, stage)
    return read_manifest(folder)["counts"]


def test_two_runs_on_one_output(root, capsys):
    assert run(capsys, *command(root, "fetch"))[0] == 0
    with Runner(parse(composed(*command(root, "data_prep"))))._lock("data_prep"):
        message = refused(capsys, *command(root, "data_prep"))
    assert "another process is at work there; wait until stage=data_prep is done" in message
    assert mended(capsys, root, "data_prep")["train"]["rows"] > 0


def test_an_empty_folder_of_text(root, capsys):
    for path in (root / "text").iterdir():
        path.unlink()
    message = refused(capsys, *command(root, "data_prep"))
    assert message == (
        f"source notes: no file in {root}/text matches '**/*'; set the source's path or glob"
    )
    (root / "text/empty.txt").write_text("\n  \n")
    message = refused_after_fetch(capsys, root, "data_prep")
    assert message.startswith(f"source notes: no document in {root}/text (format text; left out: 1")
    assert f"(first: {root}/text/empty.txt)" in message
    for number, text in enumerate(texts(6)):
        (root / f"text/{number}.txt").write_text(text)
    counts = mended(capsys, root, "data_prep")
    assert counts["sources"][0]["skipped"] == {"empty documents": 1}


def test_a_folder_that_is_not_there(root, capsys):
    (root / "text").rename(root / "elsewhere")
    message = refused(capsys, *command(root, "data_prep"))
    assert message == f"source notes: {root}/text does not exist; set the source's path"
    (root / "elsewhere").rename(root / "text")
    mended(capsys, root, "data_prep")


def test_a_broken_json_line(root, capsys):
    path = root / "notes.jsonl"
    good = [json.dumps({"text": text}) for text in texts(8)]
    path.write_text("\n".join([*good[:2], good[2][:-9], *good[3:]]))
    keys = (source(path, format="jsonl"),)
    message = refused_after_fetch(capsys, root, "data_prep", *keys, "data.strict=true")
    assert message.startswith(f"{path}:3: not JSON: ")
    assert message.endswith("; mend it, or set data.strict=false to skip and count")

    code, lines = run(capsys, *command(root, "data_prep", *keys))
    assert code == 0
    assert [line for line in lines if f"left out 1 broken lines (first: {path}:3: not" in line]
    (folder,) = finished(root, "data_prep")
    row = read_manifest(folder)["counts"]["sources"][0]
    assert row["skipped"] == {"broken lines": 1} and row["read"]["documents"] == 7
    shutil.rmtree(folder)

    path.write_text("\n".join(good))
    row = mended(capsys, root, "data_prep", *keys, "data.strict=true")["sources"][0]
    assert row["skipped"] == {} and row["read"]["documents"] == 8


def test_bytes_that_are_no_text(root, capsys):
    path = root / "text/03.txt"
    good = path.read_bytes()
    path.write_bytes(good[:40] + b"\xff\xfe" + good[40:])
    message = refused_after_fetch(capsys, root, "data_prep", "data.strict=true")
    assert message == (
        f"{path}: byte 0xff at offset 40 is not UTF-8; mend it, or set data.strict=false to skip "
        "and count"
    )
    row = mended(capsys, root, "data_prep")["sources"][0]
    assert row["skipped"] == {"undecodable texts": 1} and row["read"]["documents"] == 11
    shutil.rmtree(finished(root, "data_prep")[0])
    path.write_bytes(good)
    row = mended(capsys, root, "data_prep", "data.strict=true")["sources"][0]
    assert row["skipped"] == {} and row["read"]["documents"] == 12


def test_a_truncated_model(root, capsys):
    path = root / "model/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = refused_after_fetch(capsys, root, "convert")
    (fetched,) = finished(root, "fetch")
    assert message.startswith(f"{fetched}/model/model.safetensors: truncated or unreadable (")
    assert message.endswith("; fetch the model again")
    path.write_bytes(whole)
    assert mended(capsys, root, "convert")["bit_exact"] == 2 * 9 + 3


def test_a_model_of_pickles_alone(root, capsys):
    path = root / "model/model.safetensors"
    whole = path.read_bytes()
    torch.save(load_file(path), root / "model/pytorch_model.bin")
    path.unlink()
    message = refused_after_fetch(capsys, root, "convert")
    (fetched,) = finished(root, "fetch")
    assert message == (
        f"{fetched}/model: weights are pickled (pytorch_model.bin); pickles can run code: fetch "
        "the model's safetensors, or set model.allow_pickle=true to read them with weights_only"
    )
    assert mended(capsys, root, "convert", "model.allow_pickle=true")["bit_exact"] == 2 * 9 + 3
    shutil.rmtree(finished(root, "convert")[0])
    path.write_bytes(whole)
    assert mended(capsys, root, "convert")["bit_exact"] == 2 * 9 + 3


def test_a_model_of_another_shape(root, capsys):
    shutil.rmtree(root / "model")
    save_llama(root / "model", num_hidden_layers=3, num_key_value_heads=1)
    message = refused(capsys, *command(root, "fetch"))
    assert message == (
        f"{root}/model/config.json: a checkpoint of another shape: model.num_layers: found 3, "
        "expected 2; model.num_kv_heads: found 1, expected 2; save the lines above as "
        "conf/model/NAME.yaml and set model=NAME, set model=auto for a local folder, or choose "
        "another model.source"
    )
    keys = ("model.num_layers=3", "model.num_kv_heads=1")
    assert mended(capsys, root, "convert", *keys)["bit_exact"] == 3 * 9 + 3


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_folder_that_lacks_a_file(root, capsys, name):
    (root / "model" / name).rename(root / name)
    message = refused(capsys, *command(root, "fetch"))
    assert message.startswith(f"{root}/model: no {name.partition('.')[0]}")
    assert message.partition("; ")[2] and finished(root, "fetch") == []
    (root / name).rename(root / "model" / name)
    assert run(capsys, *command(root, "fetch"))[0] == 0

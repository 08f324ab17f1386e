import itertools
import json
import os
import pickle
import resource
import signal
import weakref

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from model.mapping import megatron_shape, megatron_to_hf_names
from model.sharding import fragment_blocks, shard_blocks, shard_shape
from model.weights import (
    HF_INDEX,
    INDEX,
    WeightFolder,
    WeightsError,
    _SafetensorsFile,
    iterate_weights,
    read_weight,
    write_weights,
)
from tests.memory import read_from_files
from tests.tiny import tiny_config


def tensors(count: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {
        f"layer.{i}": torch.randn(8, 4, generator=generator).to(dtypes[i % 3]) for i in range(count)
    }


def test_shards_are_bounded_and_read_back(tmp_path):
    given = tensors() | {"large": torch.zeros(200)}
    counts = write_weights(tmp_path, given.items(), shard_bytes=200)
    files = sorted(tmp_path.glob("*.safetensors"))
    # 128 + 64, 64 + 128, 64, 800 bytes.
    assert counts["shards"] == len(files) == 4
    assert counts["tensors"] == 6 and counts["parameters"] == 5 * 32 + 200
    # 800 bytes of the large tensor alone; every other shard below the bound and its header.
    assert sorted(path.stat().st_size for path in files)[-2] < 200 + 400
    found = dict(iterate_weights(tmp_path))
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert torch.equal(read_weight(tmp_path, "layer.3"), given["layer.3"])
    weights = WeightFolder(tmp_path)
    assert weights.shape("layer.1") == (8, 4) and weights.dtype("layer.1") == "BF16"
    assert weights.nbytes("layer.1") == 64 and weights.nbytes("large") == 800


def test_writing_keeps_one_shard_in_memory(tmp_path):
    alive = []

    def stream():
        for i in range(6):
            tensor = torch.zeros(100)
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor
            # A shard of two, and the one that the writer has just put aside for the next.
            assert sum(ref() is not None for ref in alive) <= 2

    write_weights(tmp_path, stream(), shard_bytes=800)
    assert len(WeightFolder(tmp_path)) == 6


def test_parts_of_one_tensor_can_be_written_together(tmp_path):
    whole = torch.arange(8.0).reshape(4, 2)
    write_weights(tmp_path, zip("ab", whole.chunk(2), strict=True))
    assert torch.equal(read_weight(tmp_path, "b"), whole[2:])


def test_transformers_loads_what_was_written_under_its_index(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=1,
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            vocab_size=32,
        )
    )
    write_weights(tmp_path, model.state_dict().items(), index=HF_INDEX, shard_bytes=2000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model.config.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors: truncated.*fetch the model again"):
        WeightFolder(tmp_path)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(WeightsError, match="no .*safetensors.* file; fetch the model again"):
        WeightFolder(tmp_path)
    save_file(tensors(2), tmp_path / "a.safetensors")
    save_file(tensors(1), tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"layer\.0 lies in a\.safetensors and in b"):
        WeightFolder(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"layer.0": "c.safetensors"}}))
    with pytest.raises(WeightsError, match=r"names c\.safetensors, which the folder lacks"):
        WeightFolder(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": ')
    with pytest.raises(WeightsError, match="not an index"):
        WeightFolder(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"layer.0": "b.safetensors"}}))
    with pytest.raises(WeightsError, match=r"no tensor layer\.7.*layer\.0"):
        read_weight(tmp_path, "layer.7")


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (3, 1, 2), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_is_read_as_torch_slices_it(tmp_path, shape, dtype):
    count = torch.Size(shape).numel()
    whole = torch.arange(float(count)).reshape(shape).to(dtype)
    save_file({"before": torch.ones(3), "whole": whole}, tmp_path / "a.safetensors")
    weights = WeightFolder(tmp_path)
    ranges = [[slice(a, b) for a in range(n + 1) for b in range(a, n + 1)] for n in shape]
    for within in itertools.product(*ranges):
        assert torch.equal(weights.read("whole", within), whole[within]), within
    assert torch.equal(weights.read("whole"), whole)
    assert torch.equal(weights.read("whole", (slice(None),) * len(shape[:1])), whole)


def test_each_rank_reads_its_slice_and_no_more(tmp_path):
    """Four ranks of tensor parallelism, each with four fragments: together, the model once."""
    config = tiny_config(kv_heads=4, hidden_size=256, ffn_hidden_size=512, is_full=(True,))
    whole = {
        name: torch.randn(megatron_shape(name, config), dtype=torch.bfloat16)
        for name in megatron_to_hf_names(config)
    }
    write_weights(tmp_path, whole.items())
    weights = WeightFolder(tmp_path)
    before = read_from_files()
    # What it costs to ask.
    asking = read_from_files() - before
    for name, tensor in whole.items():
        copies = 4 if "norm" in name else 1
        total = 0
        for rank in range(4):
            blocks = shard_blocks(name, config, rank, 4)
            size = torch.Size(shard_shape(name, config, 4)).numel()
            for first in range(0, size, -(-size // 4)):
                for block in fragment_blocks(blocks, first, min(size, first + -(-size // 4))):
                    ends = (a + b for a, b in zip(block.offsets, block.sizes, strict=True))
                    within = tuple(map(slice, block.offsets, ends))
                    before = read_from_files()
                    found = weights.read(name, within)
                    total += read_from_files() - before - asking
                    assert torch.equal(found, tensor[within])
        # The digits of the counter that is read grow by a few.
        assert abs(total - copies * tensor.nbytes) < 500, name


def test_what_cannot_be_read_from_a_file(tmp_path):
    save_file(tensors(1) | {"whole": torch.ones(9, dtype=torch.int8)}, tmp_path / "a.safetensors")
    weights = WeightFolder(tmp_path)
    with pytest.raises(
        WeightsError, match=r"a\.safetensors: whole is stored as I8; must be one of"
    ):
        weights.read("whole")
    with pytest.raises(ValueError, match=r"layer\.0: within=.*every step must be 1"):
        weights.read("layer.0", (slice(0, 4, 2),))
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(WeightsError, match=r"a\.safetensors: ends at byte 200, within a tensor"):
        weights.read("layer.0")


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_need_permission_and_never_run_code(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"pickled \(pytorch_model\.bin\).*allow_pickle=true"):
        WeightFolder(tmp_path)
    weights = WeightFolder(tmp_path, allow_pickle=True)
    assert {weights.dtype(name) for name in weights} == {"F32", "F16", "BF16"}
    assert torch.equal(weights.read("layer.1"), tensors()["layer.1"])

    ran = tmp_path / "ran"
    torch.save({"a": Payload(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="pytorch_model.bin: not readable with weights_only"):
        WeightFolder(tmp_path, allow_pickle=True)
    assert not ran.exists()
    # The payload does work: without weights_only it runs.
    torch.load(path, weights_only=False)
    assert ran.exists()


def test_pickles_of_other_things_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(WeightsError, match="holds a list"):
        WeightFolder(tmp_path, allow_pickle=True)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2)[:-3])
    with pytest.raises(WeightsError, match="not readable with weights_only"):
        WeightFolder(tmp_path, allow_pickle=True)


def test_safetensors_are_preferred_to_pickles(tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file(tensors(1), tmp_path / "model.safetensors")
    assert list(WeightFolder(tmp_path, allow_pickle=True)) == ["layer.0"]


@pytest.mark.parametrize("gone", [False, True])
def test_of_several_sets_of_weights_the_one_is_read_that_transformers_reads(tmp_path, gone):
    """Left-over shards, their index, pickles and files of other names are not looked at."""
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    name = "model.norm.weight"
    weights = LlamaForCausalLM(config).state_dict()
    del weights["lm_head.weight"]

    def set_to(value):
        return {**weights, name: torch.full_like(weights[name], value)}

    def read_by_both():
        theirs = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()[name][0].item()
        return theirs, WeightFolder(tmp_path, allow_pickle=True).read(name)[0].item()

    config.save_pretrained(tmp_path)
    torch.save(set_to(4.0), tmp_path / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model-1.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    save_file(set_to(5.0), tmp_path / "consolidated.safetensors", metadata={"format": "pt"})
    assert read_by_both() == (4.0, 4.0)
    torch.save(set_to(3.0), tmp_path / "pytorch_model.bin")
    assert read_by_both() == (3.0, 3.0)
    write_weights(tmp_path, set_to(2.0).items(), index=HF_INDEX)
    assert read_by_both() == (2.0, 2.0)
    if gone:
        (tmp_path / "model-00001.safetensors").unlink()
    save_file(set_to(1.0), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read_by_both() == (1.0, 1.0)


@pytest.mark.parametrize("name", ["../a.safetensors", "sub/a.safetensors", "..", "", 3])
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(tensors(1), place / "a.safetensors")
    (folder / HF_INDEX).write_text(json.dumps({"weight_map": {"layer.0": name}}))
    with pytest.raises(WeightsError, match="must be names of files in that folder; move"):
        WeightFolder(folder)


def test_failed_writing_names_file_and_remedy(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(WeightsError, match=r"weights-00001\.safetensors: cannot be written.*"):
            write_weights(tmp_path, [("a", torch.zeros(100_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / INDEX).exists()


def test_a_file_is_closed_with_its_reader(tmp_path):
    write_weights(tmp_path, tensors().items())
    reader = _SafetensorsFile(next(tmp_path.glob("*.safetensors")))
    file = reader._file
    assert not file.closed
    del reader
    assert file.closed

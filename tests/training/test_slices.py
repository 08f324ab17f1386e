"""Each process makes and reads its own part of the model, and no more."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.mapping import megatron_to_hf_names
from model.rope import inverse_frequencies
from model.weights import WeightFolder, write_weights
from pipeline.schema import Config
from tests.memory import read_from_files
from tests.tiny import tiny_config
from tests.training.small_training import parallel_section, small_train, whole_weights
from tests.training.worlds import run_world

LAYOUTS = {
    "one process": {"world": 1},
    "tensor": {"world": 2, "tensor": 2},
    "zero 1": {"world": 2},
    "zero 3": {"world": 2, "zero_stage": 3},
}


def wide_config():
    return tiny_config(kv_heads=2, hidden_size=256, ffn_hidden_size=512, is_full=(True, False))


def fill_from(folder, parallel):
    """(bytes read to fill the masters, those of the norms), and whether all values are right."""
    from pipeline.training.checkpoint import engine_pieces, fill_masters
    from pipeline.training.engine import build_engine, build_model
    from pipeline.training.layout import Layout

    section = parallel_section(**parallel)
    layout = Layout(section, torch.device("cpu"))
    config, train = wide_config(), small_train()
    model = build_model(Config(parallel=section, train=train), config, layout)
    engine = build_engine(model, train, section, layout)
    weights, blocks = WeightFolder(folder), []

    def read(name, within):
        before = read_from_files()
        block = weights.read(name, within)
        blocks.append((name, read_from_files() - before, block.nbytes, weakref.ref(block)))
        return block

    fill_masters(engine, config, layout, read)
    # A block is forgotten once it is in its master.
    assert all(block() is None for *_, block in blocks)
    for piece in engine_pieces(engine, config, layout, kinds=("master",)):
        bounds = zip(piece.offsets, piece.tensor.shape, strict=True)
        within = tuple(slice(first, first + count) for first, count in bounds)
        assert torch.equal(piece.tensor, weights.read(piece.name.removeprefix("master."), within))
    # A read of a counter, and of a header where the file changes, comes on top.
    assert all(read - size < 4096 for _, read, size, _ in blocks)
    norms = sum(size for name, _, size, _ in blocks if "norm" in name)
    return sum(size for _, _, size, _ in blocks), norms


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_processes_together_read_the_model_once(tmp_path, name):
    layout, config = LAYOUTS[name], wide_config()
    whole = whole_weights(config)
    write_weights(tmp_path, whole.items())
    size = sum(tensor.nbytes for tensor in whole.values())
    found = run_world(layout["world"], fill_from, tmp_path, layout)
    # Every tensor-parallel rank holds the norms.
    norms = sum(tensor.nbytes for key, tensor in whole.items() if "norm" in key)
    again = norms * (layout.get("tensor", 1) - 1)
    assert sum(read for read, _ in found) == size + again
    assert max(read for read, _ in found) < 0.6 * size or len(found) == 1


class HostTensors(TorchDispatchMode):
    """Elements of the largest tensor that is made on the host."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.largest = max(self.largest, result.numel())
        return result


def test_a_model_is_made_on_its_device_alone(layout, monkeypatch):
    """The meta device stands for a GPU: of the model only RoPE's frequencies are on the host."""
    from pipeline.training.engine import build_model

    monkeypatch.setattr(layout, "device", torch.device("meta"))
    config = wide_config()
    with HostTensors() as made:
        model = build_model(Config(train=small_train()), config, layout)
    assert made.largest <= 2 * config.head_dim
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {name for name, _ in model.named_parameters()} == set(megatron_to_hf_names(config))
    assert all(p.tensor_model_parallel for p in model.parameters() if p.dim() > 1)
    expected = inverse_frequencies(config.head_dim, config.rope)
    assert torch.equal(model.rotary_pos_emb.frequencies[0], expected)

"""Llama-2-70B's true tensors, of fewer layers, through convert and export in bounded memory.

The source takes no disk; what is written takes 4.5 GB. The peak does not depend on the depth.
"""

import json
import shutil
from dataclasses import replace

import pytest

from model.cost import parameters
from model.weights import WeightFolder
from tests.memory import measure, sparse_llama
from tests.pipeline.test_streaming import ROPE, WIDE, bound, run_convert, run_export

pytestmark = pytest.mark.slow
LAYERS = 2
LLAMA_70B = replace(
    WIDE,
    num_layers=LAYERS,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_heads=64,
    num_kv_heads=8,
    vocab_size=32000,
    rope=ROPE,
    is_full=(True,) * LAYERS,
)
SOURCE_SHARD = 9_800_000_000


@pytest.fixture
def root(tmp_path):
    sparse_llama(tmp_path / "fetch" / "model", LLAMA_70B, SOURCE_SHARD)
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_convert_and_export_hold_less_than_two_shards_and_a_tensor(root):
    for stage, run, arguments in (
        ("convert", run_convert, ()),
        ("export", run_export, ("convert",)),
    ):
        found = measure(run, root, LLAMA_70B, *arguments)
        limit = bound(LLAMA_70B, root / stage, 2)
        print(stage, json.dumps({**found, "bound": limit}))
        assert found["result"]["parameters"] == parameters(LLAMA_70B)
        assert found["peak"] < limit
    assert len(WeightFolder(root / "export")) == 9 * LAYERS + 3

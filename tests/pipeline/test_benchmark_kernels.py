"""benchmark=kernels: the same path at tiny sizes, its masks, checks, refusals and the recipe."""

import csv
import json
import re

import pytest
import torch

import kernels.decode
from kernels.pattern import Pattern
from pipeline.benchmarks import attention_peers
from pipeline.benchmarks import kernels as benchmark
from pipeline.benchmarks.attention_decode import slot_positions
from pipeline.benchmarks.stopwatch import Stopwatch
from pipeline.schema import KernelCase, PeerSetting
from pipeline.validation import parse
from tests.closeness import assert_close_by_norm
from tests.pipeline.running import composed, refused, run

SPARSE = {"sink_tokens": 4, "window": 20, "block": 8}
STRIDED = {**SPARSE, "stride": 2, "phase": "per_head"}
SHAPE = {"heads": 2, "kv_heads": 1, "head_dim": 8}
CASES = [
    {
        "group": "forward_backward",
        "pattern": SPARSE,
        "length": 64,
        "backends": ["reference", "longgen", "flex_triton", "fa4_window"],
        **SHAPE,
    },
    {
        "group": "forward_backward",
        "length": 50,
        "backends": ["dense_torch_sdpa", "dense_cudnn"],
        **SHAPE,
    },
    {
        "group": "packed",
        "pattern": STRIDED,
        "documents": 3,
        "length": 40,
        "backends": ["longgen", "reference"],
        "deterministic": True,
        **SHAPE,
        "kv_heads": 2,
    },
    {
        "group": "lengths",
        "pattern": SPARSE,
        "length": 96,
        "backends": ["longgen", "reference"],
        **SHAPE,
    },
    {
        "group": "decode",
        "pattern": SPARSE,
        "documents": 2,
        "length": 90,
        "backends": ["longgen_decode", "sdpa_decode", "copy"],
        **SHAPE,
    },
]
CONFIG = (
    "name=small",
    "stage=benchmark",
    "benchmark.name=kernels",
    "benchmark.repeats=2",
    "benchmark.launch_ms=0.1",
    "benchmark.precision=fp32",
    "benchmark.commit=abc",
    "benchmark.groups=[forward_backward,decode,packed,lengths]",
    "benchmark.settings=[{peer: flex_triton, q_block: 16, k_block: 16}, {peer: flex_triton}]",
)


def with_cases(*cases):
    return f"benchmark.cases={json.dumps(cases)}"


def slots_by_definition(q_BLNH, k_BGSH, v_BGSH, pattern, q_positions_BL, k_positions_BPS):
    """decode_attention in plain PyTorch, since Triton's interpreter belongs to tests/kernels."""
    batch, _, heads, head_dim = q_BLNH.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BGSH, v_BGSH))
    assert k_positions_BPS.shape[1] == 1
    seen = pattern.visible(q_positions_BL[:, :, None], k_positions_BPS) & (k_positions_BPS >= 0)
    scores = q_BLNH.transpose(1, 2) @ k.transpose(2, 3) * head_dim**-0.5
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def test_the_table_of_one_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels.decode, "decode_attention", slots_by_definition)
    code, lines = run(capsys, *CONFIG, with_cases(*CASES), f"outputs={tmp_path}")
    assert code == 0, lines
    folder = tmp_path / "small/main/benchmark"
    names = ("csv", "json", "_by_length.png", "_by_length.svg")
    files = {f"kernels{'.' * (name[0] != '_')}{name}" for name in names}
    assert {path.name for path in folder.iterdir()} == files | {"manifest.json"}
    with (folder / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    record = json.loads((folder / "kernels.json").read_text())
    assert record["versions"]["torch"] == rows[0]["torch"] and record["commit"] == "abc"
    assert [row["backend"] for row in record["figures"]["rows"]] == [r["backend"] for r in rows]
    assert {(row["gpu"], row["commit"]) for row in rows} == {("CPU", "abc")}
    by_key = {(r["group"], r["pattern"], r["backend"], r["pass"]): r for r in rows}
    group, pattern = "forward_backward", "sink 4 + window 20"
    for name, flops in (("forward", 1), ("backward", 2.5)):
        # Sees nothing of the GPU's peers and says why; everybody else is checked, then timed.
        missing = by_key[group, pattern, "fa4_window", name]
        assert missing["ms"] == "" and "flash_attn" in missing["reason"]
        for backend in ("reference", "longgen"):
            row = by_key[group, pattern, backend, name]
            assert float(row["error"]) < 1e-5 and row["checked_against"] not in ("", backend)
            assert float(row["ms_least"]) <= float(row["ms"]) <= float(row["ms_most"])
            # 2 query heads of dim 8, over the pairs by the definition.
            position = torch.arange(64)
            seen = Pattern(**SPARSE).visible(position[:, None], position[None]).sum().item()
            speed = flops * 4 * 8 * 2 * seen / float(row["ms"]) / 1e9
            assert float(row["tflops"]) == pytest.approx(speed, rel=0.02, abs=0)
        tried = json.loads(by_key[group, pattern, "flex_triton", name]["tried"])
        assert [(t["q_block"], "on CPU" in t["reason"]) for t in tried] == [(16, True), (128, True)]
        assert "CUDA GPU" in by_key[group, "full", "dense_cudnn", name]["reason"]
        assert by_key[group, "full", "dense_torch_sdpa", name]["ms"]
        packed = by_key["packed", "sink 4 + window 20 + stride 2 x 8 per_head", "longgen", name]
        assert (packed["documents"], packed["deterministic"]) == ("3", "True")
    decoded = by_key["decode", pattern, "longgen_decode", "decode"]
    assert float(decoded["error"]) < 1e-5 and decoded["checked_against"] == "sdpa_decode"
    copied = by_key["decode", pattern, "copy", "decode"]
    share = float(decoded["gb_per_s"]) / float(copied["gb_per_s"])
    assert float(decoded["share_of_copy"]) == pytest.approx(share, rel=0.05)
    assert any("longgen forward" in line and "TFLOP/s" in line for line in lines)
    assert any("x reference" in line for line in lines)
    assert not any(line.startswith("rows:") for line in lines)
    assert f"not measured: {2 + 2 + 2}" in lines


@pytest.mark.parametrize("documents", [(0, 75), (0, 30, 31, 75)])
@pytest.mark.parametrize("pattern", [SPARSE, STRIDED, {**STRIDED, "phase": "shared"}])
@pytest.mark.parametrize("blocks", [(16, 32), (8, 8), (8, 5)])
def test_a_peers_mask_is_the_pattern(documents, pattern, blocks):
    """Full blocks, and partial blocks under mask_mod, are Pattern.visible and nothing else."""
    pattern, tokens, heads, kv_heads = Pattern(**pattern), 75, 4, 2
    attention_peers.block_mask.cache_clear()
    mask = attention_peers.block_mask(
        *(pattern, documents, heads, kv_heads, *blocks, torch.device("cpu"))
    )
    position = torch.arange(tokens)
    whole_blocks = 0
    for head in range(heads):
        layer = head if pattern.heads_differ else 0
        wanted = torch.zeros(tokens, tokens, dtype=torch.bool)
        for start, stop in zip(documents[:-1], documents[1:], strict=True):
            own = torch.arange(stop - start)
            see = pattern.visible(own[:, None], own[None], head // 2, kv_heads)
            wanted[start:stop, start:stop] = see
        seen = torch.zeros_like(wanted)
        for numbers, indices, whole in (
            (mask.kv_num_blocks, mask.kv_indices, False),
            (mask.full_kv_num_blocks, mask.full_kv_indices, True),
        ):
            for row, count in enumerate(numbers[0, layer].tolist()):
                q = position[row * blocks[0] : (row + 1) * blocks[0], None]
                for column in indices[0, layer, row, :count].tolist():
                    k = position[None, column * blocks[1] : (column + 1) * blocks[1]]
                    inside = len(q) == blocks[0] and k.shape[1] == blocks[1]
                    assert whole == (inside and bool(wanted[q, k].all())) and wanted[q, k].any()
                    seen[q, k] = whole or mask.mask_mod(0, torch.tensor(head), q, k)
                    whole_blocks += whole
        assert torch.equal(seen, wanted)
    assert whole_blocks > 0 or blocks[0] > 8


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [(0, 75), (0, 30, 75)])
def test_flex_attention_computes_the_pattern(documents):
    """Uncompiled, forward only: on a GPU each contender is checked before it is timed."""
    pattern, shape = Pattern(**STRIDED), (4, 2, torch.device("cpu"))
    q, k, v = (torch.randn(75, heads, 16) for heads in (4, 2, 2))
    peer = attention_peers.attention("flex_flash", None, pattern, documents, *shape)
    wanted = attention_peers.attention("reference", None, pattern, documents, *shape)
    out = peer.attend(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
    assert_close_by_norm(out, wanted.attend(q, k, v), 2e-6)


def sparse_rows(monkeypatch, wrong, *backends):
    """Rows of a tiny case in which the backends in `wrong` compute something else."""
    honest = attention_peers.attention

    def attention(backend, setting, pattern, *others):
        found = honest("reference", setting, pattern, *others)
        name = (backend, setting.q_block) if setting else backend
        change = wrong.get(name, lambda out: out)
        return attention_peers.Attention(lambda *x: change(found.attend(*x)), pattern)

    monkeypatch.setattr(benchmark, "attention", attention)
    bench = parse(composed(*CONFIG, with_cases(*CASES))).benchmark
    case = KernelCase(**{**CASES[0], "backends": list(backends), "pattern": None})
    rows = benchmark.attention_rows(case, bench, torch.device("cpu"), lambda: False)
    return {(row["backend"], row["pass"]): row for row in rows}


def test_what_differs_is_not_timed(monkeypatch):
    rows = sparse_rows(
        monkeypatch,
        {"longgen": lambda out: out * 1.1, "fa4_window": lambda out: out * float("nan")},
        *("reference", "longgen", "longgen_triton", "fa4_window"),
    )
    for name in benchmark.PASSES:
        assert "differs from reference by 1.0e-01" in rows["longgen", name]["reason"]
        assert "gives NaN" in rows["fa4_window", name]["reason"]
        assert rows["reference", name]["ms"] and rows["longgen_triton", name]["ms"]
        assert rows["reference", name]["checked_against"] == "longgen_triton"
        assert "ms" not in rows["longgen", name] and "ms" not in rows["fa4_window", name]


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        raise NotImplementedError("no backward for blocks of 16")


def test_a_setting_without_a_backward_still_counts_forward(monkeypatch):
    rows = sparse_rows(
        monkeypatch, {("flex_triton", 16): NoBackward.apply}, "flex_triton", "reference"
    )
    forward, backward = (rows["flex_triton", name] for name in benchmark.PASSES)
    assert all(tried["ms"] > 0 for tried in json.loads(forward["tried"]))
    best = min(json.loads(forward["tried"]), key=lambda tried: tried["ms"])
    assert json.loads(forward["setting"])["q_block"] == best["q_block"]
    failed, timed = json.loads(backward["tried"])
    assert "no backward for blocks of 16" in failed["reason"] and timed["q_block"] == 128
    assert backward["ms"] == pytest.approx(timed["ms"], abs=1e-3)
    assert json.loads(backward["setting"]) == {"q_block": 128, "k_block": 128}
    assert backward["checked_against"] == "reference" and backward["error"] == 0


def test_of_two_that_differ_neither_is_timed(monkeypatch):
    rows = sparse_rows(monkeypatch, {"longgen": lambda out: out * 1.1}, "longgen", "reference")
    assert "differs from reference" in rows["longgen", "forward"]["reason"]
    assert "differs from longgen" in rows["reference", "forward"]["reason"]


def test_past_the_budget_peers_are_left_out(monkeypatch):
    bench = parse(composed(*CONFIG, with_cases(*CASES))).benchmark
    case = bench.cases[0]
    rows = benchmark.attention_rows(case, bench, torch.device("cpu"), lambda: True)
    timed = {row["backend"] for row in rows if "ms" in row}
    assert timed == {"longgen"}
    assert {row["reason"] for row in rows if "ms" not in row} == {
        "TimeoutError: past the budget of 8 minutes"
    }


def test_calls_take_turns_and_a_failure_is_left_out():
    told = []
    watch = Stopwatch(torch.device("cpu"), repeats=3, launch_ms=1e-6)

    def fail():
        raise RuntimeError("no kernel")

    calls = {name: lambda name=name: told.append(name) for name in "ab"}
    times = watch.rounds({**calls, "c": fail})
    assert [len(times[name]) for name in "ab"] == [3, 3] and str(times["c"]) == "no kernel"
    assert "".join(told) == "aabb" + "abbaab"


def test_slots_of_heads_that_differ_are_padded():
    pattern = Pattern(**STRIDED)
    positions = slot_positions(pattern, 90, 2)
    for head, row in enumerate(positions):
        held = row[row >= 0]
        seen = pattern.visible(torch.tensor(89), torch.arange(90), head, 2).nonzero().flatten()
        assert torch.equal(held, seen)


def test_the_recipe_covers_what_has_to_be_shown():
    from hydra import compose, initialize_config_dir

    from tests.pipeline.running import ROOT

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        bench = parse(compose("config", overrides=["benchmark=kernels", "device=cpu"])).benchmark
    for peer in attention_peers.FLEX:
        assert len({str(s) for s in bench.settings if s.peer == peer}) >= 3
        assert all(isinstance(s, PeerSetting) for s in bench.settings)
    assert set(bench.groups) == {case.group for case in bench.cases}
    lengths = {c.length for c in bench.cases if c.group == "lengths"}
    assert lengths == {2**n * 1024 for n in range(4, 10)}
    shapes = {(c.heads, c.kv_heads, c.head_dim) for c in bench.cases}
    assert shapes == {(32, 32, 128), (64, 8, 128), (9, 3, 64)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmark.groups=[decode]"], r"benchmark.groups=\['decode'\]: must name some of"),
        (["benchmark.groups=[]"], r"benchmark.groups=\[\]: must name some of the cases' groups f"),
        (["benchmark.precision=fp8"], "precision='fp8': must be one of bf16, fp16, fp32"),
        (["benchmark.launch_ms=0"], "benchmark.launch_ms=0.0: must be above 0"),
        (["benchmark.budget_minutes=-1"], "budget_minutes=-1.0: must be at least 0"),
        (["parallel.gpus_per_node=2"], "benchmark.name='kernels': runs on one GPU"),
        (["benchmark.settings=[{peer: sdpa}]"], r"settings\[0\].peer='sdpa': must be one of flex_"),
        (["benchmark.settings=[{peer: flex_flash, k_block: 0}]"], r"settings\[0\].k_block=0: must"),
        ([{"length": 0}], r"cases\[0\].length=0: must be at least 1"),
        ([{"heads": 3, "kv_heads": 2}], r"cases\[0\].kv_heads=2: must divide heads=3"),
        ([{"backends": ["flash"]}], r"cases\[0\].backends='flash': must be one of longgen, .*spar"),
        ([{"backends": ["dense_cudnn"]}], r"backends='dense_cudnn': must be one of longgen"),
        ([{"backends": ["copy"]}], r"backends='copy': must be one of longgen"),
        ([{"backends": []}], r"cases\[0\].backends=\[\]: must name some of longgen"),
        ([{"pattern": None}], "must be one of dense_flash_attn_4, .* for a full pattern"),
        ([{"pattern": {"window": 0}}], "pattern.window=0: must be a whole number of at least 1"),
    ],
)
def test_refusals(overrides, message, tmp_path, capsys):
    (change,) = overrides
    case, more = (CASES[0] | change, []) if isinstance(change, dict) else (CASES[0], [change])
    line = refused(
        *(capsys, *CONFIG, "benchmark.groups=[forward_backward]", with_cases(case), *more),
        f"outputs={tmp_path}",
    )
    assert re.search(message, line), line

"""Random calls of the Triton kernels against the float32 oracle; a case is its number.

`pytest tests/kernels/test_fuzz.py -k "[17]"` runs one case again.
"""

import numpy as np
import pytest
import torch

from kernels.pattern import Pattern
from tests.kernels.cases import DEVICE, ON_GPU, TOLERANCE, assert_matches_reference, small_tiles

NORMAL, ALL = 30, 500
# Tokens of a row: what the interpreter takes half a second for, and what fills many tiles.
MOST_TOKENS = 1500 if ON_GPU else 45
LARGEST = 128 if ON_GPU else 32
TILE_K = 64 if ON_GPU else 16
# Not every pair: on a GPU each is compiled.
KINDS = [
    (32, torch.float32),
    (64, torch.float32),
    (64, torch.bfloat16),
    (80, torch.float16),
    (96, torch.bfloat16),
    (128, torch.float32),
    (128, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    if not ON_GPU:
        small_tiles(monkeypatch, TILE_K)


def draw(seed: int) -> dict:
    """The call of that number."""
    random = np.random.default_rng(seed)

    def upto(most: int, least: int = 0) -> int:
        # Small numbers as often as large ones.
        return least - 1 + int(np.exp(random.uniform(0, np.log(most - least + 2))))

    # Multiples of a tile are what the kernels have a faster path for.
    round_to = int(random.choice([1, TILE_K]))
    pattern = Pattern(
        sink_tokens=upto(LARGEST) // round_to * round_to,
        window=upto(2 * LARGEST, least=1),
        block=max(upto(LARGEST, least=1) // round_to, 1) * round_to,
        stride=int(random.integers(2, 9)) if random.random() < 0.7 else None,
        phase=str(random.choice(["shared", "per_head"])),
    )
    lengths = []
    while not sum(lengths):
        lengths = [upto(MOST_TOKENS) for _ in range(int(random.integers(1, 5)))]
    while sum(lengths) > MOST_TOKENS:
        lengths = [length // 2 for length in lengths]
    kv_heads = int(random.choice([1, 1, 2, 3])) if ON_GPU else int(random.choice([1, 1, 1, 1, 2]))
    head_dim, dtype = KINDS[random.integers(len(KINDS))]
    return {
        "pattern": pattern,
        "lengths": lengths,
        "heads": kv_heads * int(random.choice([1, 1, 1, 1, 2, 4 if ON_GPU else 2])),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "first_kv_head": upto(9),
        "with_lse": bool(random.random() < 0.5),
        "seed": seed,
    }


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=[pytest.mark.slow] if n >= NORMAL else []) for n in range(ALL)],
)
def test_a_random_call_matches_the_reference(seed):
    case = draw(seed)
    more = case["first_kv_head"] + seed % 3
    # The message of a failure holds the case by its parameters.
    call = {"device": DEVICE, "backend": "triton", "more_kv_heads": more}
    positions = [case.pop(k) for k in ("pattern", "lengths", "heads", "kv_heads", "head_dim")]
    assert_matches_reference(*positions, **case, **call)


def test_the_cases_cover_what_they_should():
    cases = [draw(seed) for seed in range(NORMAL)]
    patterns = [case["pattern"] for case in cases]
    assert {p.stride is None for p in patterns} == {True, False}
    assert any(p.heads_differ for p in patterns)
    assert any(p.sink_tokens == 0 for p in patterns) and any(p.window < 4 for p in patterns)
    assert any(p.stride and p.block % TILE_K == p.sink_tokens % TILE_K == 0 for p in patterns)
    assert {case["dtype"] for case in cases} == set(TOLERANCE)
    assert {case["head_dim"] for case in cases} == {32, 64, 80, 96, 128}
    assert any(case["heads"] > case["kv_heads"] for case in cases)
    assert any(len(case["lengths"]) > 2 for case in cases)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_the_fastest_backend_matches_the_reference(seed):
    case = draw(seed)
    more = case["first_kv_head"]
    positions = [case.pop(k) for k in ("pattern", "lengths", "heads", "kv_heads", "head_dim")]
    assert_matches_reference(*positions, **case, device=DEVICE, more_kv_heads=more)

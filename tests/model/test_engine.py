"""The engine against one forward of the exported class; its memory, its refusals, its ranks."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist

import model.engine
from kernels import pointwise_kernels
from model.engine import Engine
from model.engine_weights import ServingError, Shard, load_weights, model_reader, random_reader
from tests.closeness import assert_close_by_norm, relative_error
from tests.model.small import PATTERNS, VOCAB, ids, small_model
from tests.training.worlds import run_world

CPU, DEVICE = torch.device("cpu"), "cuda" if torch.cuda.is_available() else "cpu"
# Of float32: weights of gain 2 amplify rounding to 4e-6 in the worst of these cases.
TOLERANCE = 2e-5


def make(hybrid, shard=Shard(), group=None, dtype=torch.float32, **options):  # noqa: B008
    device = hybrid.device
    weights = load_weights(model_reader(hybrid), hybrid.config, dtype, device, shard)
    return Engine(hybrid.config, weights, shard, group, **options)


def logits_by_engine(engine, rows, fed):
    """Logits [B, fed + 1, V] after all but the last `fed` tokens of each row, and after each."""
    engine.reserve(len(rows), max(map(len, rows)))
    prompts = [row[: len(row) - fed] for row in rows]
    found = [engine.prefill(prompts).clone()]
    for step in range(fed):
        engine.tokens_B.copy_(torch.stack([row[len(row) - fed + step] for row in rows]))
        engine.decode()
        found.append(engine.logits_BV.clone())
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", PATTERNS)
# The windows are 7 and 8, the blocks 2 and 4.
@pytest.mark.parametrize("length", [6, 7, 8, 9, 16, 17, 90])
def test_any_chunking_and_decoding_equal_one_forward(name, length):
    hybrid, rows = small_model(PATTERNS[name]), ids(1, length + 5)
    with torch.no_grad():
        expected = hybrid(rows).logits[:, length - 1 :]
    for chunk in (3, 20, 1000) if length > 20 else (1, 8, 1000):
        found = logits_by_engine(make(hybrid, chunk=chunk), list(rows), 5)
        assert_close_by_norm(found, expected, TOLERANCE, chunk)


@pytest.mark.parametrize("name", PATTERNS)
def test_far_beyond_the_window_by_decoding_alone(name):
    hybrid, rows = small_model(PATTERNS[name]), ids(1, 80)
    with torch.no_grad():
        expected = hybrid(rows).logits
    assert_close_by_norm(logits_by_engine(make(hybrid), list(rows), 79), expected, TOLERANCE)


@pytest.mark.parametrize("name", PATTERNS)
def test_rows_of_a_batch_are_independent(name):
    """Of every length around the window; the same whoever else is there, and one after another."""
    hybrid = small_model(PATTERNS[name])
    engine = make(hybrid, chunk=7)
    rows = [ids(length, seed=length) for length in (8, 12, 13, 14, 47)]
    together = logits_by_engine(engine, rows, 4)
    for row, alone in zip(together, rows, strict=True):
        with torch.no_grad():
            expected = hybrid(alone[None]).logits[0, -5:]
        assert_close_by_norm(row, expected, TOLERANCE)
    again = logits_by_engine(engine, rows[::-1], 4)
    assert_close_by_norm(again.flip(0), together, TOLERANCE)


def test_greedy_tokens_are_those_of_transformers_generate():
    hybrid = small_model(PATTERNS["per_head"])
    prompts = [ids(9, seed=1).tolist(), ids(30, seed=2).tolist()]
    heard = []
    steps = list(make(hybrid, chunk=8).generate(prompts, 12, told=heard.append))
    assert sum(heard) == 39 and max(heard) == 8
    for row, prompt in enumerate(prompts):
        wanted = hybrid.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert [step[row] for step in steps] == wanted[0, len(prompt) :].tolist()


def test_rows_end_by_themselves():
    hybrid, prompts = small_model(PATTERNS["window"]), [[5, 6], [7, 8, 9]]
    engine = make(hybrid)
    steps = list(engine.generate(prompts, 9))
    stop = steps[2][0]
    assert stop not in (steps[0][0], steps[1][0])
    stopped = list(engine.generate(prompts, 9, stop_ids=[stop]))
    assert [step[0] for step in stopped[:3]] == [step[0] for step in steps[:3]]
    assert all(step[0] is None for step in stopped[3:])
    last = [step[1] for step in steps].index(stop) + 1 if stop in [s[1] for s in steps] else 9
    assert len(stopped) == max(3, last)


def test_tokens_are_drawn_by_temperature_and_seed():
    hybrid = small_model(PATTERNS["window"])
    engine, prompt = make(hybrid), [[5, 6, 7]]
    first = list(engine.generate(prompt, 20, temperature=0.8, seed=3))
    assert first == list(engine.generate(prompt, 20, temperature=0.8, seed=3))
    assert first != list(engine.generate(prompt, 20, temperature=0.8, seed=4))
    greedy = list(engine.generate(prompt, 20))
    assert list(engine.generate(prompt, 20, temperature=1e-4)) == greedy != first
    # Frequencies of a known distribution.
    engine._greedy = False
    engine.temperature.fill_(2.0)
    logits = torch.tensor([0.0, 2.0, 4.0]).expand(30000, -1)
    drawn = engine._sample(logits).bincount(minlength=3) / 30000
    assert torch.allclose(drawn, (logits[0] / 2).softmax(0), atol=0.015)


def test_the_cache_takes_the_bytes_that_were_told_and_is_used_again():
    hybrid = small_model(PATTERNS["per_head"])
    engine = make(hybrid)
    engine.reserve(3, 50)
    assert engine.cache.allocated_bytes() == engine.cache_bytes(3, 50)
    held = engine.cache.layers[1].keys
    logits = logits_by_engine(engine, list(ids(3, 50)), 2)
    assert engine.cache.layers[1].keys is held and engine.cache.lengths.tolist() == [50] * 3
    live = hybrid.new_cache()
    with torch.no_grad():
        hybrid(ids(3, 50), past_key_values=live)
    assert engine.cache.live_bytes() == live.live_bytes()
    assert torch.equal(logits_by_engine(engine, list(ids(3, 50)), 2), logits)


def test_a_cache_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    engine = make(small_model(PATTERNS["shared"]))
    free = engine.cache_bytes(2, 300) + engine.activation_bytes(300)
    monkeypatch.setattr(model.engine, "free_bytes", lambda device: free)
    with pytest.raises(ServingError, match=r"2 rows of 400 tokens: \d+ bytes") as refused:
        engine.reserve(2, 400)
    told = str(refused.value)
    assert f"{engine.cache_bytes(2, 400)} of them for the cache; cpu has {free} left" in told
    fits = int(told.split("At most ")[1].split()[0])
    assert fits >= 300
    engine.reserve(2, fits)
    with pytest.raises(ServingError, match=f"At most {fits} tokens"):
        engine.reserve(2, fits + 1)
    monkeypatch.setattr(model.engine, "free_bytes", lambda device: 10)
    with pytest.raises(ServingError, match="Not even one token fits"):
        engine.reserve(2, 5)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "have at least one token each"),
        ([[1], []], {}, r"prompts \[1\]: must have at least one token"),
        ([[3, VOCAB]], {}, f"token id {VOCAB}: must be from 0 to {VOCAB - 1}"),
        ([[3, -1]], {}, "token id -1"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ([[3] * 60], {"strict": True}, "60 tokens .* 9 new ones: .* texts of at most 64; shorten"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, options, words):
    engine = make(small_model(PATTERNS["window"], max_position_embeddings=64))
    with pytest.raises(ServingError, match=words):
        next(engine.generate(prompts, **{"max_new_tokens": 9, **options}))
    assert engine.cache is None


def test_a_text_beyond_the_trained_context_is_warned_of(caplog):
    engine = make(small_model(PATTERNS["window"], max_position_embeddings=64))
    with caplog.at_level(logging.WARNING, "longgen.serving"):
        list(engine.generate([[3] * 60], 4))
        assert not caplog.messages
        list(engine.generate([[3] * 60], 5))
    assert "60 tokens of the prompt and 5 new ones: the model was trained" in caplog.text


def test_weights_that_do_not_fit_are_refused():
    hybrid = small_model(PATTERNS["window"])
    honest = model_reader(hybrid)

    def shorter(name, within):
        return honest(name, within)[:-1] if "1.mlp.down" in name else honest(name, within)

    with pytest.raises(ServingError, match=r"layers.1.mlp.down_proj.weight: .*\(31, 48\) where"):
        load_weights(shorter, hybrid.config, torch.float32, CPU)
    with pytest.raises(
        ServingError, match="over 3 .* must divide num_key_value_heads=2; start 1, 2"
    ):
        load_weights(honest, hybrid.config, torch.float32, CPU, Shard(0, 3))


def test_random_weights_and_a_tied_head():
    config = small_model(PATTERNS["window"], tie_word_embeddings=True).config
    told = []
    weights = load_weights(
        random_reader(CPU, 1), config, torch.bfloat16, CPU, told=lambda *at: told.append(at)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert weights.head is weights.embed and (weights.norm == 1).all()
    assert 0.015 < weights.layers[0].qkv.float().std() < 0.025
    layer = 64 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32
    assert weights.nbytes == 2 * (VOCAB * 32 + 3 * layer + 32)


def sharded(cases):
    """Of each case: a rank's logits, drawn tokens, and its bytes over half of the whole's."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return [one_shard(*case) for case in cases]


def one_shard(name, vocab):
    hybrid = small_model(PATTERNS[name], vocab_size=vocab)
    shard = Shard(dist.get_rank(), 2)
    engine = make(hybrid, shard, dist.group.WORLD, chunk=9)
    rows = [ids(length, seed=length) for length in (8, 40)]
    found = logits_by_engine(engine, rows, 6)
    drawn = list(engine.generate([[5, 6, 7]], 8, temperature=1.0, seed=1 + shard.rank))
    half = engine.cache_bytes(1, 40) * 2 - make(hybrid).cache_bytes(1, 40)
    return found.numpy(), drawn, half


def test_two_ranks_are_one():
    """With a vocabulary that two ranks share, and with one that each has whole."""
    cases = [("per_head", 98), ("shared", 97)]
    ranks = run_world(2, sharded, cases)
    for (name, vocab), one, other in zip(cases, *ranks, strict=True):
        (first, drawn, half), (second, drawn_too, _) = one, other
        hybrid = small_model(PATTERNS[name], vocab_size=vocab)
        rows = [ids(length, seed=length) for length in (8, 40)]
        expected = logits_by_engine(make(hybrid, chunk=9), rows, 6)
        assert_close_by_norm(torch.from_numpy(first), expected, TOLERANCE)
        assert (first == second).all() and drawn == drawn_too
        # KV heads of one rank have phases of their own, so that it may need less than half.
        assert half == 0 if name == "shared" else half <= 0


def use_kernels(monkeypatch):
    """The engine as on a GPU, its kernels by Triton's interpreter where there is none."""
    for name in ("add_rms_norm", "swiglu", "rotate_and_store"):
        monkeypatch.setattr(f"model.decoder.{name}", getattr(pointwise_kernels, name))
    monkeypatch.setattr("kernels.cached_attention.kernels_serve", lambda q: True)


@pytest.mark.parametrize("name", ["per_head"])
def test_by_the_kernels(name, monkeypatch):
    wide = {"head_dim": 64, "num_attention_heads": 2, "hidden_size": 64}
    hybrid = small_model(PATTERNS[name], is_full=(False, True), **wide).to(DEVICE)
    use_kernels(monkeypatch)
    rows = [ids(length, seed=length) for length in (7, 21)]
    found = logits_by_engine(make(hybrid, chunk=9, graphs=False), rows, 2)
    for row, alone in zip(found, rows, strict=True):
        with torch.no_grad():
            expected = hybrid(alone[None].to(DEVICE)).logits[0, -3:]
        assert_close_by_norm(row, expected, TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_decodes_as_no_graph_does(name, dtype, batch):
    """Past the window and a block: the same logits bit by bit, as exact as one forward's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    wide = {"head_dim": 64, "hidden_size": 128, "intermediate_size": 256}
    hybrid = small_model(PATTERNS[name], **wide).to("cuda", dtype)
    rows = [ids(70 + 5 * row, seed=row).cuda() for row in range(batch)]
    engine = make(hybrid, dtype=dtype, chunk=16, graphs=False)
    # Each graph's engine would choose by times of its own.
    engine.reserve(batch, len(rows[-1]))
    engine._tune()
    eager = logits_by_engine(engine, rows, 40)
    engine.graphs = True
    found = logits_by_engine(engine, rows, 40)
    assert torch.equal(found, eager)
    exact = copy.deepcopy(hybrid).float()
    for row, alone in zip(found, rows, strict=True):
        with torch.no_grad():
            expected = exact(alone[None]).logits[0, -41:]
            stock = hybrid(alone[None]).logits[0, -41:]
        rounding = 1.5 * relative_error(stock.float(), expected)
        assert_close_by_norm(row.float(), expected, max(rounding, 2e-5))


@pytest.mark.gpu
def test_generate_on_a_gpu_is_greedy_and_stops():
    wide = {"head_dim": 64, "hidden_size": 128, "intermediate_size": 256}
    hybrid = small_model(PATTERNS["per_head"], **wide).to("cuda")
    engine = make(hybrid, chunk=16)
    prompts = [ids(9, seed=1).tolist(), ids(50, seed=2).tolist()]
    steps = list(engine.generate(prompts, 20))
    assert engine._captured is not None
    for row, prompt in enumerate(prompts):
        wanted = hybrid.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=20, do_sample=False
        )
        assert [step[row] for step in steps] == wanted[0, len(prompt) :].tolist()
    first = list(engine.generate(prompts, 20, temperature=0.9, seed=2))
    assert first == list(engine.generate(prompts, 20, temperature=0.9, seed=2)) != steps

"""Serving one model on one device, or on the ranks of a tensor-parallel group: prompts to tokens.

Memory is reserved, or refused, before anything runs. Prompts are taken in row by row, some tokens
at a time; then all rows decode together, a step being one CUDA graph, from the tokens it reads to
the tokens it leaves for the next.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist

from kernels.cached_attention import kernels_serve
from kernels.slots import Slots
from model.cache import LongGenCache
from model.decoder import Decoder
from model.engine_weights import EngineWeights, ServingError, Shard
from model.modeling_longgen import LongGenConfig

log = logging.getLogger("longgen.serving")

# Tokens of a prompt that are taken in at a time.
CHUNK = 16384
# Tokens of a text whose logits exist at a time.
SCORED = 1024
# Beside what is counted: workspaces of the libraries, results of the kernels' splits.
SPARE_BYTES = 2**30


def free_bytes(device: torch.device) -> int:
    """Bytes that the device can still give, what PyTorch has cached among them."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_prompts(
    config: LongGenConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    strict: bool = False,
    strict_key: str = "strict",
) -> None:
    """Refuse what cannot be continued; warn where a text leaves the trained context.

    `strict_key`: what the message calls `strict`.

    Raises:
        ServingError: for no prompt, an empty one, an id outside the vocabulary, no new token asked
            for, and with `strict` for a text beyond the trained context.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
        raise ServingError(
            f"prompts {empty or '(none)'}: must have at least one token each, such as the "
            "tokenizer's bos_token; give a prompt"
        )
    if max_new_tokens < 1:
        raise ServingError(f"max_new_tokens={max_new_tokens}: must be at least 1; set it")
    size = config.vocab_size
    for row, prompt in enumerate(prompts):
        wrong = [token for token in (min(prompt), max(prompt)) if not 0 <= token < size]
        if wrong:
            raise ServingError(
                f"prompt {row} has token id {int(wrong[0])}: must be from 0 to {size - 1}, the "
                "model's vocabulary; use the tokenizer that belongs to the model"
            )
    trained, longest = config.max_position_embeddings, max(map(len, prompts))
    if longest + max_new_tokens > trained:
        told = (
            f"{longest} tokens of the prompt and {max_new_tokens} new ones: the model was trained "
            f"on texts of at most {trained}"
        )
        if strict:
            raise ServingError(f"{told}; shorten the prompt, or set {strict_key}=false to go on")
        log.warning("%s; what it says beyond that is not to be trusted", told)


class Engine:
    """Generates with a model's weights.

    Args:
        config: the exported model's configuration.
        weights: this rank's.
        shard, group: where this rank stands among the tensor-parallel ones.
        chunk: tokens of a prompt that are taken in at a time: activations grow with it.
        dense_backend: runs full layers of prompts; a name of kernels.dense.BACKENDS or None.
        graphs: decode in CUDA graphs; None: where the device and the kernels can.

    Attributes:
        cache: the rows' cache; None before the first prompt.
        linears: what multiplies in a decode step, by the product's name.
    """

    def __init__(
        self,
        config: LongGenConfig,
        weights: EngineWeights,
        shard: Shard = Shard(),  # noqa: B008
        group: dist.ProcessGroup | None = None,
        *,
        chunk: int = CHUNK,
        dense_backend: str | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.config, self.chunk = config, chunk
        self.decoder = Decoder(config, weights, shard, group, dense_backend)
        self.device, self.group = self.decoder.device, group
        head = torch.empty(0, config.head_dim, dtype=self.decoder.dtype, device=self.device)
        self.graphs = kernels_serve(head) if graphs is None else graphs
        self.cache: LongGenCache | None = None
        self.linears: dict[str, str] = {}
        self._tuned_for = 0
        self._captured: torch.cuda.CUDAGraph | None = None
        self._greedy = True

    def cache_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of this rank's keys and values for so many rows of so many tokens."""
        decoder, total = self.decoder, self.config.num_key_value_heads
        shard = decoder.kv_heads, decoder.first_kv_head, total
        counts = {p: Slots(p, tokens, *shard).count for p in set(decoder.patterns)}
        slots = sum(counts[pattern] for pattern in decoder.patterns)
        return 2 * batch * slots * decoder.kv_heads * self.config.head_dim * decoder.dtype.itemsize

    def activation_bytes(self, tokens: int) -> int:
        """Bytes of a chunk of a prompt beside the cache, counted at the layer's widest place."""
        config, decoder = self.config, self.decoder
        qkv = (decoder.heads + 2 * decoder.kv_heads) * config.head_dim
        width = config.intermediate_size // decoder.shard.size
        wide = 4 * config.hidden_size + 2 * qkv + 3 * width
        return min(tokens, self.chunk) * wide * decoder.dtype.itemsize

    def reserve(self, batch: int, tokens: int) -> None:
        """Memory for so many rows of so many tokens, prompt and answer together; all are empty.

        Raises:
            ServingError: where the device has not enough: the bytes needed, and what would fit.
        """
        held = self.cache
        if held is not None and (len(held.lengths), held.tokens) == (batch, tokens):
            held.lengths.zero_()
            for table in held.positions.values():
                table.fill_(-1)
            return
        # Graphs hold the addresses of what they read and write.
        self.cache = self._captured = None
        del held
        available = free_bytes(self.device) - (SPARE_BYTES if self.device.type == "cuda" else 0)
        if self.group is not None:
            # All or none: one that went on alone would wait for the others.
            least = torch.tensor(available, device=self.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
            available = int(least)

        def needed(length: int) -> int:
            return self.cache_bytes(batch, length) + self.activation_bytes(length)

        if needed(tokens) > available:
            fits = _most(tokens, lambda length: needed(length) <= available)
            remedy = f"At most {fits} tokens a row fit" if fits else "Not even one token fits"
            raise ServingError(
                f"{batch} rows of {tokens} tokens: {needed(tokens)} bytes, "
                f"{self.cache_bytes(batch, tokens)} of them for the cache; {self.device} has "
                f"{max(0, available)} left. {remedy}: shorten the prompt, lower the batch or the "
                "chunk, or share the model among more GPUs"
            )
        self.cache = self.decoder.new_cache(tokens)
        self.cache.start(batch, self.device)
        shape = batch, self.decoder.kv_heads, 1, self.config.head_dim
        like = torch.empty(shape, dtype=self.decoder.dtype, device=self.device)
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)
        self.tokens_B = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.temperature = torch.ones((), dtype=torch.float32, device=self.device)
        self.logits_BV: torch.Tensor | None = None

    def prefill(
        self, prompts: Sequence[torch.Tensor], told: Callable[[int], None] = lambda tokens: None
    ) -> torch.Tensor:
        """Take in each reserved row's prompt, int64 ids; `told` hears of tokens as they are taken.

        Returns:
            each row's logits after its last token, [B, V].
        """
        logits = []
        for row, prompt in enumerate(prompts):
            start = 0
            for ids in prompt.split(self.chunk):
                last = self.decoder.prefill(ids.to(self.device), self.cache, row, start)
                start += len(ids)
                told(len(ids))
            logits.append(self.decoder.logits(last))
        self.logits_BV = torch.cat(logits)
        return self.logits_BV

    def score(self, ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Yield the logits [.., V] at the last `count` of a text's int64 ids, some at a time.

        Raises:
            ServingError: where the text does not fit.
        """
        self.reserve(1, len(ids))
        start, first = 0, len(ids) - count
        for part in ids.split(self.chunk):
            asked = start + len(part) - max(first, start)
            hidden = self.decoder.prefill(
                part.to(self.device), self.cache, 0, start, last=max(1, asked)
            )
            start += len(part)
            if asked > 0:
                yield from map(self.decoder.logits, hidden.split(SCORED))

    def _sample(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """[B]: the likeliest, or drawn at `temperature` by Gumbel's trick; alike on all ranks."""
        if not self._greedy:
            drawn = torch.empty_like(logits_BV, dtype=torch.float32).exponential_()
            # -log of an exponential variable is a Gumbel one.
            logits_BV = logits_BV.float() / self.temperature - drawn.log()
        tokens = logits_BV.argmax(-1)
        if self.group is not None:
            dist.broadcast(tokens, dist.get_global_rank(self.group, 0), group=self.group)
        return tokens

    def _step(self) -> None:
        self.logits_BV = self.decoder.step(self.tokens_B, self.cache)
        self.tokens_B.copy_(self._sample(self.logits_BV))

    def _tune(self) -> None:
        """Choose what multiplies so many tokens fastest."""
        batch = len(self.tokens_B)
        if self._tuned_for == batch:
            return
        from kernels.skinny_linear import fastest_linear

        weights = self.decoder.weights
        for name in self.decoder.linears:
            own = [weights.head] if name == "head" else [getattr(x, name) for x in weights.layers]
            self.decoder.linears[name], self.linears[name] = fastest_linear(batch, own)
        self._tuned_for = batch
        log.info("a step of %d rows multiplies by %s", batch, self.linears)

    def capture(self) -> None:
        """Make the graph of a step of the reserved rows; what they hold stays as it is."""
        if self._captured is not None:
            return
        self._tune()
        before = self.cache.lengths.clone(), self.tokens_B.clone()
        drawn = torch.cuda.get_rng_state(self.device)
        # Once beforehand, which compiles. The slot that it writes is the next step's own.
        self._step()
        torch.cuda.synchronize(self.device)
        self._restore(*before)
        self._captured = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread asks for its events meanwhile.
        with torch.cuda.graph(self._captured, capture_error_mode="thread_local"):
            self._step()
        self._restore(*before)
        # What is drawn does not depend on whether the graph was there.
        torch.cuda.set_rng_state(drawn, self.device)

    def _restore(self, lengths: torch.Tensor, tokens: torch.Tensor) -> None:
        self.cache.lengths.copy_(lengths)
        self.tokens_B.copy_(tokens)

    def decode(self) -> None:
        """One token more of every row: `tokens_B` are fed, and are then the next ones."""
        if not self.graphs:
            self._step()
            return
        self.capture()
        self._captured.replay()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 1,
        stop_ids: Sequence[int] = (),
        strict: bool = False,
        checked: bool = False,
        told: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[list[int | None]]:
        """Yield each step's token of every row, None for rows that have ended.

        Args:
            temperature: 0 takes the likeliest token, else tokens are drawn with `seed`.
            stop_ids: tokens that end a row; they are yielded.
            strict: refuse texts beyond the trained context.
            checked: the prompts have passed check_prompts.
            told: hears of the prompts' tokens as they are taken in.

        Raises:
            ServingError: before any work, for prompts that cannot be continued or do not fit.
        """
        if not checked:
            check_prompts(self.config, prompts, max_new_tokens, strict)
        # The last token is not fed.
        self.reserve(len(prompts), max(map(len, prompts)) + max_new_tokens - 1)
        if self._greedy != (temperature == 0):
            self._greedy, self._captured = temperature == 0, None
        self.temperature.fill_(temperature or 1.0)
        torch.manual_seed(seed)
        self.prefill([torch.tensor(prompt, dtype=torch.int64) for prompt in prompts], told)
        self.tokens_B.copy_(self._sample(self.logits_BV))
        ended = [False] * len(prompts)
        for tokens in islice(self._tokens(max_new_tokens), max_new_tokens):
            yield [None if over else token for over, token in zip(ended, tokens, strict=True)]
            ended = [a or b in stop_ids for a, b in zip(ended, tokens, strict=True)]
            if all(ended):
                return

    def _tokens(self, count: int) -> Iterator[list[int]]:
        """Each step's tokens; the host reads one step's while the device is at the next."""
        if self.device.type != "cuda":
            for step in range(count):
                yield self.tokens_B.tolist()
                if step < count - 1:
                    self.decode()
            return
        places = [torch.empty(len(self.tokens_B), dtype=torch.int64, pin_memory=True) for _ in "ab"]
        arrived = [torch.cuda.Event() for _ in places]
        for step in range(count):
            turn = step % 2
            places[turn].copy_(self.tokens_B, non_blocking=True)
            arrived[turn].record()
            if step < count - 1:
                self.decode()
            arrived[turn].synchronize()
            yield places[turn].tolist()


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The greatest length below `limit` that fits; 0 for none."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

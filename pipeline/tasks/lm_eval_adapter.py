"""An evaluated model as lm-eval's tasks call one. Imports lm-eval, which is optional.

Follows lm-eval 0.4.13's own `hf` model: the tokenizer's special tokens, <bos> as the context of
an empty one, and windows over texts that are longer than the model's context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.evaluated_model import Evaluated
from pipeline.prompts import encode, encode_prompt

# Where a model's configuration names no context.
CONTEXT = 2048
NEW_TOKENS = 256


class EvaluatedLM(TemplateLM):
    """`batch_tokens`: of the rows that the model takes together, padding among them."""

    def __init__(self, model: Evaluated, tokenizer: Any, batch_tokens: int) -> None:
        super().__init__()
        self.evaluated, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.max_length = model.context or CONTEXT
        bos = tokenizer.bos_token_id
        self.adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]

    @property
    def eot_token_id(self) -> int:
        """<eos>."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: <bos>, where there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids after <bos> where the tokenizer adds one, without what it adds behind the text."""
        starts = self.adds_bos and add_special_tokens is not False
        return (encode_prompt if starts else encode)(self.tokenizer, string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            row = np.array((context + continuation)[-(self.max_length + 1) :], np.int64)
            rows.append((row[:-1], row[-len(continuation) :]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for batch in self._batches([len(row) for row, _ in rows]):
            logits = self.evaluated.last_logits(
                [rows[i][0] for i in batch], [len(rows[i][1]) for i in batch]
            )
            for index, scores in zip(batch, logits, strict=True):
                target = torch.from_numpy(rows[index][1]).to(scores.device)
                logp = scores.float().log_softmax(-1)
                total = logp.gather(-1, target[:, None]).sum().item()
                found[index] = total, bool((logp.argmax(-1) == target).all())
        return found

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Indices of rows by descending length, in batches of at most batch_tokens."""
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= self.batch_tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            rows = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(rows)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, to the first of a request's stops or its max_gen_toks tokens."""
        asked = []
        for context, options in (request.args for request in requests):
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            new_tokens = int(options.get("max_gen_toks", NEW_TOKENS))
            ids = self.tok_encode(context)[-max(1, self.max_length - new_tokens) :]
            asked.append((np.array(ids, np.int64), stops, new_tokens))
        found = [""] * len(asked)
        for batch in self._batches([len(ids) + tokens for ids, _, tokens in asked]):
            most = max(asked[index][2] for index in batch)
            answers = self.evaluated.answers([asked[index][0] for index in batch], most)
            for index, answer in zip(batch, answers, strict=True):
                _, stops, new_tokens = asked[index]
                text = self.tokenizer.decode(answer[:new_tokens], skip_special_tokens=True)
                for stop in filter(None, stops):
                    text = text.split(stop)[0]
                found[index] = text
        return found

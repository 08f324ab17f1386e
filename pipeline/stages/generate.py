"""generate: stream the continuation of a prompt, by the exported model or the one before it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from pipeline.evaluated_model import load_model
from pipeline.manifest import StageContext, StageError
from pipeline.schema import Config

INPUTS = ("fetch", "export")
# A prompt is asked to be answered, not to be up to date.
ALWAYS = True
MODELS = ("final", "base")


def depends_on(config: Config) -> dict[str, Any]:
    """The generate section."""
    return {"generate": asdict(config.generate)}


class TimedStreamer(TextStreamer):
    """Prints prompt and text as it comes; `times` are when each new token came, in seconds."""

    def __init__(self, tokenizer: Any, prompt: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prompt, self.times = prompt, []
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then token after token."""
        if self.prompt_seen:
            if not self.times:
                # Not before: the first forward may log which backend it runs on.
                print(self.prompt, end="", flush=True)
            self.times.append(time.perf_counter())
        self.prompt_seen = True
        super().put(value)


def run(context: StageContext) -> dict[str, Any]:
    """Print the continuation and its speed; write both to generate.json.

    Raises:
        StageError: without a prompt, on an unknown model, or on fewer than one new token.
    """
    wanted = context.config.generate
    if not wanted.prompt:
        raise StageError(
            "generate.prompt='': there is nothing to continue; set generate.prompt='Once upon a "
            "time' (quoted for the shell)"
        )
    if wanted.model not in MODELS:
        raise StageError(
            f"generate.model={wanted.model!r}: must be one of {', '.join(MODELS)}; set "
            "generate.model"
        )
    if wanted.max_new_tokens < 1:
        raise StageError(
            f"generate.max_new_tokens={wanted.max_new_tokens}: must be at least 1; set "
            "generate.max_new_tokens"
        )
    tokenizer = AutoTokenizer.from_pretrained(context.folder("fetch") / "model")
    ids = tokenizer(wanted.prompt)["input_ids"]
    # Training starts every document with <bos>; not every tokenizer adds it by itself.
    if ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    model = load_model(wanted.model, context)
    prompt = torch.tensor([ids], device=model.device)
    streamer = TimedStreamer(tokenizer, wanted.prompt)
    started = time.perf_counter()
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=wanted.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    first, last = streamer.times[0], streamer.times[-1]
    decoded = len(streamer.times) - 1
    record = {
        "model": wanted.model,
        "prompt": wanted.prompt,
        "prompt_tokens": len(ids),
        "text": tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True),
        "new_tokens": len(streamer.times),
        "seconds_to_first_token": first - started,
        # The first token is the prompt's work: decoding is what comes after it.
        "tokens_per_second": decoded / (last - first) if decoded else None,
    }
    (context.out / "generate.json").write_text(json.dumps(record, indent=2) + "\n")
    speed = f", then {record['tokens_per_second']:.1f} tokens/s" if decoded else ""
    context.log.info(
        "%d prompt tokens, first token after %.2f s%s", len(ids), first - started, speed
    )
    return {key: record[key] for key in ("prompt_tokens", "new_tokens", "tokens_per_second")}

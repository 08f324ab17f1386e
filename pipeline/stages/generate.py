"""generate: stream the continuation of a prompt, by the exported model or the one before it.

The answer alone goes to standard output; progress, speed and errors go to standard error.
With generate.tensor=N the model is shared among N processes, a GPU each. The prompt is given as
generate.prompt=TEXT, as generate.prompt_file=PATH, or with generate.prompt=- on standard input.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from transformers import TextStreamer

from data_prep.tokenizer_folder import open_tokenizer
from model.engine import Engine, check_prompts
from model.engine_weights import ServingError
from pipeline.command_line import discard_stdout
from pipeline.evaluated_model import model_config, model_folder
from pipeline.manifest import StageContext, StageError
from pipeline.prompts import encode_prompt, end_tokens
from pipeline.schema import Config, GenerateSection
from pipeline.serving import join_ranks, load_engine

INPUTS = ("fetch", "export")
# A prompt is asked to be answered, not to be up to date.
ALWAYS = True
DISTRIBUTED = True
MODELS = ("final", "base")
STDIN = "-"


def processes(config: Config) -> int:
    """How many share the model."""
    return config.generate.tensor


def depends_on(config: Config) -> dict[str, Any]:
    """The generate section."""
    return {"generate": asdict(config.generate)}


def read_prompt(wanted: GenerateSection) -> str:
    """The prompt's text.

    Raises:
        StageError: where there is none, two are named, or the file cannot be read as text.
    """
    if wanted.prompt and wanted.prompt_file:
        raise StageError(
            f"generate.prompt and generate.prompt_file={wanted.prompt_file!r}: only one can be "
            "continued; set one of them"
        )
    if wanted.prompt_file:
        named = f"generate.prompt_file={wanted.prompt_file!r}"
        try:
            raw = Path(wanted.prompt_file).read_bytes()
        except OSError as error:
            raise StageError(f"{named}: {error.strerror}; name a text file") from error
    elif wanted.prompt == STDIN:
        # its bytes: what Python makes of them follows the locale
        raw, named = sys.stdin.buffer.read(), "standard input"
    else:
        # "surrogatepass": what the command line had of other bytes is then no UTF-8 either
        raw = wanted.prompt.encode("utf-8", "surrogatepass")
        named = f"generate.prompt={wanted.prompt[:40]!r}"
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise StageError(
            f"{named}: is not UTF-8 text ({error}); convert it, such as by "
            "`iconv -f latin1 -t utf-8`, or give another text"
        ) from error
    if not text:
        raise StageError(
            f"{named}: there is nothing to continue; set generate.prompt='Once upon a time' "
            "(quoted for the shell), generate.prompt_file=PATH, or generate.prompt=- and give text "
            "on standard input"
        )
    return text


def _check(wanted: GenerateSection) -> None:
    if wanted.model not in MODELS:
        raise StageError(
            f"generate.model={wanted.model!r}: must be one of {', '.join(MODELS)}; set "
            "generate.model"
        )
    for key, least in (("max_new_tokens", 1), ("prefill_chunk", 1), ("tensor", 1)):
        if getattr(wanted, key) < least:
            raise StageError(
                f"generate.{key}={getattr(wanted, key)}: must be at least {least}; set "
                f"generate.{key}"
            )
    if wanted.temperature < 0:
        raise StageError(
            f"generate.temperature={wanted.temperature}: must be 0, for the likeliest token each "
            "time, or above; set generate.temperature"
        )


def _shared(text: str | None) -> str:
    """Rank 0's text, on every rank."""
    given = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(given, src=0)
    return given[0]


def run(context: StageContext) -> dict[str, Any]:
    """Print the continuation, log its speed, write both to generate.json.

    Raises:
        StageError: without a prompt, on an unknown model, where the engine refuses the prompt, or
            where what reads the answer closes the pipe.
        WeightsError: where a file of the weights is missing or cannot be read.
    """
    wanted = context.config.generate
    _check(wanted)
    device, shard, group = join_ranks(torch.device(context.config.device))
    # A rank that finds nothing ends the others.
    text = _shared(read_prompt(wanted) if shard.rank == 0 else None)
    tokenizer = open_tokenizer(context.folder("fetch") / "model")
    ids = encode_prompt(tokenizer, text).tolist()
    folder, config = model_folder(wanted.model, context), model_config(wanted.model, context)
    # On a CPU float32 is faster.
    narrow = device.type == "cuda" and context.config.export.dtype != "fp32"
    dtype = torch.bfloat16 if narrow else torch.float32
    options = {"chunk": wanted.prefill_chunk, "allow_pickle": context.config.model.allow_pickle}
    try:
        check_prompts(config, [ids], wanted.max_new_tokens, wanted.strict, "generate.strict")
        engine = load_engine(folder, config, dtype, device, shard, group, context.log, **options)
        ends = end_tokens(tokenizer, config, folder)
        record = _answer(engine, tokenizer, text, ids, ends, wanted, speaks=shard.rank == 0)
    except ServingError as error:
        raise StageError(str(error)) from error
    except BrokenPipeError as error:
        discard_stdout()
        raise StageError("standard output was closed before the answer ended") from error
    if shard.rank == 0:
        (context.out / "generate.json").write_text(json.dumps(record, indent=2) + "\n")
        speed = record["tokens_per_second"]
        context.log.info(
            "%d prompt tokens, first token after %.2f s (%.0f tokens/s)%s; cache %.1f MB",
            len(ids),
            record["seconds_to_first_token"],
            record["prompt_tokens_per_second"],
            f", then {speed:.1f} tokens/s" if speed else "",
            record["cache_bytes"] / 1e6,
        )
    return {key: record[key] for key in ("prompt_tokens", "new_tokens", "tokens_per_second")}


def _answer(
    engine: Engine,
    tokenizer: Any,
    text: str,
    ids: list[int],
    ends: frozenset[int],
    wanted: GenerateSection,
    speaks: bool,
) -> dict[str, Any]:
    """Stream the continuation; the record of it."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    tokens, times = [], []
    started = time.perf_counter()
    console = Console(stderr=True)
    show = speaks and console.is_terminal
    with Progress(console=console, transient=True, disable=not show) as bar:
        task = bar.add_task("prompt", total=len(ids))
        steps = engine.generate(
            [ids],
            wanted.max_new_tokens,
            temperature=wanted.temperature,
            seed=wanted.seed,
            stop_ids=sorted(ends),
            checked=True,
            told=lambda count: bar.advance(task, count),
        )
        first = next(steps)
    while first is not None:
        times.append(time.perf_counter())
        tokens.append(first[0])
        if speaks:
            streamer.put(torch.tensor(first))
        first = next(steps, None)
    if speaks:
        streamer.end()
    decoded = len(times) - 1
    return {
        "model": wanted.model,
        "prompt": text,
        "prompt_tokens": len(ids),
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "new_tokens": len(tokens),
        "seconds_to_first_token": times[0] - started,
        "prompt_tokens_per_second": len(ids) / (times[0] - started),
        # The first token is the prompt's work: decoding is what comes after it.
        "tokens_per_second": decoded / (times[-1] - times[0]) if decoded else None,
        "cache_bytes": engine.cache.allocated_bytes(),
        "processes": engine.decoder.shard.size,
    }

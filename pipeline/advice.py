"""Warnings about legal configurations that are probably not intended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.overrides import replaced
from pipeline.schema import Config
from pipeline.schema_of_eval import EvalSection

# Men et al. 2024 (arXiv 2405.14591), table 2: the least RoPE base at which, with heads of 128
# dimensions, the sum of cos(m * theta_i) is not negative at any distance m within the context.
MIN_BASES = {
    1024: 4.3e3,
    2048: 1.6e4,
    4096: 2.7e4,
    8192: 8.4e4,
    16384: 3.1e5,
    32768: 6.4e5,
    65536: 2.1e6,
    131072: 7.8e6,
    262144: 3.6e7,
    524288: 6.4e7,
    1048576: 5.1e8,
}


def min_base(context: int) -> float:
    """The lower bound of the RoPE base for a context, that of the table's next length."""
    return MIN_BASES[min((n for n in MIN_BASES if n >= context), default=max(MIN_BASES))]


def advice(config: Config, stages: Sequence[str], arguments: Sequence[str] = ()) -> Iterator[str]:
    """Lines for the log; `arguments` are the command line's."""
    yield from _inherited(config, arguments)
    if "finetune" in stages or "plan" in stages:
        yield from _rope(config)
        yield from _window(config)
    if "finetune" in stages or "evaluate" in stages:
        yield from _reach(config)


def _inherited(config: Config, arguments: Sequence[str]) -> Iterator[str]:
    keys = replaced(arguments)
    if not keys:
        return
    rope, schedule, pattern = config.rope, config.schedule, config.pattern
    yield (
        f"{', '.join(keys)} replaced on the command line; the experiment still gives "
        f"name={config.name}, rope.base={rope.base}, schedule.full={schedule.full}, "
        f"schedule.count={schedule.count}, pattern.sink_tokens={pattern.sink_tokens}, "
        f"pattern.window={pattern.window}, train and eval: set them too, or use experiment=own"
    )


def _rope(config: Config) -> Iterator[str]:
    old, new = config.model.max_positions, config.data.seq_length
    base, least = config.rope.base or config.model.rope_base, min_base(new)
    untrained = config.model.source == "random"
    if untrained or new <= old or (config.rope.base is not None and base >= least):
        return
    if config.rope.base is None:
        kept = f"rope.base=null keeps the model's own {base:g}"
        silence = f", or rope.base={base:g} to keep it"
    else:
        kept, silence = f"rope.base={base:g} is low", ""
    bound = f"the lower bound for {new:,} tokens is {least:g} (arXiv 2405.14591)"
    if base >= least:
        bound += ", but a base is usually raised with the context"
    advised = f"rope.base={least if base < least else base * new / old:.2g}"
    yield (
        f"{kept}, and rows of {new:,} tokens exceed the {old:,} that the model was trained on: "
        f"{bound}; set {advised}{silence}"
    )


def _window(config: Config) -> Iterator[str]:
    pattern, length = config.pattern, config.data.seq_length
    if config.schedule.full != "all" and pattern.sink_tokens + pattern.window >= length:
        yield (
            f"pattern.window={pattern.window}: with {pattern.sink_tokens} sink tokens it covers "
            f"rows of {length:,} tokens, so that sparse layers see all of them; choose a smaller "
            "pattern.window, such as an eighth of data.seq_length"
        )


def _reach(config: Config) -> Iterator[str]:
    section, trained = config.eval, config.data.seq_length
    lengths = {"perplexity.max_length": [section.perplexity.max_length]}
    for task in ("niah", "ruler", "babilong"):
        lengths[f"{task}.lengths"] = getattr(section, task).lengths
    short = [
        f"eval.{key} at {max(found):,}"
        for key, found in lengths.items()
        if key.split(".")[0] in section.tasks and max(found) < trained
    ]
    if short:
        yield (
            f"evaluation stops short of the {trained:,} tokens of a row: {', '.join(short)}; set "
            "them, or null to follow data.seq_length"
        )


def held_out_shortage(config: Config, data_prep: Path) -> str | None:
    """Why the finished data_prep's held-out documents do not suffice for stage=evaluate."""
    if "perplexity" not in config.eval.tasks:
        return None
    documents = json.loads((data_prep / "held_out_documents.json").read_text())
    return shortage(config.eval, [document["tokens"] for document in documents])


def shortage(section: EvalSection, lengths: Sequence[int]) -> str | None:
    """Why perplexity cannot be measured on documents of these lengths; None where it can."""
    least, longest = section.perplexity.min_length, max(lengths, default=0)
    if longest >= max(2, least):
        return None
    return (
        f"eval.perplexity.min_length={least}: the longest of {len(lengths)} held-out documents has "
        f"{longest} tokens; lower eval.perplexity.min_length (data.seq_length unless set), or hold "
        "out more or longer documents (data.held_out, data.held_out_tokens)"
    )

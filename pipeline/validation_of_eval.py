"""What is refused of the eval section before any work."""

from __future__ import annotations

import re

from pipeline.refusals import MEANINGFUL_NAME, at_least, choice, known, refuse
from pipeline.schema import Config
from pipeline.tasks import babilong, niah, ruler

TASKS = ("perplexity", "niah", "ruler", "babilong", "short")
MODELS = ("base", "final", "reduced", "base_reduced")


def check_eval(config: Config) -> None:
    """Raise ConfigError where tasks, models, lengths or parts cannot be."""
    section = config.eval
    choice(config, "export.source", ("finetune", "convert"))
    choice(config, "export.dtype", ("bf16", "fp32"))
    if section.name is not None and not MEANINGFUL_NAME.fullmatch(section.name):
        legal = "must be letters, digits, '_', '-' and '.'"
        refuse("eval.name", section.name, legal, "choose another name")
    known("eval.tasks", section.tasks, TASKS, "set eval.tasks")
    for name in section.folders:
        if not MEANINGFUL_NAME.fullmatch(name) or name in MODELS:
            legal = f"must be letters, digits, '_', '-' and '.', and none of {', '.join(MODELS)}"
            refuse("eval.folders", name, legal, "choose another name")
    models = (*MODELS, *section.folders)
    remedy = "set eval.models, or give its folder in eval.folders"
    known("eval.models", section.models, models, remedy)
    for key in (
        "tensor",
        "prefill_chunk",
        "batch_tokens",
        "perplexity.bucket",
        "perplexity.documents",
    ):
        at_least(config, f"eval.{key}", 1)
    # A layout is planned or measured whatever the evaluation would want.
    evaluates = config.stage in ("chain", "evaluate")
    if evaluates and config.parallel.gpus_per_node % section.tensor:
        legal = f"must divide parallel.gpus_per_node={config.parallel.gpus_per_node}"
        refuse("eval.tensor", section.tensor, legal, "set either")
    choice(config, "generate.model", ("base", "final"))
    known("eval.ruler.tasks", section.ruler.tasks, ruler.TASKS, "set eval.ruler.tasks")
    known("eval.babilong.tasks", section.babilong.tasks, babilong.TASKS, "set it")
    for key in ("niah", "ruler", "babilong"):
        at_least(config, f"eval.{key}.samples", 1)
        lengths = getattr(section, key).lengths
        if not lengths or min(lengths) < 1:
            legal = "must name at least one length above 0"
            refuse(f"eval.{key}.lengths", lengths, legal, "set it")
    for key in ("limit", "shots"):
        at_least(config, f"eval.short.{key}", 1 if key == "limit" else 0)
    if "short" in section.tasks and not section.short.tasks:
        legal = "must name at least one task, since eval.tasks names short"
        refuse("eval.short.tasks", [], legal, "set eval.short.tasks")
    depths, needles = section.niah.depths, section.niah.needles
    if not all(0 <= depth <= 100 for depth in depths):
        refuse("eval.niah.depths", depths, "must be percentages from 0 to 100", "set them")
    if not needles or not all(1 <= count <= len(niah.WORDS) for count in needles):
        refuse(
            "eval.niah.needles", needles, f"must be from 1 to {len(niah.WORDS)} each", "set them"
        )
    if section.shard is not None:
        part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", section.shard)
        if part is None or int(part[1]) > int(part[2]):
            legal = "must be like 1/4, the first of four parts, up to 4/4"
            refuse("eval.shard", section.shard, legal, "set eval.shard")
        if config.stage != "evaluate":
            legal = f"is a part of stage=evaluate, not of stage={config.stage}"
            refuse("eval.shard", section.shard, legal, "set stage=evaluate")
    if any(context < 1 for context in section.perplexity.contexts):
        legal = "must be numbers of tokens, each at least 1"
        refuse("eval.perplexity.contexts", section.perplexity.contexts, legal, "set them")
    if section.perplexity.min_length > section.perplexity.max_length:
        refuse(
            "eval.perplexity.min_length",
            section.perplexity.min_length,
            f"must be at most eval.perplexity.max_length={section.perplexity.max_length}",
            "set either",
        )

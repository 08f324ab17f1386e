"""Turns a composed configuration into a checked Config, or refuses it before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from kernels.pattern import Pattern
from model.config import resolve_schedule
from pipeline.manifest import StageError
from pipeline.open_values import expand_home, fill_open_values
from pipeline.planning.rates import GPUS
from pipeline.refusals import MEANINGFUL_NAME, ConfigError, no_such_key
from pipeline.refusals import at_least as _at_least
from pipeline.refusals import choice as _choice
from pipeline.refusals import refuse as _refuse
from pipeline.schema import (
    DIMENSIONS,
    RECOMPUTE,
    STAGES,
    Config,
    KernelCase,
    ServingCase,
    TrainCase,
)
from pipeline.validation_of_data import check_data
from pipeline.validation_of_eval import check_eval

BENCHMARKS = ("checkpoint", "kernels", "train_step", "serving", "data_prep")


def _check_names(config: Config) -> None:
    for key in ("name", "variant"):
        value = getattr(config, key)
        if not MEANINGFUL_NAME.fullmatch(value):
            _refuse(key, value, "must be letters, digits, '_', '-' and '.'", f"set {key}")
    _choice(config, "stage", ("chain", *STAGES))
    if config.name == "artifacts":
        _refuse("name", config.name, "is where shared results lie", "choose another name")
    _choice(config, "device", ("auto", "cpu", "cuda"))
    if config.device == "cuda" and not torch.cuda.is_available():
        _refuse("device", config.device, "this machine shows no CUDA GPU", "set device=cpu")


def _check_model(config: Config) -> None:
    model = config.model
    for key in DIMENSIONS:
        _at_least(config, f"model.{key}", 1)
    if model.num_heads % model.num_kv_heads:
        _refuse(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads={model.num_heads}",
            "set both as the model's config.json has them",
        )
    if model.head_dim % 2:
        _refuse("model.head_dim", model.head_dim, "must be even for RoPE", "set model.head_dim")
    _at_least(config, "model.norm_eps", 0, above=True)
    _at_least(config, "rope.base", 1, above=True)
    _at_least(config, "rope.sparse_base", 1, above=True)
    Pattern(**asdict(config.pattern))
    resolve_schedule(config.schedule.full, config.schedule.count, model.num_layers)


def _check_parallel(config: Config) -> None:
    parallel, model, train = config.parallel, config.model, config.train
    for key in ("nodes", "gpus_per_node", "tensor", "ulysses"):
        _at_least(config, f"parallel.{key}", 1)
    _choice(config, "parallel.zero_stage", (1, 2, 3))
    _at_least(config, "parallel.restarts", 0)
    world, ranks = parallel.nodes * parallel.gpus_per_node, parallel.tensor * parallel.ulysses
    if world % ranks:
        _refuse(
            "world size",
            world,
            f"must be a multiple of parallel.tensor * parallel.ulysses = {ranks}",
            "change parallel.nodes, parallel.gpus_per_node, parallel.tensor or parallel.ulysses",
        )
    if model.num_heads % ranks:
        _refuse(
            "parallel.tensor * parallel.ulysses",
            ranks,
            f"must divide model.num_heads={model.num_heads}",
            "lower parallel.tensor or parallel.ulysses",
        )
    if model.num_kv_heads % parallel.tensor:
        _refuse(
            "parallel.tensor",
            parallel.tensor,
            f"must divide model.num_kv_heads={model.num_kv_heads}",
            "lower parallel.tensor and raise parallel.ulysses",
        )
    if model.ffn_hidden_size % parallel.tensor:
        _refuse(
            "parallel.tensor",
            parallel.tensor,
            f"must divide model.ffn_hidden_size={model.ffn_hidden_size}",
            "lower parallel.tensor",
        )
    kv_heads = model.num_kv_heads // parallel.tensor
    if kv_heads % parallel.ulysses and parallel.ulysses % kv_heads:
        _refuse(
            "parallel.ulysses",
            parallel.ulysses,
            f"must divide, or be a multiple of, the {kv_heads} KV heads of a tensor-parallel rank, "
            "so that each rank attends with whole KV heads",
            "change parallel.ulysses or parallel.tensor",
        )
    shards = parallel.ulysses * (parallel.tensor if parallel.sequence_parallel else 1)
    if config.data.seq_length % shards:
        _refuse(
            "data.seq_length",
            config.data.seq_length,
            f"must be a multiple of the {shards} shards of a row",
            "set data.seq_length, or lower parallel.ulysses or parallel.tensor",
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        _refuse(
            "parallel.sequence_parallel",
            True,
            "needs parallel.tensor above 1",
            "set parallel.sequence_parallel=false",
        )
    replicas = world // ranks
    if train.rows_per_step % (replicas * train.micro_batch_rows):
        _refuse(
            "train.rows_per_step",
            train.rows_per_step,
            f"must be a multiple of {replicas} data-parallel groups * train.micro_batch_rows="
            f"{train.micro_batch_rows}",
            "set train.rows_per_step",
        )


def _check_train(config: Config) -> None:
    train = config.train
    for key in (
        "steps",
        "rows_per_step",
        "micro_batch_rows",
        "log_every",
        "validate_every",
        "validation_rows",
        "position_bucket",
        "save_every",
        "keep_last",
        "spike_window",
    ):
        _at_least(config, f"train.{key}", 1)
    for key in ("lr", "clip", "adam_eps", "spike_sigmas"):
        _at_least(config, f"train.{key}", 0, above=True)
    for key in ("warmup_steps", "weight_decay", "min_lr_ratio", "seed", "hang_seconds"):
        _at_least(config, f"train.{key}", 0)
    if train.min_lr_ratio > 1:
        _refuse("train.min_lr_ratio", train.min_lr_ratio, "must be at most 1", "set it")
    if not math.isfinite(train.lr):
        _refuse("train.lr", train.lr, "must be finite", "set train.lr")
    _choice(config, "train.lr_schedule", ("constant", "cosine"))
    _choice(config, "train.precision", ("bf16", "fp32"))
    _choice(config, "train.recompute", RECOMPUTE)
    for key in ("mlp_tile", "profile_step"):
        _at_least(config, f"train.{key}", 1)
    if train.recompute == "none":
        for key in ("offload_activations", "mlp_tile"):
            if getattr(train, key):
                legal = "goes with train.recompute=attention or full"
                _refuse(f"train.{key}", getattr(train, key), legal, "set train.recompute")
    _choice(config, "train.non_finite", ("stop", "skip"))
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        _refuse("train.betas", train.betas, "must be two numbers from 0 to below 1", "set them")
    _choice(config, "wandb.mode", ("auto", "online", "offline", "disabled"))


def _check_benchmark(config: Config) -> None:
    bench = config.benchmark
    _choice(config, "benchmark.name", BENCHMARKS)
    _at_least(config, "benchmark.repeats", 2)
    _at_least(config, "benchmark.launch_ms", 0, above=True)
    _at_least(config, "benchmark.budget_minutes", 0)
    _choice(config, "benchmark.precision", ("bf16", "fp16", "fp32"))
    _at_least(config, "benchmark.document_mean", 1)
    _at_least(config, "benchmark.document_sigma", 0)
    if bench.name == "train_step":
        _check_groups(bench.groups, bench.train_cases, "train_cases")
        for index, case in enumerate(bench.train_cases):
            _check_train_case(config, f"benchmark.train_cases[{index}]", case)
    if bench.name == "serving":
        from pipeline.benchmarks.serving import check

        _check_groups(bench.groups, bench.serving_cases, "serving_cases")
        if wrong := check(config):
            raise ConfigError(wrong)
    if bench.name != "kernels":
        return
    # Brings FlexAttention, which takes seconds to import.
    from pipeline.benchmarks.attention_peers import FLEX

    if config.stage == "benchmark" and config.parallel.nodes * config.parallel.gpus_per_node > 1:
        _refuse("benchmark.name", bench.name, "runs on one GPU", "set parallel=single")
    _check_groups(bench.groups, bench.cases, "cases")
    for index, case in enumerate(bench.cases):
        _check_kernel_case(f"benchmark.cases[{index}]", case)
    for index, setting in enumerate(bench.settings):
        key = f"benchmark.settings[{index}]"
        if setting.peer not in FLEX:
            _refuse(f"{key}.peer", setting.peer, f"must be one of {', '.join(FLEX)}", "set it")
        for side in ("q_block", "k_block"):
            value = getattr(setting, side)
            if value < 1:
                _refuse(f"{key}.{side}", value, "must be at least 1", "set it")


def _check_groups(
    wanted: list[str], cases: list[KernelCase | TrainCase | ServingCase], key: str
) -> None:
    groups = tuple(dict.fromkeys(case.group for case in cases))
    unknown = sorted(set(wanted) - set(groups))
    if unknown or not wanted:
        legal = f"must name some of the cases' groups {', '.join(groups) or '(no cases)'}"
        _refuse("benchmark.groups", unknown, legal, f"set benchmark.groups or benchmark.{key}")


def _check_train_case(config: Config, key: str, case: TrainCase) -> None:
    from pipeline.benchmarks.train_rows import ARMS, DOCUMENTS, arm_shape, case_config

    if not case.arms or set(case.arms) - set(ARMS):
        _refuse(f"{key}.arms", case.arms, f"must name some of {', '.join(ARMS)}", "set it")
    if case.steps is not None and case.steps < 1:
        _refuse(f"{key}.steps", case.steps, "must be at least 1", "set it")
    tokens = type(case.documents) is int and case.documents >= 1
    if not tokens and case.documents not in DOCUMENTS:
        legal = f"must be {', '.join(DOCUMENTS)} or the tokens of each document, at least 1"
        _refuse(f"{key}.documents", case.documents, legal, "set it")
    if "hybrid" in case.arms and all(arm_shape(config, "hybrid").is_full):
        legal = "leaves no layer sparse: the hybrid arm would be the full one"
        _refuse("schedule.full", config.schedule.full, legal, f"set it, or {key}.arms=[full]")
    own = case_config(config, case)
    try:
        _at_least(own, "data.seq_length", 2)
        _check_parallel(own)
        _check_train(own)
        if own.train.deterministic:
            legal = "is not what a step of the table is measured with"
            _refuse("train.deterministic", True, legal, "set train.deterministic=false")
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _check_kernel_case(key: str, case: KernelCase) -> None:
    from pipeline.benchmarks.attention_decode import DECODE
    from pipeline.benchmarks.attention_peers import DENSE, SPARSE

    for name in ("documents", "length", "heads", "kv_heads", "head_dim"):
        if getattr(case, name) < 1:
            _refuse(f"{key}.{name}", getattr(case, name), "must be at least 1", "set it")
    if case.heads % case.kv_heads:
        _refuse(f"{key}.kv_heads", case.kv_heads, f"must divide heads={case.heads}", "set both")
    pattern = Pattern.full() if case.pattern is None else Pattern(**asdict(case.pattern))
    legal = DECODE if case.group == "decode" else DENSE if pattern.is_full else SPARSE
    for backend in case.backends:
        if backend not in legal:
            kind = "full" if pattern.is_full else "sparse"
            _refuse(
                f"{key}.backends",
                backend,
                f"must be one of {', '.join(legal)} for a {kind} pattern in the group {case.group}",
                "set it",
            )
    if not case.backends:
        _refuse(f"{key}.backends", [], f"must name some of {', '.join(legal)}", "set it")


def _check_plan(config: Config) -> None:
    _choice(config, "plan.gpu", tuple(GPUS))
    for key in ("host_gib", "node_mtbf_hours", "restart_seconds", "gpu_hour_price"):
        _at_least(config, f"plan.{key}", 0, above=True)
    lengths = config.plan.document_lengths
    if lengths and min(lengths) < 1:
        _refuse("plan.document_lengths", lengths, "must be at least 1 each", "set them, or []")


def _check_cluster(config: Config) -> None:
    for key in ("evaluate_gpus", "min_node_gbps", "min_gbps"):
        _at_least(config, f"cluster.{key}", 0)
    for key in ("stage_cpus", "data_shards", "evaluate_shards", "at_once"):
        if getattr(config.cluster, key) is not None:
            _at_least(config, f"cluster.{key}", 1)


CHECKS: tuple[Callable[[Config], None], ...] = (
    _check_names,
    _check_model,
    check_data,
    _check_parallel,
    _check_train,
    _check_benchmark,
    _check_plan,
    _check_cluster,
    check_eval,
)


def parse(composed: DictConfig) -> Config:
    """The checked configuration, with device resolved.

    Raises:
        ConfigError: on an unknown key, a wrong type or an impossible combination; the message
            names the value, what is legal and the remedy.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), composed)
        config: Config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(no_such_key(error.full_key)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: has no value; set it") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key}: {reason}; --help shows its default; set it to a value of that type"
        ) from error
    for check in (expand_home, fill_open_values, *CHECKS):
        try:
            check(config)
        except ConfigError:
            raise
        except (ValueError, StageError) as error:
            raise ConfigError(str(error)) from error
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    return config

"""The DeepSpeed engine around the model: ZeRO, accumulation, clipping, AdamW, learning rate."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.config import ModelConfig
from pipeline.schema import Config, ParallelSection, TrainSection
from pipeline.training.layout import Layout

MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed's defaults, in elements: what ZeRO reduces at once, and the size up to which ZeRO 3
# keeps a parameter whole on every rank.
REDUCE_BUCKET = 500_000_000
# Of one of AdamW's groups; more where a single parameter has more.
GROUP_ELEMENTS = 1_000_000_000
ZERO3_KEPT_WHOLE = 100_000


def learning_rate(train: TrainSection, step: int) -> float:
    """Learning rate of the step that comes after `step` steps.

    Linear warm-up, then constant, or a cosine from lr to lr * min_lr_ratio at the last step.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps - 1)
    floor = train.min_lr_ratio
    return train.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def accumulation_steps(train: TrainSection, data_parallel_size: int) -> int:
    """Micro-batches of one process in one step."""
    return train.rows_per_step // (data_parallel_size * train.micro_batch_rows)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves parameters, moments and its step count as they are where it is refused.

    `refuses` is asked when the gradients, and so their norm, are known.
    """

    refuses: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure=None):
        """One update, or none."""
        return None if self.refuses() else super().step(closure)


@dataclass(frozen=True)
class Fragment:
    """What this rank's optimizer holds of a parameter: a run of its flattened shard.

    `states` are views of fp32 tensors [elements]: "master" and Adam's moments.
    """

    name: str
    start: int
    states: dict[str, torch.Tensor]

    @property
    def stop(self) -> int:
        """One beyond the last element of the shard that it holds."""
        return self.start + self.states["master"].numel()


def build_model(config: Config, shape: ModelConfig, layout: Layout) -> torch.nn.Module:
    """HybridGPT of this shape on the layout, its weights still to be filled."""
    from model.gpt import HybridGPT, transformer_config
    from model.hybrid_layer import LayerMemory
    from model.kept import KeptTensors

    parallel = config.parallel
    megatron = transformer_config(
        shape,
        torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        tensor=parallel.tensor,
        ulysses=parallel.ulysses,
        sequence_parallel=parallel.sequence_parallel,
        initialize=False,
    )
    memory = LayerMemory(
        config.train.recompute,
        config.train.mlp_tile,
        KeptTensors(config.train.offload_activations),
    )
    # Straight on the device: a rank's share of a large model has no place on the host beside.
    with layout.device:
        return HybridGPT(shape, megatron, config.data.seq_length, memory)


def build_engine(
    model: torch.nn.Module, train: TrainSection, parallel: ParallelSection, layout: Layout
):
    """A DeepSpeedEngine whose optimizer holds fp32 masters and both Adam moments.

    Weight decay applies to matrices, not to norms.
    """
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    # It warns of every optimizer but its own; that this one is right is tested.
    deepspeed_logger.setLevel(logging.ERROR)
    _sum_partial_gradients(model, layout)
    optimizer = GuardedAdamW(
        parameter_groups(model, train.weight_decay),
        lr=train.lr,
        betas=tuple(train.betas),
        eps=train.adam_eps,
        fused=True,
    )
    elements = sum(p.numel() for p in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps(train, layout.rows_size),
        "gradient_clipping": train.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": min(REDUCE_BUCKET, elements),
            "stage3_param_persistence_threshold": ZERO3_KEPT_WHOLE,
        },
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if config["gradient_accumulation_steps"] > 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if parallel.optimizer_offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # DeepSpeed's own CPU optimizer would have to be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed prints its memory use while it starts; metrics.jsonl has the run's.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=layout
        )
    _allocate_moments(engine)
    if parallel.optimizer_offload and parallel.zero_stage < 3:
        _share_copies_of_weights(engine)
    return engine


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: matrices with weight decay, norms without, few enough elements in each.

    DeepSpeed updates group after group, and copies one group's gradients to fp32 for it.
    """
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) is d] for d in (True, False))
    groups = []
    for parameters, decay in ((decayed, weight_decay), (others, 0.0)):
        elements = GROUP_ELEMENTS
        for parameter in parameters:
            if elements + parameter.numel() > GROUP_ELEMENTS:
                groups.append({"params": [], "weight_decay": decay})
                elements = 0
            groups[-1]["params"].append(parameter)
            elements += parameter.numel()
    return groups


def _sum_partial_gradients(model: torch.nn.Module, layout: Layout) -> None:
    """Sum over tensor-parallel ranks what each has of a whole parameter's gradient.

    Under sequence parallelism a norm's gradient covers the rank's positions alone; neither
    DeepSpeed nor Megatron outside its own optimizer sums it.
    """
    group = layout.get_tensor_model_parallel_group()

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)


def inner_optimizer(engine) -> GuardedAdamW:
    """The AdamW inside DeepSpeed's optimizer."""
    return engine.optimizer.optimizer


def _masters(engine) -> list[torch.Tensor]:
    """The flat fp32 tensors that AdamW updates, each on this rank alone."""
    optimizer = engine.optimizer
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise TypeError(f"{type(optimizer).__name__}: not one of DeepSpeed's ZeRO optimizers")


def _allocate_moments(engine) -> None:
    """Give AdamW its state before its first step, so that a checkpoint can fill it.

    DeepSpeed would link it to the parameters once, after the first parameter group's first step,
    when the other groups have none.
    """
    inner = inner_optimizer(engine)
    for master in _masters(engine):
        inner.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            **{name: torch.zeros_like(master) for name in MOMENTS},
        }
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _share_copies_of_weights(engine) -> None:
    """One buffer of host memory for the updated weights of all groups, on their way to the GPU.

    DeepSpeed has one a group, though it fills and copies them one after another; a copy from
    memory that is not pinned has left it when the call returns.
    """
    buffers = engine.optimizer.param_buffer_of_bit16_for_cpu_offload_groups
    largest = max(buffers, key=torch.Tensor.numel)
    buffers[:] = [largest[: buffer.numel()] for buffer in buffers]


def adam_step(engine) -> float:
    """Updates that AdamW has made."""
    return float(next(iter(inner_optimizer(engine).state.values()))["step"])


def set_adam_step(engine, step: float) -> None:
    """Tell AdamW how many updates its moments have seen."""
    for state in inner_optimizer(engine).state.values():
        state["step"].fill_(step)


def fragments(engine) -> Iterator[Fragment]:
    """What this rank's optimizer holds, parameter by parameter; nothing of some parameters."""
    optimizer, inner = engine.optimizer, inner_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 3:
            group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            master = _masters(engine)[group]
            flats = {"master": master} | {key: inner.state[master][key] for key in MOMENTS}
            start = dist.get_rank(optimizer.dp_process_group) * size
            # The last ranks' parts reach beyond a size that the group does not divide.
            size = min(size, parameter.ds_numel - start)
            states = {key: flat[at : at + size] for key, flat in flats.items()}
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            states = {"master": mapping.get_hp_fragment()}
            states |= {key: mapping.get_hp_fragment(key) for key in MOMENTS}
        else:
            continue
        if size > 0:
            yield Fragment(name, start, states)


@torch.no_grad()
def refresh_weights(engine) -> None:
    """Cast the masters to the weights that train, on all ranks."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.update_lp_params()
        return
    optimizer = engine.optimizer
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

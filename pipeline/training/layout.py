"""Processes and their groups: who shares a tensor, a sequence, a batch."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from model import megatron_on_cpu
from pipeline.manifest import StageError
from pipeline.schema import ParallelSection
from pipeline.team import LOOPBACK, loopback_store


@cache
def _own_store() -> TCPStore:
    """A store on a port that was free; it is held, lest another process take it meanwhile."""
    return loopback_store()


def _stand_alone() -> None:
    """The environment of a one-process world, for a stage that no launcher started."""
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR=LOOPBACK,
        MASTER_PORT=str(_own_store().port),
        # env:// then joins it, instead of opening another.
        TORCHELASTIC_USE_AGENT_STORE=str(True),
    )


class Layout:
    """Process groups of a run, and the `mpu` interface through which DeepSpeed asks for them.

    The context-parallel (Ulysses) group is folded into the data-parallel group that DeepSpeed
    sees: gradients are averaged over both.
    """

    def __init__(self, parallel: ParallelSection, device: torch.device) -> None:
        """Join the world and build the groups.

        Raises:
            StageError: where the world is not the one that the configuration divides.
        """
        if device.type == "cpu":
            megatron_on_cpu.install()
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        if "RANK" not in os.environ:
            _stand_alone()
        world = int(os.environ["WORLD_SIZE"])
        wanted = parallel.nodes * parallel.gpus_per_node
        if world != wanted:
            raise StageError(
                f"{world} processes were started: parallel.nodes * parallel.gpus_per_node = "
                f"{wanted}; start that many, or set them to the processes there are"
            )
        if device.type == "cuda":
            if parallel.share_gpus:
                # DeepSpeed too takes the GPU of this number.
                shared = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
                os.environ["LOCAL_RANK"] = str(shared)
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        self.device = device
        import deepspeed

        if device.type == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce; gloo needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            # NCCL refuses two ranks on one GPU.
            backend = "gloo" if device.type == "cpu" or parallel.share_gpus else "nccl"
            if backend == "gloo":
                # DeepSpeed would bind the group to the GPU, and gloo does not split such a one.
                dist.init_process_group(backend)
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
            atexit.register(deepspeed.comm.destroy_process_group)
        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor,
                context_parallel_size=parallel.ulysses,
            )
            # Nothing here draws from Megatron's generators, but sequence parallelism asks for them.
            model_parallel_cuda_manual_seed(0)
        self.state = parallel_state
        self.rank, self.size = dist.get_rank(), world
        # Words between the ranks that no collective carries, such as where each one is.
        self.store = dist.distributed_c10d._get_default_store()
        # Host memory over gloo: words between the ranks, and checkpoints in the background, which
        # must not share a group with what runs meanwhile.
        self.host_group = dist.new_group(backend="gloo")
        self.checkpoint_group = dist.new_group(backend="gloo")

    @property
    def rows_rank(self) -> int:
        """This process's place among the `rows_size` groups of processes with different rows."""
        return self.state.get_data_parallel_rank()

    @property
    def rows_size(self) -> int:
        """Number of groups of processes that hold different rows."""
        return self.state.get_data_parallel_world_size()

    @property
    def tensor_size(self) -> int:
        """Number of processes that share each tensor."""
        return self.state.get_tensor_model_parallel_world_size()

    @property
    def ulysses_rank(self) -> int:
        """Which of `ulysses_size` contiguous shards of its rows this process holds."""
        return self.state.get_context_parallel_rank()

    @property
    def ulysses_size(self) -> int:
        """Number of processes that share a row by its positions."""
        return self.state.get_context_parallel_world_size()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel and Ulysses groups, in place."""
        dist.all_reduce(value, group=self.get_data_parallel_group())
        return value

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks, through the host."""
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(found)

    def set_timeouts(self, seconds: float) -> None:
        """Have every process group that there is, of whichever library, wait for so long.

        Otherwise torch's, Megatron's and DeepSpeed's groups each have a limit of their own.
        """
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    # What DeepSpeed asks of a Megatron mpu, under the names it asks by.

    def get_model_parallel_group(self):
        return self.state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self.state.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        return self.state.get_model_parallel_group().rank()

    def get_tensor_model_parallel_group(self):
        return self.state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        return self.state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_group(self):
        return self.state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.state.get_pipeline_model_parallel_rank()

    def get_data_parallel_group(self):
        return self.state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return self.state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return self.state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

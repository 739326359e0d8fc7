"""Ranks: who we are and how tensors meet. The only place that names torch.distributed.

Which process group: the default one, which under ZeRO data parallelism is the data-parallel group.
"""

import os
import subprocess
import sys
from datetime import timedelta
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world() -> World:
    """Where this process stands; a single process when no group was started."""
    if not dist.is_initialized():
        return World(rank=0, size=1, local_rank=0)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def init_world() -> World:
    """Join the process group that the launcher described, or make a group of one.

    Reads the variables of `deepspeed` and torchrun (RANK, WORLD_SIZE, ...); under plain `srun`, one task per rank, maps
    SLURM_* to them. NCCL on CUDA, gloo elsewhere or when DS_ACCELERATOR=cpu.
    """
    if dist.is_initialized():
        return world()
    _describe_world()
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(_first_of("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    minutes = float(os.environ.get("DEEPSPEED_TIMEOUT", "10"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    else:
        dist.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    return world()


def training_device() -> torch.device:
    """This rank's device: its CUDA device, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR", "") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # srun --gpus-per-task=1 shows each rank a single device, index 0; --gpus-per-node shows all of them.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _describe_world() -> None:
    """Fill in RANK and its companions where the launcher did not."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]], capture_output=True, text=True
        )
        if nodes.returncode or not nodes.stdout.strip():
            raise RuntimeError(f"scontrol show hostnames failed: {nodes.stderr.strip()}; set MASTER_ADDR yourself")
        env.setdefault("MASTER_ADDR", nodes.stdout.split()[0])
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def _first_of(*names: str) -> str:
    return next(os.environ[name] for name in names if os.environ.get(name, "").isdigit())


def leave_world(status: int = 0) -> NoReturn:
    """End this process in an orderly way, all ranks together.

    Without it gloo aborts with -6 at exit in about half of the runs (measured: barrier, destroy, flush, _exit gave
    none in 44).
    """
    if dist.is_initialized() and status == 0:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate rows [B, ...] of every rank, in rank order, to [N, ...]. No gradient. B must be equal on all ranks."""
    if world().size == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(world().size)]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def gather_rows_keep_gradient(rows: Tensor) -> Tensor:
    """Like gather_rows, with this rank's own rows still attached to the graph.

    Every rank then computes the same global loss, and its gradient reaches the rows the rank owns: exact, without a
    collective in backward. What belongs to other ranks' rows is their own business.
    """
    here = world()
    if here.size == 1:
        return rows
    parts = list(gather_rows(rows).chunk(here.size))
    parts[here.rank] = rows
    return torch.cat(parts)


def gather_objects(item: object) -> list:
    """One small Python object of every rank, in rank order, on all ranks. Only our own processes speak here."""
    here = world()
    if here.size == 1:
        return [item]
    items: list = [None] * here.size
    dist.all_gather_object(items, item)
    return items


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over ranks, a new tensor, no gradient."""
    mean = values.detach().clone()
    if world().size > 1:
        dist.all_reduce(mean)
        mean /= world().size
    return mean


def max_over_ranks(value: float) -> float:
    """The largest of one number per rank."""
    if world().size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=_device_of_group())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def broadcast_object(item: T) -> T:
    """Rank 0's object, on every rank."""
    if world().size == 1:
        return item
    box: list = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world().size > 1:
        dist.barrier()


def _device_of_group() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] * ctx.factor, None


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same tensor forward; its gradient times factor backward.

    DeepSpeed averages parameter gradients over ranks, but the loss is one loss of the global batch, whose gradient is
    the sum of what the ranks contribute: the world size goes in here, so that the logged loss stays the true one.
    """
    return _ScaleGradient.apply(tensor, factor)  # type: ignore[return-value]

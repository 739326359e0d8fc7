"""Ranks: who we are and how tensors meet. The only place that names torch.distributed.

Which process group: the default one, which under ZeRO data parallelism is the data-parallel group.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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


def broadcast_object(item: object) -> object:
    """Rank 0's object, on every rank."""
    if world().size == 1:
        return item
    box = [item]
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

"""BatchNorm in training: whose statistics they are, when they move, and when they must not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from imitate_ds.config import TrainConfig
from imitate_ds.distributed import mean_over_ranks, world

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def batch_norm_policy(train: TrainConfig, device: torch.device) -> str:
    """Resolve `auto` and refuse what the device cannot do.

    sync: statistics over all ranks (the model must be converted). mean: each rank its own, averaged by
    average_batch_norm_statistics before they are used or saved. freeze: they stay as they are.
    """
    on_cuda = device.type == "cuda"
    if train.batch_norm == "sync" and not on_cuda:
        raise ValueError(
            "train.batch_norm = 'sync': SyncBatchNorm needs CUDA; use mean (what auto picks here) or freeze"
        )
    return ("sync" if on_cuda else "mean") if train.batch_norm == "auto" else train.batch_norm


def freeze_batch_norm(model: nn.Module) -> None:
    """Statistics and affine parameters stay as they are (with set_training_mode)."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.requires_grad_(False)


def set_training_mode(model: nn.Module, policy: str) -> None:
    """model.train(), with BatchNorm left in evaluation mode under `freeze`."""
    model.train()
    if policy == "freeze":
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()


def average_batch_norm_statistics(model: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics: DeepSpeed does not, and saves rank 0's."""
    if world().size == 1:
        return
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(mean_over_ranks(module.running_mean))
            module.running_var.copy_(mean_over_ranks(module.running_var))


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """A copy of all running statistics: a forward pass that overflows would spoil them for good."""
    return [buffer.clone() for buffer in _running_statistics(model)]


def restore_batch_norm_statistics(model: nn.Module, copies: list[Tensor]) -> None:
    for buffer, copy in zip(_running_statistics(model), copies, strict=True):
        buffer.copy_(copy)


def _running_statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            yield from module.buffers(recurse=False)


@contextmanager
def hold_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes in here leave running statistics and their counters alone; what they compute is the same."""
    held = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.training and m.track_running_stats]
    for module in held:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in held:
            module.track_running_stats = True

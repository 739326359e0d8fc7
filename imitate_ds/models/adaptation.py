"""An encoder made ready for a task: how much of it learns, at which rate, and the head on top.

Low-rank updates: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2022), eq. 3, for linear layers and, with their
kernels laid flat, convolutions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from imitate_ds.batch import LabeledBatch
from imitate_ds.finetune_config import EncoderConfig
from imitate_ds.models.freezing import set_modes
from imitate_ds.models.image_encoder import ImageEncoder

ENCODER = "encoder."  # what the names of its parameters begin with


class TaskModel(nn.Module):
    """LabeledBatch -> what the head makes of the encoder's levels.

    What does not learn has no gradient, and stays in evaluation mode whatever train() says: no statistics drift.
    """

    def __init__(self, encoder: ImageEncoder, head: nn.Module, config: EncoderConfig):
        super().__init__()
        self.encoder, self.head, self.config = encoder, head, config
        self.levels = encoder_levels(encoder)
        _prepare(encoder, self.levels, config)

    def forward(self, batch: LabeledBatch) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train != "frozen"):
            levels = self.encoder(batch.images)
        return self.head(levels, tuple(batch.images.shape[-2:]))

    def train(self, mode: bool = True) -> "TaskModel":
        super().train(mode)
        if mode:
            set_modes(self.encoder, learns=self.config.train != "frozen")
        return self

    def rate_share(self, parameter: str) -> float:
        """Of the learning rate: all of it for the head, less from level to level for the encoder."""
        if not parameter.startswith(ENCODER):
            return 1.0
        if self.config.train == "lora":
            return self.config.lr_share
        level = self.levels[parameter.removeprefix(ENCODER)]
        return self.config.lr_share * self.config.layer_decay ** (len(self.encoder.channels) - 1 - level)


def encoder_levels(encoder: ImageEncoder) -> dict[str, int]:
    """The level, from 0, that every parameter of an encoder works for; the stem works for the first."""
    names = [name for name, _ in encoder.named_parameters()]
    plain = [name.removeprefix("backbone.").removeprefix("model.").replace(".", "_") for name in names]
    modules = [info["module"].replace(".", "_") + "_" for info in encoder.backbone.feature_info.info]  # type: ignore[union-attr]
    modules = modules[-len(encoder.channels) :] if len(modules) > len(encoder.channels) else modules
    ends = [max((i for i, name in enumerate(plain) if name.startswith(module)), default=-1) for module in modules]
    return {name: min(sum(end < place for end in ends), len(ends) - 1) for place, name in enumerate(names)}


def merge_updates(encoder: nn.Module) -> None:
    """Low-rank updates become part of the weights they update; nothing else of them is left."""
    for module in list(encoder.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _prepare(encoder: ImageEncoder, levels: dict[str, int], config: EncoderConfig) -> None:
    if config.train == "last_n" and set(levels.values()) != set(range(len(encoder.channels))):
        raise ValueError(
            "encoder.train = 'last_n': the levels of this backbone cannot be told apart by the names of its parameters; take "
            "frozen, lora or full"
        )
    first = len(encoder.channels) - config.last_n
    for name, parameter in encoder.named_parameters():
        learns = config.train == "full" or (config.train == "last_n" and levels[name] >= first)
        parameter.requires_grad_(learns)
    if config.train == "lora":
        for module in encoder.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                parametrize.register_parametrization(module, "weight", _LowRank(module.weight, config.lora_rank))


class _LowRank(nn.Module):
    """weight [out, ...] -> weight + B A, B [out, r] zero at first, A [r, in]."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5)))
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)

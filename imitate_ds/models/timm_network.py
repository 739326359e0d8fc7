"""A backbone as timm.create_model gives it: how it is asked for, and its outline, which says names and shapes without values."""

from typing import Any

import timm
import torch
from torch import nn

from imitate_ds.config import ModelConfig


def timm_options(config: ModelConfig, input_size: int | None) -> dict[str, Any]:
    """What timm.create_model is to be told. input_size, in pixels, goes to backbones whose weights depend on it; None is
    their own default."""
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    pretrained = timm.get_pretrained_cfg(config.image_encoder)
    if input_size and pretrained is not None and pretrained.fixed_input_size:
        options["img_size"] = input_size
    if config.in_chans != 3:
        options["in_chans"] = config.in_chans
    return options


def outline(config: ModelConfig, input_size: int | None) -> nn.Module:
    """The whole network on the meta device: no memory, no random numbers."""
    with torch.device("meta"):
        return timm.create_model(config.image_encoder, num_classes=0, **timm_options(config, input_size))


def first_convolutions(network: nn.Module) -> list[str]:
    """The names of the modules that read the pixels."""
    names = timm.models.get_model_traits(network).get("first_conv") or ()
    return [names] if isinstance(names, str) else list(names)


def plain_name(name: str) -> str:
    """Of a weight, the same in the whole network as in the feature extractors made of it, which either wrap it
    ("model.blocks.0") or flatten its outer lists ("stages_0")."""
    return name.removeprefix("module.").removeprefix("model.").replace(".", "_")


def timm_names(backbone: nn.Module, network: nn.Module) -> dict[str, str]:
    """Name of a parameter in a feature extractor -> its name in the network."""
    known = {plain_name(name): name for name, _ in network.named_parameters()}
    names = {name: plain_name(name) for name, _ in backbone.named_parameters()}
    # extractors with hooks keep the whole network, as their "body"
    return {name: known.get(plain) or known[plain.removeprefix("body_")] for name, plain in names.items()}

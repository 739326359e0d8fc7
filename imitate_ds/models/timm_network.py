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
    """Of a weight, the same in the whole network as in the feature extractors made of it, which wrap it ("model.blocks.0";
    those with hooks "body.blocks.0") or flatten its outer lists ("stages_0", of a TResNet's own body "body_layer1")."""
    return name.removeprefix("module.").removeprefix("model.").replace(".", "_").removeprefix("body_")


def timm_names(backbone: nn.Module, network: nn.Module) -> dict[str, str]:
    """Name of a weight, or of a statistic, in a feature extractor -> its name in the network.

    Raises RuntimeError where the network has none of that name.
    """
    known = {plain_name(name): name for name in network.state_dict()}
    names = {name: known.get(plain_name(name), "") for name in backbone.state_dict()}
    if lost := [name for name, plain in names.items() if not plain]:
        raise RuntimeError(
            f"timm {timm.__version__}: {len(lost)} of {len(names)} weights of the feature extractor, such as {lost[0]}, have no "
            "name in the network that it was made of; take the version of timm in requirements.lock"
        )
    return names

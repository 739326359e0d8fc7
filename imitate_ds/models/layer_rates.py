"""Layer-wise learning rates: of the rate of the heads every layer of the encoder has less than the one above it.

As in the fine-tuning of "BEiT: BERT Pre-Training of Image Transformers" (Bao et al., 2022), and of most ViTs since. What makes a
layer is for timm to say (group_matcher): a block of a ViT, ConvNeXt or ResNet; the stem is the lowest.
"""

from typing import Any

import timm
import torch

from imitate_ds.config import ModelConfig
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.models.timm_network import outline, timm_names


def layer_rates(config: ModelConfig, input_size: int | None, decay: float) -> dict[str, float]:
    """Parameter of ImageEncoder -> share of the learning rate: decay in the last layer, its power towards the stem.

    Raises ValueError where timm does not know the layers of this backbone.
    """
    network = outline(config, input_size)
    if not hasattr(network, "group_matcher"):
        raise ValueError(f"optim.layer_decay = {decay}: timm knows no layers of {config.image_encoder}; must be 1")
    matcher = network.group_matcher(coarse=False)  # type: ignore[operator]
    layers: Any = timm.models.group_parameters(network, matcher, reverse=True)  # name -> layer, from 0
    with torch.device("meta"):
        backbone = ImageEncoder(config.model_copy(update={"weights": "none", "freeze": ()}), input_size).backbone
    plain_names = timm_names(backbone, network)
    names = {name: plain_names[name] for name, _ in backbone.named_parameters()}
    count = (
        max(layers[name] for name in names.values()) + 1
    )  # a norm after the last level may be a layer, but is not here
    return {f"backbone.{name}": decay ** (count - layers[plain]) for name, plain in names.items()}

"""The parts of an image encoder, stages or blocks, whose activations can be computed a second time instead of being kept."""

from collections.abc import Iterator
from typing import Literal

from timm.models._features import FeatureGetterNet, FeatureHookNet
from torch import nn

from imitate_ds.models.image_encoder import ImageEncoder


def encoder_parts(encoder: ImageEncoder, kind: Literal["stage", "block"]) -> list[nn.Module]:
    """In the order of the forward pass; what lies between them (a plain stem, the norms of a level) is in none.

    Raises ValueError naming train.activation_checkpointing for a backbone that has no such parts, or none that can be told.
    """
    backbone, key = encoder.backbone, f"train.activation_checkpointing = {kind!r}"
    if isinstance(backbone, FeatureHookNet):
        raise ValueError(
            f"{key}: timm watches the features of this backbone by hooks, which a second forward pass fires again; must be none"
        )
    if isinstance(backbone, FeatureGetterNet):  # asks the network for its blocks one by one
        blocks = getattr(backbone.model, "blocks", None)
        if kind == "stage" or not isinstance(blocks, nn.Sequential | nn.ModuleList):
            hint = "take block" if isinstance(blocks, nn.Sequential | nn.ModuleList) else "must be none"
            raise ValueError(f"{key}: this backbone has no stages of its own that could be told; {hint}")
        return list(blocks)
    stages = list(_stages(backbone))
    if not stages:
        raise ValueError(f"{key}: this backbone is one row of layers, without stages; must be none")
    return stages if kind == "stage" else [block for stage in stages for block in list(_blocks(stage)) or [stage]]


def _stages(backbone: nn.Module) -> Iterator[nn.Module]:
    """ResNet layer1 ..., ConvNeXt stages_0 ..., Swin layers_0 ...; EfficientNet keeps its stages in one `blocks`."""
    for name, child in backbone.named_children():
        if _holds_layers(child):
            yield from filter(_holds_layers, child.children()) if name == "blocks" else [child]


def _blocks(stage: nn.Module) -> Iterator[nn.Module]:
    """Those of a stage, and what makes its map smaller, where that is more than a layer."""
    for name, child in stage.named_children():
        if _holds_layers(child):
            yield from child.children() if name == "blocks" else [child]


def _holds_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())

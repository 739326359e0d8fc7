"""The image encoder: any timm backbone, seen through the features of several of its levels."""

import difflib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.layers.format import Format
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from imitate_ds.config import ModelConfig
from imitate_ds.models.backbone_weights import changed_shapes, few, fill_backbone, load_backbone_weights
from imitate_ds.models.freezing import freeze, set_modes
from imitate_ds.models.timm_network import first_convolutions, outline, timm_names, timm_options

Model = TypeVar("Model", bound=nn.Module)


def synchronise_batch_norm(model: Model) -> Model:
    """Every BatchNorm over all ranks (CUDA). timm's own conversion: torch's drops the activations fused into timm's."""
    return convert_sync_batchnorm(model)  # type: ignore[return-value]


class ImageEncoder(nn.Module):
    """Grey pixels -> features of S levels, from fine to coarse, S = len(model.aggregation.keep).

    Backbones that halve their maps (ResNet, ConvNeXt, Swin, ...) give their last S levels; those with one grid (ViT,
    Mixer, ...) give S blocks at even distances, the last block being the last level. `channels` and `reductions` say, of
    each level, how wide it is and how many pixels of the image a side of its cells takes.
    """

    def __init__(self, config: ModelConfig, input_size: int | None = None):
        """input_size, in pixels, is asked only by backbones whose weights depend on it; None is their own default."""
        super().__init__()
        self.backbone, self.remark = _build_backbone(
            config, input_size
        )  # remark: what its weights went through, for people
        self._network = partial(outline, config, input_size)
        self.channels: list[int] = self.backbone.feature_info.channels()  # type: ignore[operator, union-attr, assignment]
        self.reductions: list[int] = self.backbone.feature_info.reduction()  # type: ignore[operator, union-attr, assignment]
        self.mean, self.std, self.in_chans = config.image_mean, config.image_std, config.in_chans
        self.channels_come_last = getattr(self.backbone, "output_fmt", None) == Format.NHWC
        self.frozen = config.freeze
        if config.freeze:
            freeze(self.parameters_by_timm_name(), config.freeze)

    def parameters_by_timm_name(self) -> dict[str, nn.Parameter]:
        """Under the names that they have in the network of timm.create_model, as in an export's image_encoder.safetensors."""
        names = timm_names(self.backbone, self._network())
        return {names[name]: parameter for name, parameter in self.backbone.named_parameters()}

    def state_by_timm_name(self) -> dict[str, Tensor]:
        """Weights and statistics under the same names: all that the network has up to the last level."""
        names = timm_names(self.backbone, self._network())
        return {names[name]: tensor for name, tensor in self.backbone.state_dict().items()}

    def take_weights(self, state: Mapping[str, Tensor], *, given_by: str) -> None:
        """The state of another encoder of this kind, which may have been made for another input size, or other channels.

        Raises ValueError that begins with given_by.
        """
        weights = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
        self.remark = fill_backbone(self.backbone, weights, self._network, given_by=given_by)

    def train(self, mode: bool = True) -> "ImageEncoder":
        super().train(mode)
        if mode and self.frozen:
            set_modes(self.backbone, learns=True)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """uint8 [B, 1, H, W] -> S features [B, C_s, H_s, W_s] in the dtype of the weights, or of autocast.

        Normalised in here: whatever the pixels are, no NaN can reach the statistics of a BatchNorm.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images: must be grey uint8 [B, 1, H, W], found {images.dtype} {list(images.shape)}")
        dtype = next(self.backbone.parameters()).dtype
        grey = images.double() if dtype == torch.float64 else images.float()
        pixels = ((grey / 255 - self.mean) / self.std).to(dtype)
        levels = self.backbone(_channels_last(pixels.expand(-1, self.in_chans, -1, -1)))
        return [level.permute(0, 3, 1, 2) for level in levels] if self.channels_come_last else list(levels)


def _channels_last(pixels: Tensor) -> Tensor:
    """The faster layout for convolutions, on CPU and CUDA; they keep the one they are given. Not for the weights: DeepSpeed
    0.19.8 cannot broadcast those ("self.stride(-1) must be 1").

    A single channel lies in both layouts at once, and only its strides tell convolutions which one to keep.
    """
    channels, height, width = pixels.shape[1:]
    strides = (channels * height * width, 1, channels * width, channels)
    return pixels.contiguous(memory_format=torch.channels_last).as_strided(pixels.shape, strides)


def _build_backbone(config: ModelConfig, input_size: int | None) -> tuple[nn.Module, str]:
    """The feature extractor, and what was done to its weights ("" where nothing)."""
    name, levels = config.image_encoder, len(config.aggregation.keep)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them all"
        raise ValueError(f"model.image_encoder = {name!r}: not a backbone of timm {timm.__version__}{hint}")
    if config.in_chans != 3:
        _check_channels(config)
    backbone = _create(config, input_size, tuple(range(-levels, 0)))
    depth = len(backbone.feature_info.info)  # type: ignore[arg-type, union-attr]
    one_grid = len({level["reduction"] for level in backbone.feature_info.info}) == 1  # type: ignore[union-attr]
    if one_grid:
        backbone = _create(config, input_size, tuple(depth * (i + 1) // levels - 1 for i in range(levels)))
    if config.weights == "none":
        return backbone, ""
    network = partial(outline, config, input_size)
    if config.weights == "timm":
        return backbone, _interpolated_by_timm(config, network())
    return backbone, load_backbone_weights(backbone, Path(config.weights), network)


def _check_channels(config: ModelConfig) -> None:
    """Raises ValueError where timm has no convolution to sum up, or would draw it at random instead."""
    given, network = f"model.in_chans = {config.in_chans}: {config.image_encoder}", outline(config, None)
    stems = [network.get_submodule(name) for name in first_convolutions(network)]
    if not stems:
        raise ValueError(f"{given} has no first convolution that could read grey pixels alone; must be 3")
    if config.weights == "timm" and not all(isinstance(stem, nn.Conv2d) for stem in stems):
        raise ValueError(
            f"{given} reads pixels by no convolution, so its pretrained weights cannot be summed up; must be 3"
        )


def _interpolated_by_timm(config: ModelConfig, network: nn.Module) -> str:
    own = outline(config, None).state_dict()
    resized = changed_shapes(own, network.state_dict())
    return f"model.weights = 'timm': made at another input size; interpolated: {few(resized)}" if resized else ""


def _create(config: ModelConfig, input_size: int | None, out_indices: tuple[int, ...]) -> nn.Module:
    name = config.image_encoder
    try:
        options = timm_options(config, input_size)
        pretrained = config.weights == "timm"
        return timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=out_indices, **options)
    except (AssertionError, IndexError):
        wanted = len(config.aggregation.keep)
        raise ValueError(
            f"model.aggregation.keep = {list(config.aggregation.keep)}: {name} has fewer than {wanted} levels; "
            "give one share per level that it has"
        ) from None
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(f"model.drop_path = {config.drop_path}: {name} has no stochastic depth; must be 0") from None
    except (OSError, HfHubHTTPError, RuntimeError) as error:
        if config.weights != "timm":
            raise ValueError(f"model.image_encoder = {name!r}: timm gives no features of it: {error}") from error
        if "size mismatch for" in str(error):  # load_state_dict: of what timm interpolates, all is done by now
            made_at = timm.get_pretrained_cfg(name).input_size[-1]  # type: ignore[union-attr]
            raise ValueError(
                f"model.weights = 'timm': timm cannot fit those of {name} to {input_size} pixels; set data.input_size to "
                f"{made_at}, which they were made at"
            ) from error
        raise ValueError(
            f"model.weights = 'timm': no pretrained weights of {name} to be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); where the hub cannot be reached, download model.safetensors of "
            f"https://huggingface.co/timm elsewhere and set model.weights to that file, or to 'none'"
        ) from error

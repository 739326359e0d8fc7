"""The image encoder: any timm backbone, seen through the features of several of its levels."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.format import Format
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from imitate_ds.config import ModelConfig

UnpicklingError = torch.serialization.pickle.UnpicklingError  # pyright: ignore[reportPrivateImportUsage]


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
        self.backbone = _build_backbone(config, input_size)
        self.channels: list[int] = self.backbone.feature_info.channels()  # type: ignore[operator, union-attr, assignment]
        self.reductions: list[int] = self.backbone.feature_info.reduction()  # type: ignore[operator, union-attr, assignment]
        self.mean, self.std = config.image_mean, config.image_std
        self.channels_come_last = getattr(self.backbone, "output_fmt", None) == Format.NHWC

    def forward(self, images: Tensor) -> list[Tensor]:
        """uint8 [B, 1, H, W] -> S features [B, C_s, H_s, W_s] in the dtype of the weights, or of autocast.

        Normalised in here: whatever the pixels are, no NaN can reach the statistics of a BatchNorm.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images: must be grey uint8 [B, 1, H, W], found {images.dtype} {list(images.shape)}")
        pixels = (images.float() / 255 - self.mean) / self.std
        pixels = pixels.to(next(self.backbone.parameters()).dtype)
        # The faster layout for convolutions, on CPU and CUDA; they keep the one they are given. Not for the weights:
        # DeepSpeed 0.19.8 cannot broadcast those ("self.stride(-1) must be 1").
        levels = self.backbone(pixels.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))
        return [level.permute(0, 3, 1, 2) for level in levels] if self.channels_come_last else list(levels)


def _build_backbone(config: ModelConfig, input_size: int | None) -> nn.Module:
    name, levels = config.image_encoder, len(config.aggregation.keep)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them all"
        raise ValueError(f"model.image_encoder = {name!r}: not a backbone of timm {timm.__version__}{hint}")
    backbone = _create(config, input_size, tuple(range(-levels, 0)))
    depth = len(backbone.feature_info.info)  # type: ignore[arg-type, union-attr]
    one_grid = len({level["reduction"] for level in backbone.feature_info.info}) == 1  # type: ignore[union-attr]
    if one_grid:
        backbone = _create(config, input_size, tuple(depth * (i + 1) // levels - 1 for i in range(levels)))
    if config.weights not in ("none", "timm"):
        load_backbone_weights(backbone, Path(config.weights))
    return backbone


def _create(config: ModelConfig, input_size: int | None, out_indices: tuple[int, ...]) -> nn.Module:
    name = config.image_encoder
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    try:
        pretrained = timm.get_pretrained_cfg(name)
        if input_size and pretrained is not None and pretrained.fixed_input_size:
            options["img_size"] = input_size
        return timm.create_model(
            name, pretrained=config.weights == "timm", features_only=True, out_indices=out_indices, **options
        )
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
        raise ValueError(
            f"model.weights = 'timm': no pretrained weights of {name} to be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); where the hub cannot be reached, download model.safetensors of "
            f"https://huggingface.co/timm elsewhere and set model.weights to that file, or to 'none'"
        ) from error


def load_backbone_weights(backbone: nn.Module, path: Path) -> None:
    """Fill a backbone from a .safetensors file or a torch file of plain tensors; every weight of it must be there.

    Names may be those of timm's classifier, as in an export's image_encoder.safetensors, or of its feature extractor.
    What the file holds besides (a classifier, say) is left out. Raises FileNotFoundError or ValueError.
    """
    state = _read_weights(path)
    # the feature extractor either wraps the network ("model.blocks.0") or flattens its outer lists ("stages_0")
    given = {_plain(name): tensor for name, tensor in state.items()}
    wanted: dict[str, Tensor] = backbone.state_dict(keep_vars=True)
    missing = [name for name in wanted if _plain(name) not in given]
    # checkpoints older than this counter lack it; no weight of the network
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing:
        extra = sorted(given.keys() - {_plain(name) for name in wanted})
        raise ValueError(
            f"model.weights = '{path}': of another backbone: {len(missing)} of {len(wanted)} weights are missing "
            f"({_few(missing)}), {len(extra)} are unknown ({_few(extra)}); check model.image_encoder"
        )
    chosen = {name: given.get(_plain(name), tensor) for name, tensor in wanted.items()}
    shapes = {name: (list(chosen[name].shape), list(tensor.shape)) for name, tensor in wanted.items()}
    wrong = [f"{name} {found}, not {needed}" for name, (found, needed) in shapes.items() if found != needed]
    if wrong:
        raise ValueError(
            f"model.weights = '{path}': {len(wrong)} weights of another shape ({_few(wrong)}); check "
            "model.image_encoder and data.input_size"
        )
    backbone.load_state_dict(chosen)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"model.weights = '{path}': no such file; must be 'none', 'timm' or a file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)  # tensors only: nothing in it can run
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError):
        # torch's own message advises to load with weights_only=False, which would run whatever the file says
        raise ValueError(
            f"model.weights = '{path}': damaged, or more than plain tensors; give a .safetensors file, or a torch file "
            "that holds nothing but a state_dict"
        ) from None
    for nested in ("state_dict", "model"):
        content = content.get(nested, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"model.weights = '{path}': must map names to tensors, or hold such a map as 'state_dict'")
    return content


def _plain(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.").replace(".", "_")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"

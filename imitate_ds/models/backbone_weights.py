"""Weights from elsewhere for a backbone: read, brought to its input size and its channels, refused where they are of another.

Positions, tables of relative ones and kernels of patches are interpolated by timm, in the way it does it with its own weights.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from imitate_ds.models.timm_network import first_convolutions, plain_name

UnpicklingError = torch.serialization.pickle.UnpicklingError  # pyright: ignore[reportPrivateImportUsage]

# What timm's filters raise over weights of another network
UNFIT = (RuntimeError, ValueError, AssertionError, KeyError, AttributeError, IndexError)


def load_backbone_weights(backbone: nn.Module, path: Path, network: Callable[[], nn.Module]) -> str:
    """fill_backbone from a .safetensors file or a torch file of plain tensors.

    Names may be those of timm's classifier, as in an export's image_encoder.safetensors, or of its feature extractor.
    Raises FileNotFoundError or ValueError.
    """
    return fill_backbone(backbone, _read_weights(path), network, given_by=f"model.weights = '{path}'")


def fill_backbone(
    backbone: nn.Module, state: Mapping[str, Tensor], network: Callable[[], nn.Module], *, given_by: str
) -> str:
    """Give a backbone its weights, every one of which must be in `state`; what that holds besides (a classifier) is left out.

    network: the outline of what the backbone was made of; asked only where the weights do not fit as they are. Returns what was
    done to them, for people; "" where nothing. Raises ValueError that begins with given_by.
    """
    wanted: dict[str, Tensor] = backbone.state_dict(keep_vars=True)
    given, remark = {plain_name(name): tensor for name, tensor in state.items()}, ""
    if _missing(given, wanted) or _of_other_shape(given, wanted):
        given, resized = _fitted(state, network())
        remark = f"{given_by}: made at another input size; interpolated: {few(resized)}" if resized else ""
    if missing := _missing(given, wanted):
        extra = sorted(given.keys() - {plain_name(name) for name in wanted})
        raise ValueError(
            f"{given_by}: of another backbone: {len(missing)} of {len(wanted)} weights are missing "
            f"({few(missing)}), {len(extra)} are unknown ({few(extra)}); check model.image_encoder"
        )
    if wrong := _of_other_shape(given, wanted):
        raise ValueError(
            f"{given_by}: {len(wrong)} weights of another shape ({few(wrong)}), which timm cannot fit to this backbone; set "
            "data.input_size to what they were made at, or check model.image_encoder and model.in_chans"
        )
    backbone.load_state_dict({name: given.get(plain_name(name), tensor) for name, tensor in wanted.items()})
    return remark


def changed_shapes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Of the tensors in both, those whose shape is not the same, with both shapes."""
    pairs = {name: (list(before[name].shape), list(after[name].shape)) for name in after if name in before}
    return [f"{name} {old} to {new}" for name, (old, new) in pairs.items() if old != new]


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _missing(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    # checkpoints older than that counter lack it; no weight of the network
    return [name for name in wanted if plain_name(name) not in given and not name.endswith("num_batches_tracked")]


def _of_other_shape(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    shapes = {
        name: (list(given.get(plain_name(name), tensor).shape), list(tensor.shape)) for name, tensor in wanted.items()
    }
    return [f"{name} {found}, not {needed}" for name, (found, needed) in shapes.items() if found != needed]


def _fitted(state: Mapping[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under plain names, as near to those of the network as they can be brought; what was interpolated."""
    known = {plain_name(name): name for name in network.state_dict()}
    state = {known.get(plain_name(name), name): tensor for name, tensor in state.items()}
    fitted = dict(state)
    # timm hands a family's filter to its builder and keeps no reference; it lies beside the class
    if adapt := getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None):
        with suppress(*UNFIT):  # what then does not fit is refused by name and shape
            fitted = adapt(dict(state), network)
    resized = changed_shapes(state, fitted)
    for name in first_convolutions(network):
        _adapt_channels(fitted, f"{name}.weight", network)
    return {plain_name(name): tensor for name, tensor in fitted.items()}, resized


def _adapt_channels(state: dict[str, Tensor], name: str, network: nn.Module) -> None:
    """Kernels of three equal channels become their sum for one, and those of one a third of it for each of three."""
    found, needed = state.get(name), network.get_parameter(name)
    if found is None or found.ndim != 4 or needed.ndim != 4:
        return
    for here, there in ((1, 3), (3, 1)):
        if needed.shape[1] * there == found.shape[1] * here:
            with suppress(NotImplementedError):  # refused by its shape
                state[name] = timm.models.adapt_input_conv(here, found, base_chans=there)


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

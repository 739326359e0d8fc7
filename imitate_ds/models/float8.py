"""Linear layers that multiply in 8 bits, by torchao ("FP8 Formats for Deep Learning", Micikevicius et al., 2022).

Operands of each product, forward and backward, are scaled to what float8 holds, a tensor at a time, at that moment. Weights,
sums, gradients and the optimizer stay what they are without, and so do the names of the weights.
"""

import torch
from torch import nn

WIDTH = 16  # CUDA multiplies float8 matrices whose sides are multiples of it
NEWEST_WITHOUT = (8, 8)  # compute capability: Ada Lovelace and Hopper are the first that have float8


def use_float8(encoder: nn.Module, device: torch.device) -> int:
    """Swap the linear layers of an encoder, in place; how many. On a CPU their rounding is emulated, slowly, to try a run file.

    Raises ValueError naming train.fp8 where torchao or the hardware is missing, or nothing can be swapped.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError("train.fp8 = True: torchao is not installed: pip install 'imitate-ds[fp8]'") from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) <= NEWEST_WITHOUT:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"train.fp8 = True: {name} has no float8 (H100, L40S, RTX 4090 and newer do); must be false")
    swapped = sum(_fits(module) for module in encoder.modules())
    if not swapped:
        raise ValueError("train.fp8 = True: this image encoder has no linear layers for it, as a ResNet; must be false")
    config = Float8LinearConfig(pad_inner_dim=True, emulate=device.type != "cuda")
    convert_to_float8_training(encoder, module_filter_fn=lambda module, _: _fits(module), config=config)
    return swapped


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % WIDTH == 0 and module.out_features % WIDTH == 0

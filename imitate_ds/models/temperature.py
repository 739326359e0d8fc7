"""A temperature that is learned, with a floor that it never crosses."""

import torch
from torch import Tensor, nn

from imitate_ds.config import TemperatureConfig


class LearnableTemperature(nn.Module):
    """min + (init - min) * exp(p), of one parameter p that starts at 0.

    Smooth, and never below min: a clamp would stop learning once it is reached. Weight decay pulls towards init. One
    dimension, since ZeRO-3 cannot share out a parameter without any; a module of its own, so that ZeRO-3 gathers it.
    """

    def __init__(self, config: TemperatureConfig):
        super().__init__()
        self.config = config
        self.exponent = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        """Float32 [1], whatever the precision of the parameter."""
        low, start = self.config.min, self.config.init
        return low + (start - low) * self.exponent.float().exp()

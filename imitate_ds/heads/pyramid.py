"""Levels that halve from one to the next, whatever the encoder gives.

For encoders of one grid after "Exploring Plain Vision Transformer Backbones for Object Detection" (Li et al., 2022), section 3.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class Pyramid(nn.Module):
    """S levels of a ViT [B, C, h, w] become maps of 4, 2, 1, 1/2, ... times their side; levels that halve already stay.

    `reductions` says how many pixels of the image a side of the cells takes.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int]):
        super().__init__()
        grid = reductions[-1]
        self.of_one_grid = len(set(reductions)) == 1 and len(reductions) > 1
        finest = max(0, min(2, len(reductions) - 2))  # so many doublings for the first level
        steps = [finest - i for i in range(len(reductions))] if self.of_one_grid else []
        self.reductions = [int(grid * 2.0**-step) for step in steps] or list(reductions)
        self.steps = nn.ModuleList(_doubled(width, step) for width, step in zip(channels, steps, strict=False))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        if not self.of_one_grid:
            return levels
        return [step(level) for step, level in zip(self.steps, levels, strict=True)]


def _doubled(channels: int, times: int) -> nn.Module:
    if times <= 0:
        return nn.Sequential(*(nn.MaxPool2d(2, ceil_mode=True) for _ in range(-times)))
    return nn.Sequential(*(nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(times)))

"""Levels that halve from one to the next, whatever the encoder gives.

For encoders of one grid after "Exploring Plain Vision Transformer Backbones for Object Detection" (Li et al., 2022), section 3.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class Pyramid(nn.Module):
    """S levels of a ViT [B, C, h, w] become maps of 4, 2, 1, 1/2, ... times their side; levels that halve already stay.

    `reductions` says how many pixels of the image a side of the cells takes. Levels whose cells are smaller than `finest`
    are left out, but for the last; `channels` and `reductions` then say it of those that stay.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], *, finest: int = 0):
        super().__init__()
        self.of_one_grid = len(set(reductions)) == 1 and len(reductions) > 1
        most = min(2, len(reductions) - 2)  # doublings, of the first level
        steps = [most - i if self.of_one_grid else 0 for i in range(len(reductions))]
        cells = [int(side * 2.0**-step) for side, step in zip(reductions, steps, strict=True)]
        self.first = next((i for i, side in enumerate(cells) if side >= finest), len(cells) - 1)
        self.channels, self.reductions = list(channels[self.first :]), cells[self.first :]
        self.steps = nn.ModuleList(map(_doubled, self.channels, steps[self.first :]))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [step(level) for step, level in zip(self.steps, levels[self.first :], strict=True)]


def _doubled(channels: int, times: int) -> nn.Module:
    if times <= 0:
        return nn.Sequential(*(nn.MaxPool2d(2, ceil_mode=True) for _ in range(-times)))
    return nn.Sequential(*(nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(times)))

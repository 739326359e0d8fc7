"""Projection heads: features -> the joint space of images and texts."""

from typing import Literal

from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Linear, norm, ReLU, Linear, norm without scale and shift: [n, width] -> [n, out]. Rows are not unit vectors yet.

    norm "batch" is as published and wants at least two rows in training; "layer" takes any number.
    """

    def __init__(self, width: int, hidden: int, out: int, norm: Literal["batch", "layer"] = "batch"):
        super().__init__()
        batch = norm == "batch"
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden) if batch else nn.LayerNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out),
            nn.BatchNorm1d(out, affine=False) if batch else nn.LayerNorm(out, elementwise_affine=False),
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)

"""Two training views and one evaluation view of a radiograph. All of it on uint8 [1, H, W].

Every random number of a view comes from the seed it is given, none from the process: a view is the same whatever
worker makes it, and the global generators stay where they were.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as F

from imitate_ds.config import AugmentConfig

VIEWS = 2
ASPECT = (0.9, 1.1)  # width over height of a random crop; bodies come wider and narrower, but not by much
_DRAWS = 19  # numbers a view may use, always all drawn: a setting changed alone leaves the other draws as they were


class TrainViews:
    """Two augmented views of one radiograph: (image uint8 [1, H, W], seed) -> uint8 [2, 1, input_size, input_size].

    Crop, flips, rotation and perspective, autocontrast, brightness and contrast; what has amount zero costs nothing.
    """

    def __init__(self, config: AugmentConfig, input_size: int):
        self.config = config
        self.input_size = input_size
        self._grid = _pixel_centres(input_size)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        draws = torch.rand(VIEWS, _DRAWS, generator=torch.Generator().manual_seed(seed)).tolist()
        return torch.stack([self._view(image, d) for d in draws])

    def _view(self, image: Tensor, draws: list[float]) -> Tensor:
        view = self._crop(image, *draws[0:4])
        if draws[4] < self.config.horizontal_flip:
            view = F.horizontal_flip(view)
        if draws[5] < self.config.vertical_flip:
            view = F.vertical_flip(view)
        view = self._warp(view, draws[6], draws[7], draws[8:16])
        return self._shade(view, *draws[16:19])

    def _crop(self, image: Tensor, area: float, aspect: float, top: float, left: float) -> Tensor:
        """A random share of the area, resized to the input size. The arguments are draws from [0, 1)."""
        height, width = image.shape[-2:]
        low, high = self.config.crop_scale
        pixels = (low + (high - low) * area) * height * width
        ratio = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect if high > low else 1.0  # one size only: a plain crop
        h = min(round(math.sqrt(pixels / ratio)), height)
        w = min(round(math.sqrt(pixels * ratio)), width)
        corner = int(top * (height - h + 1)), int(left * (width - w + 1))
        return F.resized_crop(image, *corner, h, w, [self.input_size, self.input_size], antialias=True)

    def _warp(self, view: Tensor, angle: float, whether: float, corners: list[float]) -> Tensor:
        """Rotation, then perspective, as one homography and one bilinear look-up; outside is 0.

        Torchvision's rotate and perspective, one after the other, take six times as long and blur twice.
        """
        to_source = torch.eye(3)
        if self.config.rotation:
            to_source = _rotation(self.config.rotation * (2 * angle - 1))
        if self.config.perspective and whether < self.config.perspective_p:
            to_source = to_source @ _perspective([self.config.perspective * c for c in corners])
        elif not self.config.rotation:
            return view
        x, y, w = to_source @ self._grid
        grid = torch.stack((x, y)).div_(w).T.view(1, self.input_size, self.input_size, 2)
        warped = grid_sample(view[None].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return warped[0].round_().to(torch.uint8)

    def _shade(self, view: Tensor, auto: float, brightness: float, contrast: float) -> Tensor:
        if auto < self.config.autocontrast:
            view = F.autocontrast(view)
        if self.config.brightness:
            view = F.adjust_brightness(view, 1 + self.config.brightness * (2 * brightness - 1))
        if self.config.contrast:
            view = F.adjust_contrast(view, 1 + self.config.contrast * (2 * contrast - 1))
        return view


def eval_view(image: Tensor, input_size: int) -> Tensor:
    """The whole radiograph uint8 [1, H, W], resized to uint8 [1, input_size, input_size]. No randomness."""
    return F.resize(image, [input_size, input_size], antialias=True)


def _pixel_centres(size: int) -> Tensor:
    """Homogeneous coordinates [3, size * size] of the pixels of a square; its edges are at -1 and 1."""
    centres = (2 * torch.arange(size) + 1) / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack((x.flatten(), y.flatten(), torch.ones(size * size)))


def _rotation(degrees: float) -> Tensor:
    """Where a pixel of the square, turned counter-clockwise, comes from [3, 3]."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _perspective(inward: list[float]) -> Tensor:
    """Where a pixel comes from [3, 3] when each corner is moved inward by (x, y), 8 numbers in half side lengths."""
    rows, source = [], []
    for corner, (u, v) in enumerate(((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))):
        x, y = u * (1 - inward[2 * corner]), v * (1 - inward[2 * corner + 1])
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        source += [u, v]
    solution = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(source, dtype=torch.float64))
    return torch.cat((solution, torch.ones(1, dtype=torch.float64))).view(3, 3).float()

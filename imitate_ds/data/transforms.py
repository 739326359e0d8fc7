"""Two training views and one evaluation view of a radiograph, uint8 to uint8; whole batches, on the CPU or on a GPU.

Crop, flips, rotation and perspective of a view are one homography and one bilinear look-up in the image. Every random number
of a view comes from the seed of its sample, none from the process, and a view is the same to the bit whatever is in the
batch beside it: all arithmetic is elementwise or a sum of whole numbers, and sines come from Python, for a matrix product
or a vector sine may round by its place in the batch.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as F

from imitate_ds.config import AugmentConfig

VIEWS = 2
ASPECT = (0.9, 1.1)  # width over height of a random crop; bodies come wider and narrower, but not by much
# The columns of a view's draws, all from [0, 1). All are always drawn: a setting changed alone leaves the others' as they were.
AREA, SHAPE, TOP, LEFT, MIRROR, OVERTURN, ANGLE, TILT = range(8)
CORNERS = slice(8, 16)
STRETCH, BRIGHTNESS, CONTRAST = range(16, 19)
DRAWS = 19
SLACK = 1.25  # images up to this much larger than needed are looked up as they are: shrinking them would cost more
CHUNK_PIXELS = 2**18  # of views a CPU works on at once: two samples at 224; sixteen took 1.6 times as long each
_HORIZON = 1e-6  # the smallest denominator of a homography: what lies at or behind its horizon is far outside the image


class TrainViews:
    """Two augmented views of each radiograph: crop, flips, rotation and perspective, autocontrast, brightness, contrast.

    What has amount zero costs nothing. What lies outside the image is black; a turned view shows what is beside its crop.
    An image much larger than a view needs is shrunk first, all views of it from the same pixels. A GPU rounds a few pixels
    the other way.
    """

    def __init__(self, config: AugmentConfig, input_size: int):
        self.config = config
        self.input_size = input_size
        # the shorter side of which the smallest crop has input_size pixels; a look-up would skip pixels beyond twice that
        self.decode_side = min(round(input_size / math.sqrt(config.crop_scale[0])), 2 * input_size)
        self._tilts = config.perspective > 0 and config.perspective_p > 0
        flips = config.horizontal_flip > 0 or config.vertical_flip > 0
        self._moves = config.crop_scale != (1.0, 1.0) or flips or config.rotation > 0 or self._tilts

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """The random numbers of every view: float32 [B, V, D] in [0, 1), each sample's from its own seed."""
        generator = torch.Generator()
        return torch.stack([torch.rand(VIEWS, DRAWS, generator=generator.manual_seed(seed)) for seed in seeds])

    def __call__(self, images: Tensor, draws: Tensor, out: Tensor | None = None) -> Tensor:
        """images uint8 [B, 1, H, W] and draws [B, V, D] on the CPU -> uint8 [B, V, 1, h, w] on the device of images."""
        size, views = self.input_size, draws.shape[1]
        images = self._fitted(images)
        plans = self._plans(draws, *images.shape[-2:])
        if out is None:
            out = torch.empty(len(images), views, 1, size, size, dtype=torch.uint8, device=images.device)
        step = max(1, CHUNK_PIXELS // (views * size**2)) if images.device.type == "cpu" else len(images)
        for start in range(0, len(images), step):
            chunk = slice(start, start + step)
            pixels = self._shade(self._move(images[chunk], plans[chunk]), plans[chunk])
            out[chunk, :, 0] = pixels.to(torch.int32)  # float to uint8 in one go takes twice as long
        return out

    def _fitted(self, images: Tensor) -> Tensor:
        """The images in the size they are looked up in."""
        if not self._moves:
            return F.resize(images, [self.input_size, self.input_size], antialias=True)
        height, width = images.shape[-2:]
        scale = self.decode_side / min(height, width)
        if scale * SLACK >= 1:
            return images
        return F.resize(images, [round(height * scale), round(width * scale)], antialias=True)

    def _plans(self, draws: Tensor, height: int, width: int) -> Tensor:
        """What becomes of each view: float32 [B, 12, V], a homography by rows, then stretch (0 or 1), brightness, contrast."""
        draws = draws.double()
        config = self.config
        stretch = (draws[..., STRETCH] < config.autocontrast).double()
        brightness = 1 + config.brightness * (2 * draws[..., BRIGHTNESS] - 1)
        contrast = 1 + config.contrast * (2 * draws[..., CONTRAST] - 1)
        x, y, w = self._homography(draws, height, width)
        plans = torch.cat((x, y, w, torch.stack((stretch, brightness, contrast), dim=-1)), dim=-1)
        return plans.float().transpose(1, 2).contiguous()

    def _homography(self, draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where a pixel of a view comes from: rows [B, V, 3] for x, y and their denominator. Edges are at -1 and 1.

        A view's pixel goes back through perspective, rotation, flips and crop, in this order.
        """
        config = self.config
        x, y, w = torch.eye(3, dtype=torch.float64).expand(*draws.shape[:2], 3, 3).unbind(-2)
        if self._tilts:
            tilted = draws[..., TILT, None] < config.perspective_p
            rows = _perspective(config.perspective * draws[..., CORNERS])
            x, y, w = (torch.where(tilted, row, plain) for row, plain in zip(rows, (x, y, w), strict=True))
        if config.rotation:
            angle = config.rotation * (2 * draws[..., ANGLE, None] - 1)
            cos, sin = (_each(lambda degrees, f=f: f(math.radians(degrees)), angle) for f in (math.cos, math.sin))
            x, y = cos * x - sin * y, sin * x + cos * y
        x = torch.where(draws[..., MIRROR, None] < config.horizontal_flip, -x, x)
        y = torch.where(draws[..., OVERTURN, None] < config.vertical_flip, -y, y)
        (top, tall), (left, wide) = self._crop(draws, height, width)
        x = wide / width * x + (2 * left + wide - width) / width * w
        y = tall / height * y + (2 * top + tall - height) / height * w
        return x, y, w

    def _crop(self, draws: Tensor, height: int, width: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A random share of the image's area, in whole pixels: (top, height) and (left, width), each [B, V, 1]."""
        low, high = self.config.crop_scale
        pixels = (low + (high - low) * draws[..., AREA, None]) * height * width
        ratio = torch.ones_like(pixels)
        if high > low:  # one size only is a plain crop
            ratio = ASPECT[0] * _each(lambda draw: (ASPECT[1] / ASPECT[0]) ** draw, draws[..., SHAPE, None])
        tall = (pixels / ratio).sqrt().round().clamp(max=height)
        wide = (pixels * ratio).sqrt().round().clamp(max=width)
        top = (draws[..., TOP, None] * (height - tall + 1)).floor()
        left = (draws[..., LEFT, None] * (width - wide + 1)).floor()
        return (top, tall), (left, wide)

    def _move(self, images: Tensor, plans: Tensor) -> Tensor:
        """The views [n, V, h, w] of images [n, 1, H, W], whole numbers in float32."""
        count, _, views = plans.shape
        if not self._moves:
            return images.expand(-1, views, -1, -1).float()
        size = self.input_size
        tilted = bool(plans[:, 6:8].any())
        rows = plans[:, : 9 if tilted else 6].to(images.device, non_blocking=True)
        rows = rows.view(count, -1, 3, views, 1, 1)
        centres = (2 * torch.arange(size, device=images.device) + 1 - size) / size  # of pixels; exactly symmetric
        across, down = rows[:, :, 0] * centres + rows[:, :, 2], rows[:, :, 1] * centres[:, None]
        grid = torch.empty(*across.shape[:3], size, size, device=images.device)
        torch.add(across, down, out=grid)
        if tilted:
            grid = grid[:, :2].div_(grid[:, 2:].clamp_(min=_HORIZON))
        grid = grid.flatten(2, 3).permute(0, 2, 3, 1)  # the views of an image below one another: [n, V * h, w, 2]
        found = grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return found.view(count, views, size, size).round_()

    def _shade(self, pixels: Tensor, plans: Tensor) -> Tensor:
        """Autocontrast, brightness and contrast as torchvision has them, in place; the last is not yet rounded down."""
        stretch, brightness, contrast = (plans[:, k, :, None, None] for k in (9, 10, 11))
        if self.config.autocontrast and stretch.any():
            _autocontrast(pixels, stretch.to(pixels.device, non_blocking=True))
        if self.config.brightness:
            pixels.mul_(brightness.to(pixels.device, non_blocking=True)).clamp_(max=255).floor_()
        if self.config.contrast:
            contrast = contrast.to(pixels.device, non_blocking=True)
            rows = pixels.sum(dim=-1, keepdim=True)  # exact, as are the sums of them in float64
            mean = rows.double().sum(dim=-2, keepdim=True) / pixels[0, 0].numel()
            pixels.mul_(contrast).add_(mean.float() * (1 - contrast)).clamp_(0, 255)
        return pixels


def eval_view(image: Tensor, input_size: int) -> Tensor:
    """The whole radiograph uint8 [1, H, W], resized to uint8 [1, input_size, input_size]. No randomness."""
    return F.resize(image, [input_size, input_size], antialias=True)


def _autocontrast(pixels: Tensor, stretch: Tensor) -> None:
    """Stretch the levels of pixels [n, V, h, w] over 0..255, in place, where stretch [n, V, 1, 1] is not 0."""
    lowest, highest = pixels.amin(dim=(-2, -1), keepdim=True), pixels.amax(dim=(-2, -1), keepdim=True)
    leave = (stretch == 0) | (lowest == highest)
    scale = (highest - lowest).mul_(1 / 255).masked_fill_(leave, 1)
    pixels.sub_(lowest.masked_fill_(leave, 0)).div_(scale).floor_()


def _each(function: Callable[[float], float], values: Tensor) -> Tensor:
    return torch.tensor([function(value) for value in values.flatten().tolist()], dtype=values.dtype).view(values.shape)


def _perspective(inward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a pixel comes from when each corner is moved inward by (x, y), in half side lengths: three rows [..., 3].

    inward [..., 8] is clockwise from top left. The corners' places give the homography from the unit square in closed form
    (Heckbert, "Fundamentals of Texture Mapping and Image Warping", 1989, section 2.2.3); its adjugate leads back.
    """
    right, below = (torch.tensor(signs, dtype=inward.dtype) for signs in ((-1, 1, 1, -1), (-1, -1, 1, 1)))
    x, y = right * (1 - inward[..., 0::2]), below * (1 - inward[..., 1::2])
    x0, x1, x2, x3 = x.unbind(-1)
    y0, y1, y2, y3 = y.unbind(-1)
    dx, dy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    area = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    g = (dx * (y3 - y2) - (x3 - x2) * dy) / area
    h = ((x1 - x2) * dy - dx * (y1 - y2)) / area
    a, b, c = x1 - x0 + g * x1, x3 - x0 + h * x3, x0
    d, e, f = y1 - y0 + g * y1, y3 - y0 + h * y3, y0
    s = torch.stack((e - f * h, c * h - b, b * f - c * e), dim=-1)
    t = torch.stack((f * g - d, a - c * g, c * d - a * f), dim=-1)
    w = torch.stack((d * h - e * g, b * g - a * h, a * e - b * d), dim=-1)
    middle = w[..., 2:]
    return (2 * s - w) / middle, (2 * t - w) / middle, w / middle

"""A radiograph becomes the square the encoder sees: constant borders off, padded with black, averaged down to size."""

from typing import NamedTuple

import numpy as np
from PIL import Image

BORDER_TOLERANCE = 3  # grey levels: what JPEG makes of a flat border


class ContentBox(NamedTuple):
    """The part of an image inside its constant borders, in pixels; bottom and right are exclusive."""

    top: int
    bottom: int
    left: int
    right: int


def content_box(pixels: np.ndarray) -> ContentBox:
    """Where pixels, uint8 [H, W], are not the flat border of a print, a scan or a collimator."""
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise ValueError(f"expected grey uint8 [H, W], not {pixels.dtype} {list(pixels.shape)}")
    if pixels.size == 0 or int(pixels.max()) - int(pixels.min()) <= BORDER_TOLERANCE:
        raise ValueError("image has one pixel value")
    top, left = 0, 0
    content = pixels
    for _ in range(2):  # a print shows a white frame around the black one of the film
        start, stop = _content_rows(content)
        content, top = content[start:stop], top + start
        start, stop = _content_rows(content.T)
        content, left = content[:, start:stop], left + start
    return ContentBox(top, top + content.shape[0], left, left + content.shape[1])


def _content_rows(pixels: np.ndarray) -> tuple[int, int]:
    """First and last+1 row that differ from the border next to them."""
    low, high = pixels.min(axis=1).astype(int), pixels.max(axis=1).astype(int)

    def border_rows(corner: int, low: np.ndarray, high: np.ndarray) -> int:
        return int(np.argmax((high - corner > BORDER_TOLERANCE) | (corner - low > BORDER_TOLERANCE)))

    start = border_rows(int(pixels[0, 0]), low, high)
    stop = len(pixels) - border_rows(int(pixels[-1, -1]), low[::-1], high[::-1])
    # A strip of a tenth is no radiograph: such an image is left as it is.
    return (start, stop) if stop - start >= max(1, len(pixels) // 10) else (0, len(pixels))


def fit_square(pixels: np.ndarray, box: ContentBox, size: int, *, nearest: bool = False) -> np.ndarray:
    """The box of pixels [H, W] shrunk into the middle of a black square: uint8 [size, size], aspect kept.

    Pixels are averaged over area; nearest=True is for masks, which take the box of their radiograph.
    """
    crop = Image.fromarray(pixels[box.top : box.bottom, box.left : box.right])
    scale = size / max(crop.size)
    width, height = (max(1, round(side * scale)) for side in crop.size)
    if nearest:
        resized = crop.resize((width, height), Image.Resampling.NEAREST)
    else:
        resized = crop.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    square = np.zeros((size, size), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(resized)
    return square


def prepare_radiograph(pixels: np.ndarray, size: int) -> np.ndarray:
    """pixels uint8 [H, W], constant borders cropped, as a square uint8 [size, size]; one pixel value is a ValueError."""
    return fit_square(pixels, content_box(pixels), size)

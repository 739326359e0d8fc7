"""What radiographs of every format have in common: limits, refusals, and how their values are spread over 256 greys."""

import struct
import zlib

import numpy as np

MAX_PIXELS = 178_956_970  # Pillow's own limit, so one rule holds for every format; a large radiograph has 20 million
MAX_FILE_BYTES = 512 * 2**20  # of one image file, deflated or inflated: there is room for 16 bits a pixel
PERCENTILES = (0.1, 99.9)  # of the pixels, where nothing says which values to show; a few hot pixels do not count
# What Pillow, pydicom and numpy raise over damaged bytes. Their messages can quote the file, so none is passed on.
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, struct.error, zlib.error),
)


class RefusedImage(ValueError):
    """Our own reason why an image is no radiograph: the only message about a file that may be shown."""


def check_pixel_count(count: int) -> None:
    if count > MAX_PIXELS:
        raise RefusedImage(f"image too large: {count:,} pixels, more than {MAX_PIXELS:,}")
    if count < 1:
        raise RefusedImage("image has no pixels")


def scale_to_uint8(values: np.ndarray, content: np.ndarray | None = None) -> np.ndarray:
    """Stretch the 0.1 to 99.9 percentiles of values [H, W] over 0..255; content [H, W], bool: the pixels that count."""
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise RefusedImage("image has values that are not finite")
    return stretch(values, *_range_of(values if content is None else values[content]))


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint((values.clip(low, high) - low) * (255.0 / (high - low))).astype(np.uint8)


def _range_of(values: np.ndarray) -> tuple[float, float]:
    """The percentiles of values, or where these are one, the least and the greatest.

    A single value at an end that would leave the others less than a third of the greys is padding that nobody declared.
    """
    low, high = np.percentile(values, PERCENTILES)
    for end in (values.min(), values.max()):
        if end in (low, high) and len(others := values[values != end]) > values.size // 10:
            least, most = np.percentile(others, PERCENTILES)
            if max(least - end, end - most) > 2 * (most - least) > 0:
                low, high, values = least, most, others
    if low == high:
        low, high = values.min(), values.max()
    if low == high:
        raise RefusedImage("image has one pixel value")
    return low, high

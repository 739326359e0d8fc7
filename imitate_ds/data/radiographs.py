"""A file becomes a grey uint8 array, and an array becomes the square the encoder sees: one way, in training and inference.

No message here holds a path or a DICOM header value, for both can carry patient ids: the caller names the sample.
"""

import errno
import io
import logging
import struct
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_PIXELS = 178_956_970  # Pillow's own limit, so one rule holds for every format; a large radiograph has 20 million
BORDER_TOLERANCE = 3  # grey levels: what JPEG makes of a flat border
PERCENTILES = (0.1, 99.9)  # of the pixels, where nothing says which values to show; a few hot pixels do not count
DICOM_SUFFIXES = (".dcm", ".dicom")
# What Pillow, pydicom and numpy raise over damaged bytes. Their messages can quote the file, so none is passed on.
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, struct.error, zlib.error),
)


class _Refused(ValueError):
    """Our own reason why an image is no radiograph: the only message about a file that may be shown."""


class ContentBox(NamedTuple):
    """The part of an image inside its constant borders, in pixels; bottom and right are exclusive."""

    top: int
    bottom: int
    left: int
    right: int


def load_radiograph(path: str | Path) -> np.ndarray:
    """The radiograph in a JPEG, PNG, TIFF or DICOM file: uint8 [H, W], bone bright.

    Raises OSError (without the file's name) where it cannot be read, ValueError where it cannot be decoded.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or "the image file cannot be read") from None
    if data[128:132] == b"DICM" or Path(path).suffix.lower() in DICOM_SUFFIXES:
        return _decode_dicom(data)
    return decode_radiograph(data)


def decode_radiograph(data: bytes) -> np.ndarray:
    """Encoded JPEG, PNG or TIFF bytes as uint8 [H, W]; 16-bit and float pixels are scaled to the range they use."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "TIFF")) as image:
            _check_pixel_count(image.width * image.height)
            image.load()
            return _grey(image)
    except Image.DecompressionBombError:
        raise ValueError(f"image too large: more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, TIFF or DICOM image") from None
    except _Refused:
        raise
    except DAMAGE as error:
        raise ValueError(f"damaged image file ({type(error).__name__})") from None


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        # convert("L") would clip every value above 255 to white
        return _scale_to_uint8(np.asarray(image))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("L"))


def _check_pixel_count(count: int) -> None:
    if count > MAX_PIXELS:
        raise _Refused(f"image too large: {count:,} pixels, more than {MAX_PIXELS:,}")


def _scale_to_uint8(values: np.ndarray) -> np.ndarray:
    """Stretch the 0.1 to 99.9 percentiles of values [H, W] over 0..255."""
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise _Refused("image has values that are not finite")
    low, high = np.percentile(values, PERCENTILES)
    if low == high:
        low, high = values.min(), values.max()
    if low == high:
        raise _Refused("image has one pixel value")
    return _stretch(values, low, high)


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint((values.clip(low, high) - low) * (255.0 / (high - low))).astype(np.uint8)


def _decode_dicom(data: bytes) -> np.ndarray:
    """Modality LUT, then VOI LUT or percentiles, then MONOCHROME1 turned over, as DICOM PS3.3 C.11 orders them."""
    if find_spec("pydicom") is None:
        raise ModuleNotFoundError("reading DICOM needs pydicom: pip install 'imitate-ds[dicom]'", name="pydicom")
    import pydicom
    from pydicom.errors import BytesLengthException
    from pydicom.uid import ImplicitVRLittleEndian

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings, logged and raised, quote header values
    try:
        with warnings.catch_warnings(action="ignore"):
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            dataset.file_meta.setdefault("TransferSyntaxUID", ImplicitVRLittleEndian)
            _check_dicom(dataset)
            return _shown(_dicom_pixels(dataset), dataset)
    except _Refused:
        raise
    except (*DAMAGE, BytesLengthException) as error:
        raise ValueError(f"damaged DICOM file ({type(error).__name__})") from None


def _dicom_pixels(dataset: "Dataset") -> np.ndarray:
    from pydicom.uid import AllTransferSyntaxes

    try:
        return dataset.pixel_array
    except RuntimeError:  # pydicom: no decoder is installed, or it failed; NotImplementedError is one of these
        syntax = dataset.file_meta.TransferSyntaxUID
        name = repr(syntax.name) if syntax in AllTransferSyntaxes else "an unknown transfer syntax"
        raise _Refused(f"DICOM pixels in {name} cannot be decoded; try pip install 'imitate-ds[dicom]'") from None


def _shown(pixels: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Stored pixels [H, W] or [H, W, 3] as uint8 [H, W]."""
    from pydicom.pixels.processing import apply_modality_lut

    if pixels.ndim == 3:
        return np.asarray(Image.fromarray(pixels).convert("L"))
    grey = _windowed(apply_modality_lut(pixels, dataset), dataset)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _check_dicom(dataset: "Dataset") -> None:
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise _Refused(f"DICOM file has {frames} frames; a radiograph has one")
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        raise _Refused("DICOM file has PALETTE COLOR pixels; a radiograph is MONOCHROME1, MONOCHROME2 or RGB")
    _check_pixel_count(int(dataset.Rows) * int(dataset.Columns))


def _windowed(values: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """values [H, W] after the modality LUT, shown through the file's VOI LUT or first window: uint8 [H, W].

    Without a usable one (absent, empty, of width 0, or leaving a single grey level) the percentiles decide.
    """
    from pydicom.pixels.processing import apply_voi_lut

    if not np.isfinite(values).all():
        raise _Refused("image has values that are not finite")
    if dataset.get("VOILUTSequence") or _has_window(dataset):
        shown = apply_voi_lut(values, dataset).astype(np.float32)
        low, high = shown.min(), shown.max()
        if low < high:
            return _stretch(shown, low, high)
    return _scale_to_uint8(values)


def _has_window(dataset: "Dataset") -> bool:
    """Whether the first of the windows has a centre and a width; DICOM asks for a width of 1 at least."""
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center in (None, "") or width in (None, ""):
        return False
    return bool(np.isfinite(np.float64(np.ravel(center)[0])) and np.float64(np.ravel(width)[0]) >= 1)


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

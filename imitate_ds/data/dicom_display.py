"""What a viewer shows of a DICOM file's stored values: tables, windows, padding, in the order of DICOM PS3.3 C.11."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from imitate_ds.data.grey_levels import RefusedImage, scale_to_uint8, stretch

if TYPE_CHECKING:
    from pydicom import Dataset

LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # red, green and blue in a grey, as Pillow has it
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def shown_values(pixels: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Stored pixels [H, W] or [H, W, 3] as uint8 [H, W]; padding is black, and has no say in what is shown."""
    if pixels.ndim == 3:
        if pixels.dtype == np.uint8:
            return np.asarray(Image.fromarray(pixels).convert("L"))
        return scale_to_uint8(pixels @ LUMA)
    padding = _padding(pixels, dataset)
    grey = _windowed(_modality_values(pixels, dataset), dataset, None if padding is None else ~padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    if padding is not None:
        grey[padding] = 0
    return grey


def _padding(pixels: np.ndarray, dataset: "Dataset") -> np.ndarray | None:
    """Where stored pixels [H, W] are what the file says it was padded with: bool [H, W], or None.

    A padding value in the midst of the other values is none: it would leave holes.
    """
    first = dataset.get("PixelPaddingValue")
    last = dataset.get("PixelPaddingRangeLimit", first)
    if not (isinstance(first, int) and isinstance(last, int) and pixels.dtype.kind in "iu"):
        return None
    # Both may be written with the other sign, or with bits that pixels of BitsStored have lost.
    span = 1 << dataset.BitsStored
    least = -span // 2 if pixels.dtype.kind == "i" else 0
    low, high = sorted((end - least) % span + least for end in (first, last))
    mask = (pixels >= low) & (pixels <= high)
    others = pixels[~mask]
    if not mask.any() or not others.size or others.min() < low <= high < others.max():
        return None
    return mask


def _modality_values(pixels: np.ndarray, dataset: "Dataset") -> np.ndarray:
    if dataset.get("ModalityLUTSequence"):
        values = _looked_up(pixels, dataset.ModalityLUTSequence[0], dataset)
        if values is None:
            raise RefusedImage("DICOM file has a modality LUT that is not whole")
        return values
    if (rescale := _rescale(dataset)) is None:
        return pixels
    slope, intercept = rescale
    return pixels * slope + intercept


def _rescale(dataset: "Dataset") -> tuple[np.float64, np.float64] | None:
    """Slope and intercept; None where either is absent or empty."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return None if None in (slope, intercept) else (np.float64(slope), np.float64(intercept))


def _looked_up(values: np.ndarray, table: "Dataset", dataset: "Dataset") -> np.ndarray | None:
    """values [H, W] through a modality or VOI LUT; None where the table is not whole.

    Not by pydicom, which indexes tables of 8-bit entries with 8 bits, and knows no depth but 8 and 16 in a modality LUT.
    """
    data, (count, first, _) = table.get("LUTData"), table.get("LUTDescriptor") or (0, 0, 0)
    count = count % 2**16 or 2**16
    if isinstance(data, bytes):
        word = "<u2" if dataset.original_encoding[1] else ">u2"
        data = np.frombuffer(data, np.uint8 if len(data) in (count, count + 1) else word)
    entries = np.ravel(data if data is not None else [])
    if len(entries) < count:
        return None
    if first >= 2**15 and values.min() < 0:
        first -= 2**16  # a negative start, written without its sign
    return entries[:count].astype(np.float32)[np.clip(np.rint(values) - first, 0, count - 1).astype(np.intp)]


def _windowed(values: np.ndarray, dataset: "Dataset", content: np.ndarray | None) -> np.ndarray:
    """values [H, W] after the modality LUT, shown through the file's first VOI LUT or else its first window: uint8 [H, W].

    Without a usable one (absent, empty, of width 0, or leaving a single grey level) the percentiles decide. content
    [H, W], bool: the pixels that count; None: all.
    """
    if not np.isfinite(values).all():
        raise RefusedImage("image has values that are not finite")
    for way in (_through_voi_lut, _through_window):
        if (shown := way(values, dataset)) is not None:
            counting = shown if content is None else shown[content]
            low, high = counting.min(), counting.max()
            if low < high:
                return stretch(shown, low, high)
    return scale_to_uint8(values, content)


def _through_voi_lut(values: np.ndarray, dataset: "Dataset") -> np.ndarray | None:
    return _looked_up(values, dataset.VOILUTSequence[0], dataset) if dataset.get("VOILUTSequence") else None


def _through_window(values: np.ndarray, dataset: "Dataset") -> np.ndarray | None:
    """values [H, W] through the first window; None where it has no centre, no width, or a function nobody knows."""
    from pydicom.pixels.processing import apply_windowing

    center, width = (_first_number(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = dataset.VOILUTFunction = (dataset.get("VOILUTFunction") or "LINEAR").upper()
    if center is None or not width or function not in WINDOW_FUNCTIONS or width < (1 if function == "LINEAR" else 0):
        return None
    shown = apply_windowing(values, dataset).astype(np.float32)
    rescale = _rescale(dataset)
    return -shown if rescale and rescale[0] < 0 else shown  # pydicom turns its output over where the slope is negative


def _first_number(value) -> float | None:
    """The first number of an element that holds one or several; None where it is absent, empty or not finite."""
    try:
        number = float(np.ravel(value)[0])
    except (IndexError, TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None

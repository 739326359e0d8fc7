"""A file becomes a grey uint8 array: one way, in training and inference. square.py makes of it what the encoder sees.

No message here holds a path or a text of a DICOM header, for both can carry patient ids: the caller names the sample.
"""

import errno
import io
import logging
import os
import struct
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

MAX_PIXELS = 178_956_970  # Pillow's own limit, so one rule holds for every format; a large radiograph has 20 million
MAX_FILE_BYTES = 512 * 2**20  # of one image file, deflated or inflated: there is room for 16 bits a pixel
PERCENTILES = (0.1, 99.9)  # of the pixels, where nothing says which values to show; a few hot pixels do not count
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # red, green and blue in a grey, as Pillow has it
DICOM_SUFFIXES = (".dcm", ".dicom")
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax Deflated Explicit VR Little Endian
HEADER_BYTES = 2**16  # more than the part of a DICOM file that names its transfer syntax
# Segments of a JPEG or JPEG-LS stream: those that hold the size, those before the pixels, and the one that starts them
JPEG_SIZES = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}
JPEG_SEGMENTS = JPEG_SIZES | {*range(0xFFE0, 0xFFF0), 0xFFC4, 0xFFDB, 0xFFDD, 0xFFF8, 0xFFFE}
JPEG_SCAN = 0xFFDA
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
# What Pillow, pydicom and numpy raise over damaged bytes. Their messages can quote the file, so none is passed on.
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, struct.error, zlib.error),
)


class _Refused(ValueError):
    """Our own reason why an image is no radiograph: the only message about a file that may be shown."""


class DicomHeader(NamedTuple):
    """What a DICOM file says before its pixels; patient_id is "" where it is absent or blank, and goes into no message."""

    patient_id: str
    height: int
    width: int


def load_radiograph(path: str | Path) -> np.ndarray:
    """The radiograph in a JPEG, PNG, TIFF or DICOM file: uint8 [H, W], bone bright.

    Raises OSError (without the file's name) where it cannot be read, ValueError where it cannot be decoded or is larger
    than MAX_FILE_BYTES or MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise _Refused(f"image file too large: {size:,} bytes, more than {MAX_FILE_BYTES:,}")
            data = file.read()
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or "the image file cannot be read") from None
    if data[128:132] == b"DICM" or Path(path).suffix.lower() in DICOM_SUFFIXES:
        return _decode_dicom(data)
    return decode_radiograph(data)


def read_dicom_header(path: str | Path) -> DicomHeader:
    """Patient and size of a DICOM file, read without its pixels; raises as load_radiograph does."""
    pydicom = _pydicom()
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            start = file.read(HEADER_BYTES)
            if DEFLATED in start:
                _check_inflated_size(start + file.read(MAX_FILE_BYTES))
            file.seek(0)
            tags = ["PatientID", "Rows", "Columns"]
            dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
            return DicomHeader(str(dataset.get("PatientID") or "").strip(), int(dataset.Rows), int(dataset.Columns))
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or "the image file cannot be read") from None
    except _Refused:
        raise
    except DAMAGE as error:
        raise ValueError(f"damaged DICOM file ({type(error).__name__})") from None


def decode_radiograph(data: bytes) -> np.ndarray:
    """Encoded JPEG, PNG or TIFF bytes as uint8 [H, W], as a viewer turns them by their EXIF orientation.

    16-bit and float pixels are scaled to the range they use; what is transparent is black.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "TIFF")) as image:
            _check_pixel_count(image.width * image.height)
            image.load()
            return _grey(_upright(image))
    except Image.DecompressionBombError:
        raise ValueError(f"image too large: more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, TIFF or DICOM image") from None
    except _Refused:
        raise
    except DAMAGE as error:
        raise ValueError(f"damaged image file ({type(error).__name__})") from None


def _upright(image: Image.Image) -> Image.Image:
    """Phones and scanners store the sensor's rows and say in EXIF how to turn them; Pillow does so for TIFF alone."""
    if "exif" not in image.info or image.format == "TIFF":
        return image
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:  # the pixels are whole: a note about the camera that cannot be read does not make them a bad image
        return image


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        # convert("L") would clip every value above 255 to white
        grey = _scale_to_uint8(np.asarray(image))
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # of a TIFF; Pillow turns it over for 8 bits alone
        return 255 - grey if white_is_zero else grey
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("L"))


def _check_pixel_count(count: int) -> None:
    if count > MAX_PIXELS:
        raise _Refused(f"image too large: {count:,} pixels, more than {MAX_PIXELS:,}")
    if count < 1:
        raise _Refused("image has no pixels")


def _scale_to_uint8(values: np.ndarray, content: np.ndarray | None = None) -> np.ndarray:
    """Stretch the 0.1 to 99.9 percentiles of values [H, W] over 0..255; content [H, W], bool: the pixels that count."""
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise _Refused("image has values that are not finite")
    return _stretch(values, *_range_of(values if content is None else values[content]))


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
        raise _Refused("image has one pixel value")
    return low, high


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint((values.clip(low, high) - low) * (255.0 / (high - low))).astype(np.uint8)


def _decode_dicom(data: bytes) -> np.ndarray:
    """Modality LUT, then VOI LUT, window or percentiles, then MONOCHROME1 turned over, as DICOM PS3.3 C.11 orders them."""
    pydicom = _pydicom()
    from pydicom.errors import BytesLengthException

    try:
        with warnings.catch_warnings(action="ignore"):
            _check_inflated_size(data)
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            _check_dicom(dataset)
            return _shown(_dicom_pixels(dataset), dataset)
    except Image.DecompressionBombError:
        raise ValueError(f"image too large: more than {MAX_PIXELS:,} pixels") from None
    except _Refused:
        raise
    except (*DAMAGE, BytesLengthException) as error:
        raise ValueError(f"damaged DICOM file ({type(error).__name__})") from None


def _pydicom() -> ModuleType:
    if find_spec("pydicom") is None:
        raise ModuleNotFoundError("reading DICOM needs pydicom: pip install 'imitate-ds[dicom]'", name="pydicom")
    import pydicom

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings, logged and raised, quote header values
    return pydicom


def _check_inflated_size(data: bytes) -> None:
    """A megabyte of deflated zeros is a gigabyte, and dcmread inflates all of it."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if DEFLATED not in data:
        return
    file = io.BytesIO(data)
    read_preamble(file, force=True)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflater, waiting, size = zlib.decompressobj(-zlib.MAX_WBITS), file.read(), 0
    while waiting and size <= MAX_FILE_BYTES:
        size += len(inflater.decompress(waiting, 2**20))
        waiting = inflater.unconsumed_tail
    if size > MAX_FILE_BYTES:
        raise _Refused(f"image file too large: it inflates to more than {MAX_FILE_BYTES:,} bytes")


def _check_dicom(dataset: "Dataset") -> None:
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise _Refused("damaged DICOM file (it has no pixels, or ends before them)")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise _Refused(f"DICOM file has {frames} frames; a radiograph has one")
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        raise _Refused("DICOM file has PALETTE COLOR pixels; a radiograph is MONOCHROME1, MONOCHROME2 or RGB")
    if dataset.SamplesPerPixel not in (1, 3):
        raise _Refused("DICOM file has neither one nor three values a pixel; a radiograph is grey, or RGB")
    _check_pixel_count(int(dataset.Rows) * int(dataset.Columns))


def _dicom_pixels(dataset: "Dataset") -> np.ndarray:
    """Stored values [H, W], or RGB [H, W, 3]."""
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

    if "TransferSyntaxUID" not in dataset.file_meta:
        # old archives left it out; pydicom has seen how the rest is written
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    plugin = _codec(dataset, syntax)
    encapsulated = syntax.is_encapsulated
    # pydicom takes the lowest bits of each value, whatever HighBit says; a codec knows its own depth
    shifted = (syntax == RLELossless or not encapsulated) and _has_odd_high_bit(dataset)
    dataset.pixel_array_options(
        decoding_plugin=plugin, correct_unused_bits=not shifted, allow_excess_frames=not encapsulated
    )
    pixels = dataset.pixel_array
    if pixels.ndim != (2 if dataset.SamplesPerPixel == 1 else 3):
        raise _Refused("DICOM file has more than one frame; a radiograph has one")
    if shifted:
        pixels = pixels << (dataset.BitsAllocated - 1 - dataset.HighBit) >> (dataset.BitsAllocated - dataset.BitsStored)
    return pixels


def _has_odd_high_bit(dataset: "Dataset") -> bool:
    """Whether values do not start at the lowest bit, as 12 bits at the upper end of 16."""
    stored, high, allocated = (dataset.get(name) for name in ("BitsStored", "HighBit", "BitsAllocated"))
    return None not in (stored, high, allocated) and 0 < stored < high + 1 <= allocated


def _codec(dataset: "Dataset", syntax: "UID") -> str:
    """The plugin of pydicom that decompresses the file, after a look at the frame; "" leaves the choice to pydicom.

    Pillow where it can, for gdcm writes past its buffers where a stream is not as large or as deep as the header says.
    """
    from pydicom import uid
    from pydicom.encaps import get_frame

    plugins = _plugins(syntax, syntax)
    if syntax not in (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes, uid.JPEG2000Lossless, uid.JPEG2000):
        return ""
    stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.JPEG2000):
        with Image.open(io.BytesIO(stream), formats=("JPEG", "JPEG2000")) as image:
            _check_stream_size(image.size, dataset)
        choice = "pillow"
    else:
        depth = _jpeg_depth(stream, dataset)
        choice = "pillow" if syntax == uid.JPEGExtended12Bit and depth == 8 else "gdcm"
        if syntax == uid.JPEGExtended12Bit and depth > 8:
            # gdcm reads 12 bits by any name, and pydicom lets it do so by this one
            plugins = _plugins(uid.JPEGLossless, syntax)
            dataset.file_meta.TransferSyntaxUID = uid.JPEGLossless
    return choice if choice in plugins else ""


def _plugins(syntax: "UID", called: "UID") -> tuple[str, ...]:
    """The plugins that decompress syntax, none where nothing is compressed."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import AllTransferSyntaxes

    name = repr(called.name) if called in AllTransferSyntaxes else "an unknown transfer syntax"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder and decoder.is_available:
        return decoder.available_plugins
    by_gdcm = decoder and any("gdcm" in missing for missing in decoder.missing_dependencies)
    advice = "pip install 'imitate-ds[dicom]'" if by_gdcm else "save the file in another, such as JPEG 2000 Lossless"
    raise _Refused(f"DICOM pixels in {name} cannot be decoded; {advice}")


def _jpeg_depth(stream: bytes, dataset: "Dataset") -> int:
    """Bits of a value in a JPEG or JPEG-LS stream, from a walk over its segments up to the pixels."""
    place, depth = 2, 0
    while (marker := struct.unpack_from(">H", stream, place)[0]) != JPEG_SCAN:
        if marker in JPEG_SIZES:
            depth, height, width, samples = struct.unpack_from(">BHHB", stream, place + 4)
            _check_stream_size((width, height), dataset)
            if samples != dataset.SamplesPerPixel or not 2 <= depth <= dataset.BitsAllocated:
                raise _Refused("DICOM header and compressed pixels differ in depth")
        if marker not in JPEG_SEGMENTS or not _is_harmless(marker, stream, place):
            raise ValueError("no segment that may stand before the pixels")
        place += 2 + struct.unpack_from(">H", stream, place + 2)[0]
    if not depth:
        raise ValueError("no size before the pixels")
    return depth


def _is_harmless(marker: int, stream: bytes, place: int) -> bool:
    if marker == 0xFFEE and stream[place + 4 : place + 9] == b"Adobe":
        return stream[place + 15] <= 1  # the colours of others than RGB and YCbCr take a larger buffer
    if marker == 0xFFF8:  # parameters of JPEG-LS; of another kind it is a table, or a new size
        kind, *_, reset = struct.unpack_from(">BHHHHH", stream, place + 4)
        return kind == 1 and reset <= 255  # decoding with larger counters may never end
    return True


def _check_stream_size(size: tuple[int, int], dataset: "Dataset") -> None:
    if size != (dataset.Columns, dataset.Rows):
        raise _Refused("DICOM header and compressed pixels differ in size")


def _shown(pixels: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Stored pixels [H, W] or [H, W, 3] as uint8 [H, W]; padding is black, and has no say in what is shown."""
    if pixels.ndim == 3:
        if pixels.dtype == np.uint8:
            return np.asarray(Image.fromarray(pixels).convert("L"))
        return _scale_to_uint8(pixels @ LUMA)
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
            raise _Refused("DICOM file has a modality LUT that is not whole")
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
        raise _Refused("image has values that are not finite")
    for way in (_through_voi_lut, _through_window):
        if (shown := way(values, dataset)) is not None:
            counting = shown if content is None else shown[content]
            low, high = counting.min(), counting.max()
            if low < high:
                return _stretch(shown, low, high)
    return _scale_to_uint8(values, content)


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

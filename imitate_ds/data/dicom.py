"""DICOM files: their header, and their pixels as they are stored. What of them is shown, dicom_display.py says.

No message here holds a path or a text of a DICOM header, for both can carry patient ids: the caller names the sample.
"""

import errno
import io
import logging
import struct
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from imitate_ds.data.dicom_display import shown_values
from imitate_ds.data.grey_levels import DAMAGE, MAX_FILE_BYTES, MAX_PIXELS, RefusedImage, check_pixel_count

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

DICOM_SUFFIXES = (".dcm", ".dicom")
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax Deflated Explicit VR Little Endian
HEADER_BYTES = 2**16  # more than the part of a DICOM file that names its transfer syntax
# Segments of a JPEG or JPEG-LS stream: those that hold the size, those before the pixels, and the one that starts them
JPEG_SIZES = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}
JPEG_SEGMENTS = JPEG_SIZES | {*range(0xFFE0, 0xFFF0), 0xFFC4, 0xFFDB, 0xFFDD, 0xFFF8, 0xFFFE}
JPEG_SCAN = 0xFFDA


class DicomHeader(NamedTuple):
    """What a DICOM file says before its pixels; patient_id is "" where it is absent or blank, and goes into no message."""

    patient_id: str
    height: int
    width: int


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
    except RefusedImage:
        raise
    except DAMAGE as error:
        raise ValueError(f"damaged DICOM file ({type(error).__name__})") from None


def decode_dicom(data: bytes) -> np.ndarray:
    """Modality LUT, then VOI LUT, window or percentiles, then MONOCHROME1 turned over, as DICOM PS3.3 C.11 orders them."""
    pydicom = _pydicom()
    from pydicom.errors import BytesLengthException

    try:
        with warnings.catch_warnings(action="ignore"):
            _check_inflated_size(data)
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            _check_dicom(dataset)
            return shown_values(_stored_values(dataset), dataset)
    except Image.DecompressionBombError:
        raise ValueError(f"image too large: more than {MAX_PIXELS:,} pixels") from None
    except RefusedImage:
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
        raise RefusedImage(f"image file too large: it inflates to more than {MAX_FILE_BYTES:,} bytes")


def _check_dicom(dataset: "Dataset") -> None:
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise RefusedImage("damaged DICOM file (it has no pixels, or ends before them)")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise RefusedImage(f"DICOM file has {frames} frames; a radiograph has one")
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        raise RefusedImage("DICOM file has PALETTE COLOR pixels; a radiograph is MONOCHROME1, MONOCHROME2 or RGB")
    if dataset.SamplesPerPixel not in (1, 3):
        raise RefusedImage("DICOM file has neither one nor three values a pixel; a radiograph is grey, or RGB")
    check_pixel_count(int(dataset.Rows) * int(dataset.Columns))


def _stored_values(dataset: "Dataset") -> np.ndarray:
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
        raise RefusedImage("DICOM file has more than one frame; a radiograph has one")
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
    raise RefusedImage(f"DICOM pixels in {name} cannot be decoded; {advice}")


def _jpeg_depth(stream: bytes, dataset: "Dataset") -> int:
    """Bits of a value in a JPEG or JPEG-LS stream, from a walk over its segments up to the pixels."""
    place, depth = 2, 0
    while (marker := struct.unpack_from(">H", stream, place)[0]) != JPEG_SCAN:
        if marker in JPEG_SIZES:
            depth, height, width, samples = struct.unpack_from(">BHHB", stream, place + 4)
            _check_stream_size((width, height), dataset)
            if samples != dataset.SamplesPerPixel or not 2 <= depth <= dataset.BitsAllocated:
                raise RefusedImage("DICOM header and compressed pixels differ in depth")
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
        raise RefusedImage("DICOM header and compressed pixels differ in size")

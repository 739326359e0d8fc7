"""A file becomes a grey uint8 array: one way, in training and inference. square.py makes of it what the encoder sees.

No message here holds a path or a text of a DICOM header, for both can carry patient ids: the caller names the sample.
"""

import errno
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from imitate_ds.data.dicom import DICOM_SUFFIXES, decode_dicom
from imitate_ds.data.grey_levels import (
    DAMAGE,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    RefusedImage,
    check_pixel_count,
    scale_to_uint8,
)


def load_radiograph(path: str | Path) -> np.ndarray:
    """The radiograph in a JPEG, PNG, TIFF or DICOM file: uint8 [H, W], bone bright.

    Raises OSError (without the file's name) where it cannot be read, ValueError where it cannot be decoded or is larger
    than MAX_FILE_BYTES or MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise RefusedImage(f"image file too large: {size:,} bytes, more than {MAX_FILE_BYTES:,}")
            data = file.read()
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or "the image file cannot be read") from None
    if data[128:132] == b"DICM" or Path(path).suffix.lower() in DICOM_SUFFIXES:
        return decode_dicom(data)
    return decode_radiograph(data)


def decode_radiograph(data: bytes) -> np.ndarray:
    """Encoded JPEG, PNG or TIFF bytes as uint8 [H, W], as a viewer turns them by their EXIF orientation.

    16-bit and float pixels are scaled to the range they use; what is transparent is black.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "TIFF")) as image:
            check_pixel_count(image.width * image.height)
            image.load()
            return _grey(_upright(image))
    except Image.DecompressionBombError:
        raise ValueError(f"image too large: more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, TIFF or DICOM image") from None
    except RefusedImage:
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
        grey = scale_to_uint8(np.asarray(image))
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # of a TIFF; Pillow turns it over for 8 bits alone
        return 255 - grey if white_is_zero else grey
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("L"))

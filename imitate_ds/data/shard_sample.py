"""One radiograph of a study -> the files of one sample: picture, masks and the JSON beside them."""

import io

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imitate_ds.batch import is_missing
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.square import ContentBox, content_box, fit_square

JPEG_QUALITY = 95
MASK = ".mask.png"  # what the name of a mask's file ends in, after the key and its own name
SYNTHETIC = "synthetic phantom"  # a comment in every picture that is no real radiograph, wherever it goes alone


def encode_sample(study: Study, image: RadiographRef, size: int, *, synthetic: bool) -> tuple[dict[str, bytes], dict]:
    """The picture files of a sample by their suffix, and its JSON values.

    The radiograph is prepared as prepare_radiograph does; masks and boxes go with it into the same square. Raises
    ValueError where the radiograph or a mask is damaged or a box lies outside it, and OSError where it cannot be read.
    """
    pixels = image.read()
    _check_boxes(study.extra.get("boxes"), *pixels.shape)
    content = content_box(pixels)
    files = {"jpg": _jpeg(fit_square(pixels, content, size), synthetic)}
    for name, read in study.masks.items():
        mask = read()
        if mask.shape != pixels.shape:
            raise ValueError("mask and radiograph differ in size")
        files[f"{name}{MASK}"] = _png(fit_square(mask, content, size, nearest=True), synthetic)
    return files, _meta(study, image, content, size) | {"synthetic": synthetic}


def error_rule(error: Exception) -> str:
    """Why a radiograph could not be read, without detail: the same words for every sample with the same fault."""
    if isinstance(error, OSError):
        return (error.strerror or "cannot be read").lower()
    return str(error).partition(":")[0]


def _jpeg(pixels: np.ndarray, synthetic: bool) -> bytes:
    buffer = io.BytesIO()
    comment = SYNTHETIC.encode() if synthetic else b""
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, comment=comment)
    return buffer.getvalue()


def _png(pixels: np.ndarray, synthetic: bool) -> bytes:
    buffer = io.BytesIO()
    notes = PngInfo()
    if synthetic:
        notes.add_text("Comment", SYNTHETIC)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def _meta(study: Study, image: RadiographRef, content: ContentBox, size: int) -> dict:
    """Ids and text live here, inside the tar, and nowhere else."""
    extra = dict(study.extra)
    if isinstance(boxes := extra.get("boxes"), list):
        placed = [_placed(box, content, size) for box in boxes]
        # One in the border that is cropped has nothing left, and a detector cannot learn from it.
        extra["boxes"] = [box for box in placed if box["width"] and box["height"]]
    return {
        "findings": "" if is_missing(study.findings) else study.findings,
        "impression": "" if is_missing(study.impression) else study.impression,
        "patient_id": study.patient_id,
        "study_id": study.study_id,
        "image_id": image.image_id,
        "view_position": image.view_position,
        "split": study.split,
        "labels": study.labels,
        "extra": extra,
    }


def _check_boxes(boxes: object, height: int, width: int) -> None:
    """Less than a pixel over the edge is rounding, and is cut off; more says that a box is of another image or size."""
    for box in boxes if isinstance(boxes, list) else ():
        x, y, x_end, y_end = box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]
        if not (x > -1 and y > -1 and x_end < width + 1 and y_end < height + 1):
            raise ValueError("a box reaches out of the radiograph")
        if not (x < x_end and y < y_end):
            raise ValueError("a box has no area")


def _placed(box: dict, content: ContentBox, size: int) -> dict:
    """A box {x, y, width, height} in the radiograph's pixels, in those of the square that fit_square makes of it."""
    height, width = content.bottom - content.top, content.right - content.left
    scale = size / max(height, width)
    top, left = (size - round(height * scale)) // 2, (size - round(width * scale)) // 2
    x, x_end = (np.clip(v - content.left, 0, width) * scale + left for v in (box["x"], box["x"] + box["width"]))
    y, y_end = (np.clip(v - content.top, 0, height) * scale + top for v in (box["y"], box["y"] + box["height"]))
    place = {"x": x, "y": y, "width": x_end - x, "height": y_end - y}
    return {**box, **{name: round(float(value), 2) for name, value in place.items()}}

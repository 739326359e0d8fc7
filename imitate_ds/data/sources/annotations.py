"""What sources with labels, masks and boxes share: a study of one image, numbers out of tables, masks out of shapes."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np

from imitate_ds.data.dicom import read_dicom_header
from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.sources.base import OUTSIDE, RadiographRef, Study, reader_files
from imitate_ds.data.sources.rows import Row, check_patient_splits, described, parse_split, read_rows

Place = tuple[float, float, float, float]  # x, y, width, height of a box


class Box(TypedDict):
    """In pixels of the radiograph."""

    label: str
    x: float
    y: float
    width: float
    height: float


def image_study(
    image: RadiographRef,
    *,
    patient: str,
    split: str,
    labels: Mapping[str, int] | None = None,
    boxes: Sequence[Box] | None = None,
    masks: Mapping[str, Callable[[], np.ndarray]] | None = None,
) -> Study:
    """A study of one radiograph without a report. boxes: None where nobody looked for them, [] where nothing was found."""
    return Study(
        patient_id=patient,
        study_id=image.image_id,
        split=split,
        findings="",
        impression="",
        radiographs=(image,),
        labels=dict(labels or {}),
        extra={} if boxes is None else {"boxes": list(boxes)},
        masks=dict(masks or {}),
    )


def image_file(image_id: str, path: Path, view: str = "frontal") -> RadiographRef:
    return RadiographRef(image_id, view, partial(load_radiograph, path))


def require_an_image(images: Iterable[RadiographRef], root: Path, *, layout: str) -> None:
    """Raises FileNotFoundError unless one is there: most would be, where the folder is the right one."""
    if not any(path.is_file() for image in images for path in reader_files(image.read)):
        raise FileNotFoundError(f"{root}: none of the images that its tables name is there; expected {layout}")


def one_hot(value: str, classes: Iterable[str]) -> dict[str, int]:
    return {name: int(name == value) for name in classes}


def read_numbers(row: Row, columns: Sequence[str], path: Path) -> list[float]:
    """The cells of a row as numbers. Raises ValueError naming the file, the line and the column."""
    return [parse_number(row[column], f"{path}, line {row.line}: {column}") for column in columns]


def parse_number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} is {described(cell)}: must be a number of pixels")
    return value


def box_of_corners(label: str, x1: float, y1: float, x2: float, y2: float, *, where: str) -> Box:
    return box_of_place(label, x1, y1, x2 - x1, y2 - y1, where=where)


def box_of_place(label: str, x: float, y: float, width: float, height: float, *, where: str) -> Box:
    """Raises ValueError, which begins with where, for a box without area or name."""
    if not label:
        raise ValueError(f"{where}: a box has no label: must say what it is of")
    if width <= 0 or height <= 0:
        raise ValueError(f"{where}: a box is {width:g} wide and {height:g} high: both must be greater than 0")
    return {"label": label, "x": x, "y": y, "width": width, "height": height}


def read_mask(path: Path) -> np.ndarray:
    """A mask in an image file, as it is stored: up to 63 is outside, above 191 inside, between nobody says.

    Raises ValueError where nothing is inside though something is drawn: such files number their classes, or mean 1 by inside.
    """
    mask = load_radiograph(path)
    if 0 < mask.max() <= OUTSIDE:
        raise ValueError("mask has no grey level that counts: 255 must be inside, 0 outside, and 127 what nobody says")
    return mask


def boxes_mask(path: Path, places: Sequence[Place]) -> np.ndarray:
    """The union of boxes, of the size of a DICOM file: the pixels whose middle lies in one."""
    header = read_dicom_header(path)
    mask = np.zeros((header.height, header.width), np.uint8)
    for x, y, width, height in places:
        left, right, top, bottom = (max(0, round(edge)) for edge in (x, x + width, y, y + height))
        mask[top:bottom, left:right] = 255
    return mask


def files_by_name(folders: Iterable[Path], suffixes: Collection[str]) -> dict[str, Path]:
    """File name -> file, of all images in the folders."""
    return {
        path.name: path
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in suffixes
    }


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; save it as such") from None


def read_patient_splits(path: Path, patients: Collection[str]) -> dict[str, str]:
    """patient -> split, from a CSV with these two columns. Raises ValueError where one of patients is not in it."""
    rows = [(row["patient"].strip(), parse_split(row, "split", path)) for row in read_rows(path, ("patient", "split"))]
    check_patient_splits(rows, path)
    splits = dict(rows)
    if missing := len(set(patients) - splits.keys()):
        raise ValueError(f"{path}: no row for {missing} of {len(set(patients))} patients; add them")
    return splits

"""Object-CXR: foreign objects on chest radiographs, of the MIDL 2020 challenge by JF Healthcare."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

from imitate_ds.data.sources.annotations import (
    Box,
    box_of_corners,
    image_file,
    image_study,
    parse_number,
    require_an_image,
)
from imitate_ds.data.sources.base import Published, RadiographRef, Study
from imitate_ds.data.sources.rows import SPLIT_NAMES, Row, described, read_rows, shown_columns

LAYOUT = "train.csv, dev.csv and, if there, test.csv (image_name, annotation), and train/*.jpg, dev/*.jpg, test/*.jpg"
FOLDERS = ("train", "dev", "test")
NAMES = ("image_name", "image_path")  # headers differ between copies; a path ends in the name
RECTANGLE, ELLIPSE, POLYGON = "0", "1", "2"
OBJECT = "foreign object"


class ObjectCxrSource:
    """Images that the tables name, each a study and a patient, for nothing says whose they are; dev is val.

    Every rectangle, ellipse and polygon is a box, its hull; an image without one has none of these objects.
    """

    name = "object-cxr"
    synthetic = False
    has_reports = False
    published: ClassVar[Published] = {  # the challenge's page, jfhealthcare.github.io/object-CXR
        "train": {"radiographs": 8_000},
        "val": {"radiographs": 1_000},
        "test": {"radiographs": 1_000},
    }

    def __init__(self, root: str | Path):
        root = Path(root)
        self._images: list[tuple[RadiographRef, str, list[Box]]] = []
        for folder in FOLDERS:
            table = root / f"{folder}.csv"
            if not table.is_file() and folder != "test":  # which came a year after the others
                raise FileNotFoundError(f"{root}: no {table.name}; expected {LAYOUT}")
            for row in read_rows(table, ("annotation",)) if table.is_file() else ():
                name = PurePosixPath(row[_name_column(row, table)].strip()).name
                image = image_file(f"{folder}/{name}", root / folder / name)
                self._images.append((image, SPLIT_NAMES[folder], _parse_boxes(row, table)))
        require_an_image((image for image, *_ in self._images), root, layout=LAYOUT)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Study]:
        for image, split, boxes in self._images:
            labels = {OBJECT: int(bool(boxes))}
            yield image_study(image, patient=image.image_id, split=split, labels=labels, boxes=boxes)


def _name_column(row: Row, table: Path) -> str:
    if column := next((name for name in NAMES if name in row), None):
        return column
    raise ValueError(f"{table}: no column 'image_name'; {shown_columns(list(row))}")


def _parse_boxes(row: Row, table: Path) -> list[Box]:
    where = f"{table}, line {row.line}: annotation"
    return [_parse_shape(shape.split(), where) for shape in row["annotation"].split(";") if shape.strip()]


def _parse_shape(cells: list[str], where: str) -> Box:
    """The hull of a shape: its kind, then x and y of two corners, or of every point of a polygon."""
    kind, numbers = cells[0], [parse_number(cell, where) for cell in cells[1:]]
    corners = kind in (RECTANGLE, ELLIPSE) and len(numbers) == 4
    if not corners and not (kind == POLYGON and len(numbers) >= 6 and len(numbers) % 2 == 0):
        rule = "must be 0 or 1 and x1 y1 x2 y2, or 2 and x y of three points or more, with ; between shapes"
        raise ValueError(f"{where} has a shape of kind {described(kind)} with {len(numbers)} numbers: {rule}")
    x, y = numbers[::2], numbers[1::2]
    return box_of_corners(OBJECT, min(x), min(y), max(x), max(y), where=where)

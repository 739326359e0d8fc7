"""Masks, boxes and classes of a table's rows: which columns hold them, and what a cell says."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from imitate_ds.batch import is_missing
from imitate_ds.data.sources.annotations import Box, box_of_corners, box_of_place, parse_number, read_numbers
from imitate_ds.data.sources.rows import Row, described, read_rows, require_columns

MASK_PREFIX = "mask_"
MOST_CLASSES = 100  # more are no classes but names or ids, and labels are written into the index
CORNERS = ("x1", "y1", "x2", "y2")
PLACE = ("x", "y", "width", "height")
BOX_RULE = 'must be a JSON list of {"label": TEXT, "x": .., "y": .., "width": .., "height": ..} in pixels, or blank'


def columns_of(path: Path, header: Sequence[str], wanted: str | Sequence[str]) -> dict[str, str]:
    """Column -> name, of a list of columns or of all that begin with a prefix, which is no part of the name."""
    if isinstance(wanted, str):
        return {name: name.removeprefix(wanted) for name in header if wanted and name.startswith(wanted)}
    require_columns(path, header, wanted)
    return {name: name for name in wanted}


def mask_columns(path: Path, header: Sequence[str], wanted: str | Sequence[str]) -> dict[str, str]:
    """columns_of; ValueError for a name that cannot be part of a file's name."""
    columns = columns_of(path, header, wanted)
    for column, name in columns.items():
        if not name or re.search(r"[./\\]", name):
            raise ValueError(f"{path}: {column} names a mask {name!r}: must be a name without . and /")
    return columns


def class_values(rows: Iterable[Row], column: str, path: Path) -> list[str]:
    """All classes that a column names, in the order of the alphabet. Raises ValueError where it names no classes."""
    values = sorted({row[column].strip() for row in rows if not is_missing(row[column])})
    if len(values) > MOST_CLASSES:
        raise ValueError(f"{path}: {column} has {len(values)} values: a column of classes has at most {MOST_CLASSES}")
    return values


def parse_boxes(row: Row, column: str, path: Path) -> list[Box] | None:
    """The boxes of a cell; None where it is blank: nobody looked for any."""
    cell, where = row[column].strip(), f"{path}, line {row.line}: {column}"
    if is_missing(cell):
        return None
    try:
        items = json.loads(cell)
        return [_parse_box(item, where) for item in items]
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{where} is {described(cell)}: {BOX_RULE}") from None


def _parse_box(item: Mapping, where: str) -> Box:
    numbers = [parse_number(str(item[name]), f"{where}, {name}") for name in PLACE]
    return box_of_place(item["label"].strip(), *numbers, where=where)


def read_box_file(path: Path, images: Iterable[str]) -> dict[str, list[Box]]:
    """Image -> its boxes, from a CSV of file, class and two corners. A row without class says that an image has no boxes.

    Raises ValueError where it names none of the images.
    """
    boxes: dict[str, list[Box]] = defaultdict(list)
    for row in read_rows(path, ("file", "class", *CORNERS)):
        found = boxes[row["file"].strip()]
        if any(not is_missing(row[name]) for name in ("class", *CORNERS)):
            where = f"{path}, line {row.line}"
            found.append(box_of_corners(row["class"].strip(), *read_numbers(row, CORNERS, path), where=where))
    if boxes.keys().isdisjoint(images):
        raise ValueError(f"{path}: its column file names none of the images of the table; both must name them alike")
    return boxes

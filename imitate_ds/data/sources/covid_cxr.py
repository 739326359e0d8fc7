"""COVID-19 image data collection (Cohen et al., 2020) as one folder: images, lung masks, structures, and two kinds of boxes."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.sources.annotations import Box, image_file, image_study, read_mask, require_an_image
from imitate_ds.data.sources.base import Study
from imitate_ds.data.sources.rows import Row, check_patients, parse_view, read_rows, split_by_hash
from imitate_ds.data.sources.table_annotations import MOST_CLASSES, read_box_file

TABLE = "metadata.csv"
BOX_FILES = {"lungs": "lung_boxes.csv", "pathology": "pathology_boxes.csv"}
LAYOUT = f"{TABLE}, images/, lung_masks/, seg/, {' and '.join(BOX_FILES.values())}"
NOT_YET = "todo"  # a finding that nobody wrote down yet
# Bits of the files in seg/: structures overlap, so each is a mask of its own
STRUCTURES = {
    "right_lung": 1,
    "left_lung": 2,
    "heart_and_mediastinum": 4,
    "ground_glass": 8,
    "consolidation": 16,
    "airways": 32,
    "effusion": 64,
    "pneumothorax": 128,
}


class CovidCxrSource:
    """Images of root/metadata.csv, each a study; 60 % of the patients are train, 20 % val, 20 % test, by a hash.

    Labels are the findings, of which an image may have several. Masks: lungs, where lung_mask is given (127 is what nobody
    says), and eight structures where seg is. boxes: "lungs", of the images in lung_boxes.csv, or "pathology", of the images
    that have seg, which were searched for it whether they have any or not; without it there are none.
    """

    name = "covid-cxr"
    synthetic = False
    has_reports = False

    def __init__(self, root: str | Path, *, boxes: str | None = None):
        self._root = Path(root)
        table = self._root / TABLE
        if not table.is_file():
            raise FileNotFoundError(f"{root}: no {TABLE}; expected {LAYOUT}")
        self._rows = list(read_rows(table, ("file", "patientid", "view", "finding", "lung_mask", "seg")))
        check_patients((row["patientid"] for row in self._rows), "patientid", table)
        self._findings = sorted({finding for row in self._rows for finding in _findings(row)})
        if len(self._findings) > MOST_CLASSES:
            raise ValueError(f"{table}: finding has {len(self._findings)} values: at most {MOST_CLASSES} can be labels")
        self._boxes = self._read_boxes(boxes)
        images = (image_file(row["file"], self._root / row["file"]) for row in self._rows)
        require_an_image(images, self._root, layout=LAYOUT)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Study]:
        for row in self._rows:
            found = _findings(row)
            yield image_study(
                image_file(row["file"], self._root / row["file"], parse_view(row["view"])),
                patient=row["patientid"],
                split=split_by_hash(row["patientid"], train=60, val=20),
                labels={name: int(name in found) for name in self._findings} if found else {},
                boxes=self._boxes.get(row["file"]),
                masks=self._masks(row),
            )

    def _masks(self, row: Row) -> dict[str, Callable[[], np.ndarray]]:
        masks: dict[str, Callable[[], np.ndarray]] = {}
        if row["lung_mask"]:
            masks["lungs"] = partial(read_mask, self._root / row["lung_mask"])
        if row["seg"]:
            masks |= {name: partial(bit_mask, self._root / row["seg"], bit) for name, bit in STRUCTURES.items()}
        return masks

    def _read_boxes(self, kind: str | None) -> dict[str, list[Box]]:
        """Image -> its boxes, of the images that are annotated."""
        if kind is None:
            return {}
        if kind not in BOX_FILES:
            raise ValueError(f"boxes = {kind!r}: must be one of {', '.join(BOX_FILES)}")
        boxes = read_box_file(self._root / BOX_FILES[kind], {row["file"] for row in self._rows})
        if kind == "pathology":
            return {row["file"]: boxes.get(row["file"], []) for row in self._rows if row["seg"]}
        return boxes


def bit_mask(path: Path, bit: int) -> np.ndarray:
    """255 where a bit is set in a file whose grey levels are sums of bits."""
    return np.where(load_radiograph(path) & bit, 255, 0).astype(np.uint8)


def _findings(row: Row) -> list[str]:
    """COVID-19 and ARDS, of "COVID-19, ARDS"; none where the finding is not written down."""
    names = [name.strip() for name in row["finding"].split(",")]
    return [name for name in names if name not in ("", NOT_YET)]

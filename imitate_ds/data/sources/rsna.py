"""The RSNA Pneumonia Detection Challenge of 2018, as Kaggle serves it.

Shih et al., Augmenting the National Institutes of Health Chest Radiograph Dataset with Expert Annotations of Possible
Pneumonia, Radiology: Artificial Intelligence 2019.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

from imitate_ds.data.sources.annotations import (
    Box,
    box_of_place,
    boxes_mask,
    image_file,
    image_study,
    one_hot,
    read_numbers,
    read_patient_splits,
    require_an_image,
)
from imitate_ds.data.sources.base import Published, Study
from imitate_ds.data.sources.rows import Row, described, read_rows, split_by_hash

LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
FOLDER = "stage_2_train_images"
MAPPINGS = "*dataset-mappings*.json"
LAYOUT = f"{LABELS}, {FOLDER}/<patientId>.dcm and, if wanted, {CLASSES}"
PLACE = ("x", "y", "width", "height")
CLASS_NAMES = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")
PNEUMONIA = "pneumonia"


class RsnaSource:
    """Images of stage_2_train_images, each a study: label, boxes, and a mask that is the union of the boxes.

    stage_2_test_images is left out, for its labels were never published. There is no official split: 70 % of the patients
    are train, 15 % val, 15 % test, by a hash, or splits names a CSV (patient, split). A patientId is an image, and patients of
    the NIH come back under several; who they are stands in pneumonia-challenge-dataset-mappings_2018.json (rsna.org), and
    where that file is in root the patients are those. Without it a patient may be in two splits.
    """

    name = "rsna"
    synthetic = False
    has_reports = False
    published: ClassVar[Published] = {"all": {"radiographs": 26_684, "boxes": 9_555}}  # of stage 2, as on Kaggle

    def __init__(self, root: str | Path, *, splits: str | None = None):
        self._root = Path(root)
        if not (self._root / LABELS).is_file():
            raise FileNotFoundError(f"{self._root}: no {LABELS}; expected {LAYOUT}")
        self._boxes = _read_boxes(self._root / LABELS)
        self._classes = _read_classes(self._root / CLASSES)
        self._patients = _read_mappings(self._root)
        patients = [self._patient(image_id) for image_id in self._boxes]
        self._splits = read_patient_splits(Path(splits), patients) if splits else {}
        require_an_image((image_file(name, self._path(name)) for name in self._boxes), self._root, layout=LAYOUT)

    def __len__(self) -> int:
        return len(self._boxes)

    def __iter__(self) -> Iterator[Study]:
        for image_id, boxes in self._boxes.items():
            path, patient = self._path(image_id), self._patient(image_id)
            places = tuple((box["x"], box["y"], box["width"], box["height"]) for box in boxes)
            yield image_study(
                image_file(image_id, path),
                patient=patient,
                split=self._splits.get(patient) or split_by_hash(patient, train=70, val=15),
                labels={PNEUMONIA: int(bool(boxes)), **self._classes.get(image_id, {})},
                boxes=boxes,
                masks={PNEUMONIA: partial(boxes_mask, path, places)},
            )

    def _path(self, image_id: str) -> Path:
        return self._root / FOLDER / f"{image_id}.dcm"

    def _patient(self, image_id: str) -> str:
        return self._patients.get(image_id, image_id)


def _read_boxes(path: Path) -> dict[str, list[Box]]:
    """Image -> its boxes; none for an image without pneumonia."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    for row in read_rows(path, ("patientId", *PLACE, "Target")):
        found = boxes[row["patientId"]]
        if _is_target(row, path):
            found.append(box_of_place(PNEUMONIA, *read_numbers(row, PLACE, path), where=f"{path}, line {row.line}"))
    return boxes


def _is_target(row: Row, path: Path) -> bool:
    if row["Target"].strip() not in ("0", "1"):
        raise ValueError(f"{path}, line {row.line}: Target is {described(row['Target'])}: must be 1 or 0")
    return row["Target"].strip() == "1"


def _read_classes(path: Path) -> dict[str, dict[str, int]]:
    labels = {}
    for row in read_rows(path, ("patientId", "class")) if path.is_file() else ():
        if row["class"].strip() not in CLASS_NAMES:
            rule = f"must be one of {', '.join(CLASS_NAMES)}"
            raise ValueError(f"{path}, line {row.line}: class is {described(row['class'])}: {rule}")
        labels[row["patientId"]] = one_hot(row["class"].strip(), CLASS_NAMES)
    return labels


def _read_mappings(root: Path) -> Mapping[str, str]:
    """Image -> patient of the NIH, from a list of objects with subset_img_id and img_id, which is like 00020124_003.png."""
    path = next(iter(sorted(root.glob(MAPPINGS))), None)
    if path is None:
        return {}
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        return {pair["subset_img_id"]: pair["img_id"].partition("_")[0] for pair in pairs}
    except (ValueError, TypeError, KeyError, AttributeError):
        rule = "must be a JSON list of objects with subset_img_id and img_id; download it again, or take it away"
        raise ValueError(f"{path}: {rule}") from None

"""CheXpert: CheXpert-v1.0 or CheXpert-v1.0-small as Stanford AIMI or Kaggle serve them, labels without reports.

Irvin et al., CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert Comparison, AAAI 2019.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

from imitate_ds.data.sources.annotations import image_file, require_an_image
from imitate_ds.data.sources.base import Published, RadiographRef, Study
from imitate_ds.data.sources.rows import (
    SPLIT_NAMES,
    Row,
    check_patient_splits,
    described,
    parse_view,
    read_labels,
    read_rows,
)

LAYOUT = (
    "train.csv, valid.csv and train/patient00001/study1/view1_frontal.jpg, or these in CheXpert-v1.0/ or "
    "CheXpert-v1.0-small/"
)
FOLDERS = ("", "CheXpert-v1.0", "CheXpert-v1.0-small")
# The labels of the test set came later, and are at hand under either name.
TABLES = (("train.csv",), ("valid.csv",), ("test.csv", "test_labels.csv"))  # of each the first that is there
ABOUT_THE_IMAGE = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")  # all other columns are labels


class CheXpertSource:
    """Studies of root, the folder that holds train.csv or its parent: train, valid as val, test where test.csv is there."""

    name = "chexpert"
    synthetic = False
    has_reports = False
    # Rows and patients of the tables; together they are the 224,316 radiographs of 65,240 patients of the paper
    published: ClassVar[Published] = {
        "train": {"radiographs": 223_414, "patients": 64_540},
        "val": {"radiographs": 234, "patients": 200},
        "test": {"radiographs": 668, "patients": 500},
    }

    def __init__(self, root: str | Path):
        self._folder = _find_folder(Path(root))
        self._images: dict[str, list[RadiographRef]] = defaultdict(list)
        self._labels: dict[str, dict[str, int]] = {}
        there = ([path for name in names if (path := self._folder / name).is_file()] for names in TABLES)
        tables = [paths[0] for paths in there if paths]
        for table in tables:
            for row in read_rows(table, ("Path",)):
                self._add(row, table)
        check_patient_splits(((_patient(study), _split(study)) for study in self._images), tables[0])
        require_an_image((image for images in self._images.values() for image in images), self._folder, layout=LAYOUT)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Study]:
        for study, images in self._images.items():
            yield Study(
                patient_id=_patient(study),
                study_id=study,
                split=_split(study),
                findings="",
                impression="",
                radiographs=tuple(images),
                labels=self._labels[study],
            )

    def _add(self, row: Row, table: Path) -> None:
        path = _layout_path(row, table)
        study = str(path.parent)
        view = parse_view(row.get("Frontal/Lateral") or path.stem.rpartition("_")[2])
        self._images[study].append(image_file(str(path), self._folder / path, view))
        # A report is labelled, so the rows of a study say the same.
        self._labels[study] = read_labels(row, [name for name in row if name not in ABOUT_THE_IMAGE], table)


def _find_folder(root: Path) -> Path:
    for folder in (root / name for name in FOLDERS):
        if (folder / "train.csv").is_file():
            return folder
    raise FileNotFoundError(f"{root}: no train.csv; expected {LAYOUT}")


def _layout_path(row: Row, table: Path) -> PurePosixPath:
    """train/patient00001/study1/view1_frontal.jpg, whatever folder the cell puts before it."""
    path = PurePosixPath(*PurePosixPath(row["Path"].strip()).parts[-4:])
    if len(path.parts) < 4 or path.parts[0] not in SPLIT_NAMES:
        rule = "must end in train/patient00001/study1/view1_frontal.jpg"
        raise ValueError(f"{table}, line {row.line}: Path is {described(row['Path'])}: {rule}")
    return path


def _patient(study: str) -> str:
    return study.split("/")[1]


def _split(study: str) -> str:
    return SPLIT_NAMES[study.split("/")[0]]

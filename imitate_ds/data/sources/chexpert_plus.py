"""CheXpert Plus: the reports of CheXpert, beside its images as PNG or DICOM, or the JPEG of CheXpert-v1.0 and -small."""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.rows import (
    Row,
    check_patient_splits,
    check_patients,
    described,
    parse_split,
    parse_view,
    read_labels,
    read_rows,
    require_table,
    section_text,
)

LAYOUT = (
    "df_chexpert_plus_240401.csv and train/patient1/study1/view1_frontal.jpg, also under PNG/, DICOM/ or "
    "CheXpert-v1.0[-small]/"
)
FOLDERS = ("", "PNG", "PNG/PNG", "PNGs", "DICOM", "DICOM/DICOM", "images", "CheXpert-v1.0", "CheXpert-v1.0-small")
IMAGE_SUFFIXES = (".png", ".jpg", ".dcm")
REQUIRED = ("path_to_image", "deid_patient_id", "section_findings", "section_impression", "frontal_lateral", "split")
# By default the labels CheXbert read from the whole report: from one section, absent sections count as "No Finding".
LABEL_FILES = ("report", "impression", "findings")


class CheXpertPlusSource:
    """Studies of root: df_chexpert_plus_*.csv, images, and chexbert_labels/ or CheXpert's train.csv and valid.csv.

    labels: "report", "impression" or "findings", the text that CheXbert labelled; by default the first that is there.
    """

    name = "chexpert-plus"
    synthetic = False
    has_reports = True

    def __init__(self, root: str | Path, *, labels: str | None = None):
        self._root = Path(root)
        table = require_table(self._root, "df_chexpert_plus_*", called="df_chexpert_plus_240401.csv", layout=LAYOUT)
        self._studies: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in read_rows(table, REQUIRED):
            kept = {name: row[name] for name in REQUIRED} | {"split": parse_split(row, "split", table)}
            kept["path_to_image"] = _table_path(row, "path_to_image", table)
            self._studies[_study_of(kept["path_to_image"])].append(kept)
        rows = [row for rows in self._studies.values() for row in rows]
        check_patients((row["deid_patient_id"] for row in rows), "deid_patient_id", table)
        check_patient_splits(((row["deid_patient_id"], row["split"]) for row in rows), table)
        self._labels = _read_chexbert(self._root, labels) or _read_chexpert(self._root)
        self._folder, self._suffix = self._find_images(rows, table)

    def __len__(self) -> int:
        return len(self._studies)

    def __iter__(self) -> Iterator[Study]:
        for study_id, rows in self._studies.items():
            first = rows[0]
            yield Study(
                patient_id=first["deid_patient_id"],
                study_id=study_id,
                split=first["split"],
                findings=section_text(first["section_findings"]),
                impression=section_text(first["section_impression"]),
                radiographs=tuple(self._radiograph(row) for row in rows),
                labels=self._labels.get(study_id, {}),
            )

    def _radiograph(self, row: dict[str, str]) -> RadiographRef:
        image_id = row["path_to_image"]
        path = (self._folder / image_id).with_suffix(self._suffix)
        return RadiographRef(image_id, parse_view(row["frontal_lateral"]), partial(load_radiograph, path))

    def _find_images(self, rows: list[dict[str, str]], table: Path) -> tuple[Path, str]:
        """Folder and suffix of the first image that is there: all are alike, and 223 thousand take long to look up."""
        folders = [self._root / name for name in FOLDERS if (self._root / name).is_dir()]
        for row in rows:
            for folder in folders:
                for suffix in IMAGE_SUFFIXES:
                    if (folder / row["path_to_image"]).with_suffix(suffix).is_file():
                        return folder, suffix
        raise FileNotFoundError(f"{self._root}: none of the images in {table.name} is there; expected {LAYOUT}")


def _layout_path(path: str) -> str:
    """train/patient1/study1/view1_frontal.jpg, whatever folders stand before it: CheXpert-v1.0/, PNG/, an absolute path."""
    return str(PurePosixPath(*PurePosixPath(path.strip().replace("\\", "/")).parts[-4:]))


def _table_path(row: Row, column: str, table: Path) -> str:
    """_layout_path of a cell, or ValueError where it is none."""
    path = _layout_path(row[column])
    if len(PurePosixPath(path).parts) < 4:
        rule = "must end in train/patient1/study1/view1_frontal.jpg"
        raise ValueError(f"{table}, line {row.line}: {column} is {described(row[column])}: {rule}")
    return path


def _study_of(layout_path: str) -> str:
    """patient1/study1"""
    return "/".join(PurePosixPath(layout_path).parts[1:3])


def _read_chexbert(root: Path, section: str | None) -> dict[str, dict[str, int]]:
    """chexbert_labels/*_fixed.json: one JSON object a line, path_to_image and 14 labels in {1, 0, -1, null}."""
    if section is not None and section not in LABEL_FILES:
        raise ValueError(f"labels = {section!r}: must be one of {', '.join(LABEL_FILES)}")
    names = [f"{name}_fixed.json" for name in ([section] if section else LABEL_FILES)]
    path = next((path for name in names if (path := root / "chexbert_labels" / name).is_file()), None)
    if path is None and section:
        raise FileNotFoundError(f"{root / 'chexbert_labels'}: no {names[0]}; unpack chexbert_labels.zip there")
    if path is None:
        return {}
    labels = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                row = Row(((name, "" if value is None else str(value)) for name, value in values.items()), number)
                study = _study_of(_layout_path(row.pop("path_to_image")))
            except (json.JSONDecodeError, AttributeError, KeyError):
                raise ValueError(f"{path}, line {number}: not a JSON object with path_to_image") from None
            labels[study] = read_labels(row, row, path)
    return labels


def _read_chexpert(root: Path) -> dict[str, dict[str, int]]:
    """train.csv and valid.csv of CheXpert: Path, Sex, Age, Frontal/Lateral, AP/PA, and then the labels."""
    labels = {}
    for folder in FOLDERS:
        for path in (root / folder / "train.csv", root / folder / "valid.csv"):
            for row in read_rows(path, ("Path", "AP/PA")) if path.is_file() else ():
                names = list(row)[list(row).index("AP/PA") + 1 :]
                labels[_study_of(_table_path(row, "Path", path))] = read_labels(row, names, path)
    return labels

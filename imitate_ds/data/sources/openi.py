"""Open-i, the Indiana University chest X-rays, in the layout people download from Kaggle."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.table import (
    Row,
    check_patient_splits,
    parse_split,
    parse_view,
    read_labels,
    read_rows,
    section_text,
    split_by_hash,
)

LAYOUT = "indiana_reports.csv, indiana_projections.csv and images/ (or images/images_normalized/)"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")


class OpenISource:
    """Studies of root: indiana_reports.csv, indiana_projections.csv, images/; optional splits.csv and labels.csv.

    A report is a patient: the collection has one study of each. Raises FileNotFoundError for another layout,
    ValueError for columns, splits or labels that cannot be what they should, and for reports that come twice.
    """

    name = "openi"
    synthetic = False

    def __init__(self, root: str | Path):
        root = Path(root)
        for name in ("indiana_reports.csv", "indiana_projections.csv"):
            if not (root / name).is_file():
                raise FileNotFoundError(f"{root}: no {name}; expected {LAYOUT}")
        self._reports = _by_uid(root / "indiana_reports.csv", ("uid", "findings", "impression"))
        self._splits = _read_splits(root / "splits.csv", set(self._reports))
        self._labels = _read_labels(root / "labels.csv")
        self._radiographs = _read_projections(root / "indiana_projections.csv", _images(root))

    def __len__(self) -> int:
        return len(self._reports)

    def __iter__(self) -> Iterator[Study]:
        for uid, row in self._reports.items():
            yield Study(
                patient_id=uid,
                study_id=uid,
                split=self._splits.get(uid) or split_by_hash(uid),
                findings=section_text(row["findings"]),
                impression=section_text(row["impression"]),
                radiographs=tuple(self._radiographs.get(uid, ())),
                labels=self._labels.get(uid, {}),
            )


def _by_uid(path: Path, required: Sequence[str]) -> dict[str, Row]:
    rows = list(read_rows(path, required))
    by_uid = {row["uid"]: row for row in rows}
    if len(by_uid) < len(rows):
        raise ValueError(f"{path}: {len(rows) - len(by_uid)} of {len(rows)} rows repeat a uid; leave one row of each")
    return by_uid


def _stem(name: str) -> str:
    """File names differ in their suffixes only: 1_IM-0001-4001.dcm.png, 1_IM-0001-4001.jpg."""
    while name.lower().endswith(IMAGE_SUFFIXES):
        name = name.rpartition(".")[0]
    return name


def _images(root: Path) -> dict[str, Path]:
    for folder in (root / "images" / "images_normalized", root / "images", root / "images_normalized"):
        if folder.is_dir():
            found = {_stem(path.name): path for path in folder.iterdir() if path.name.lower().endswith(IMAGE_SUFFIXES)}
            if found:
                return found
    raise FileNotFoundError(f"{root}: no PNG or JPEG under images/ or images/images_normalized/; expected {LAYOUT}")


def _read_projections(path: Path, images: dict[str, Path]) -> dict[str, list[RadiographRef]]:
    refs = defaultdict(list)
    for row in read_rows(path, ("uid", "filename", "projection")):
        stem = _stem(row["filename"])
        # An image that is not there still has its place: reading it fails, and the build counts that.
        file = images.get(stem, path.parent / "images" / row["filename"])
        refs[row["uid"]].append(RadiographRef(stem, parse_view(row["projection"]), partial(load_radiograph, file)))
    return refs


def _read_splits(path: Path, uids: set[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = [(row["uid"], parse_split(row, "split", path)) for row in read_rows(path, ("uid", "split"))]
    check_patient_splits(rows, path)
    missing = len(uids - dict(rows).keys())
    if missing:
        raise ValueError(
            f"{path}: no row for {missing} of {len(uids)} reports; add them, or take the file away to split by hash"
        )
    return dict(rows)


def _read_labels(path: Path) -> dict[str, dict[str, int]]:
    if not path.is_file():
        return {}
    rows = _by_uid(path, ("uid",))
    return {uid: read_labels(row, [n for n in row if n not in ("", "uid")], path) for uid, row in rows.items()}

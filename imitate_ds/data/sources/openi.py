"""Open-i, the Indiana University chest X-rays: CSV as people download it from Kaggle, or XML as the library serves it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.openi_xml import find_xml_reports, plain_id, read_xml_reports, views_by_caption
from imitate_ds.data.sources.rows import (
    Row,
    check_patient_splits,
    parse_split,
    parse_view,
    read_labels,
    read_rows,
    section_text,
    split_by_hash,
)

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
LAYOUT = (
    f"{REPORTS}, {PROJECTIONS} and images/ (or images/images_normalized/); "
    "or ecgen-radiology/*.xml (also in NLMCXR_reports/) and images/ or NLMCXR_png/"
)
IMAGE_FOLDERS = ("images/images_normalized", "images", "images_normalized", "NLMCXR_png", "NLMCXR_dcm", "")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")


class OpenISource:
    """Studies of root: the reports as CSV, which win, or as XML; images; optional splits.csv and labels.csv.

    Studies and images have the same ids in both forms. A report is a patient: the collection has one study of each. XML
    does not say which image is frontal: indiana_projections.csv beside it does, and without that views="caption" takes the
    images whose own caption names one projection; the others are of an unknown view. Raises FileNotFoundError for another
    layout, ValueError for columns, splits or labels that cannot be what they should, and for reports that come twice.
    """

    name = "openi"
    synthetic = False
    has_reports = True

    def __init__(self, root: str | Path, *, views: str | None = None):
        root = Path(root)
        _check_views(root, views)
        read = _read_csv if (root / REPORTS).is_file() else _read_xml
        self._sections, self._radiographs = read(root)
        self._splits = _read_splits(root / "splits.csv", set(self._sections))
        self._labels = _read_labels(root / "labels.csv")

    def __len__(self) -> int:
        return len(self._sections)

    def __iter__(self) -> Iterator[Study]:
        for uid, (findings, impression) in self._sections.items():
            yield Study(
                patient_id=uid,
                study_id=uid,
                split=self._splits.get(uid) or split_by_hash(uid),
                findings=section_text(findings),
                impression=section_text(impression),
                radiographs=tuple(self._radiographs.get(uid, ())),
                labels=self._labels.get(uid, {}),
            )


Sections = dict[str, tuple[str, str]]  # uid -> findings, impression
Radiographs = dict[str, list[RadiographRef]]  # uid -> its images


def _check_views(root: Path, views: str | None) -> None:
    """Raises unless exactly one thing says which image is frontal."""
    projections = root / PROJECTIONS
    if views not in (None, "caption"):
        raise ValueError(f"views = {views!r}: must be 'caption', or be left out where there is {PROJECTIONS}")
    if views and projections.is_file():
        raise ValueError(f"views = {views!r}: {projections} says which image is frontal; leave the option out")
    if (root / REPORTS).is_file() or find_xml_reports(root) is None:
        for path in (root / REPORTS, projections):
            if not path.is_file():
                raise FileNotFoundError(f"{root}: no {path.name}; expected {LAYOUT}")
    elif not (views or projections.is_file()):
        raise FileNotFoundError(
            f"{root}: no {PROJECTIONS}, and reports in XML do not say which image is frontal. Put that file of the CSV "
            "form beside them, or give --option views=caption, which keeps the few images whose caption says so"
        )


def _read_csv(root: Path) -> tuple[Sections, Radiographs]:
    rows = _by_uid(root / REPORTS, ("uid", "findings", "impression"))
    files, radiographs = _image_files(root), defaultdict(list)
    for row in read_rows(root / PROJECTIONS, ("uid", "filename", "projection")):
        view = parse_view(row["projection"])
        image_id = _stem(row["filename"])
        file = files.get(image_id, root / "images" / row["filename"])
        radiographs[plain_id(row["uid"])].append(RadiographRef(image_id, view, partial(load_radiograph, file)))
    return {uid: (row["findings"], row["impression"]) for uid, row in rows.items()}, radiographs


def _read_xml(root: Path) -> tuple[Sections, Radiographs]:
    folder = find_xml_reports(root)
    assert folder is not None, "_check_views looked for it"
    files, path = _image_files(root), root / PROJECTIONS
    rows = read_rows(path, ("filename", "projection")) if path.is_file() else ()
    told = {_stem(row["filename"]): parse_view(row["projection"]) for row in rows}
    sections, radiographs = {}, {}
    for report in read_xml_reports(folder):
        views = told if path.is_file() else views_by_caption(report.images)
        sections[report.uid] = report.findings, report.impression
        radiographs[report.uid] = [
            RadiographRef(name, views.get(name, "unknown"), partial(load_radiograph, files.get(name, root / name)))
            for name, _ in report.images
        ]
    return sections, radiographs


def _by_uid(path: Path, required: Sequence[str]) -> dict[str, Row]:
    rows = list(read_rows(path, required))
    by_uid = {plain_id(row["uid"]): row for row in rows}
    if len(by_uid) < len(rows):
        raise ValueError(f"{path}: {len(rows) - len(by_uid)} of {len(rows)} rows repeat a uid; leave one row of each")
    return by_uid


def _stem(name: str) -> str:
    """The id of an image: names differ in form only, as 1_IM-0001-4001.dcm.png, 1_IM-0001-4001.jpg, CXR1_1_IM-0001-4001.png."""
    while name.lower().endswith(IMAGE_SUFFIXES):
        name = name.rpartition(".")[0]
    return plain_id(name)


def _image_files(root: Path) -> dict[str, Path]:
    """image id -> file, from the first folder that has any; DICOM comes in a folder for each report.

    An image that is not there is looked for all the same: reading it fails, and the build counts that.
    """
    for folder in (root / name for name in IMAGE_FOLDERS):
        paths = [*folder.iterdir(), *folder.glob("[0-9]*/*.dcm")] if folder.is_dir() else []
        if found := {_stem(path.name): path for path in paths if path.name.lower().endswith(IMAGE_SUFFIXES)}:
            return found
    raise FileNotFoundError(f"{root}: no PNG or JPEG under images/ or images/images_normalized/; expected {LAYOUT}")


def _read_splits(path: Path, uids: set[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = [(plain_id(row["uid"]), parse_split(row, "split", path)) for row in read_rows(path, ("uid", "split"))]
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

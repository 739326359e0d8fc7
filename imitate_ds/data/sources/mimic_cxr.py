"""MIMIC-CXR-JPG images with the reports of MIMIC-CXR, as PhysioNet serves them."""

import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.reports import parse_report
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.rows import (
    check_patient_splits,
    newest_table,
    parse_split,
    parse_view,
    read_labels,
    read_rows,
    require_table,
    split_by_hash,
)

LAYOUT = (
    "files/p10/p10000032/s50414267/*.jpg and mimic-cxr-2.0.0-metadata.csv[.gz], -split.csv[.gz], -chexpert.csv[.gz]"
)
REPORT_LAYOUT = (
    "mimic-cxr-reports.zip or files/p10/p10000032/s50414267.txt, which are in MIMIC-CXR and not in MIMIC-CXR-JPG"
)
# Names a table of any version: 2.1.0 of the collection still calls most of them 2.0.0, and adds one of other columns,
# mimic-cxr-2.1.0-test-set-labeled.csv
TABLE = "mimic-cxr-2.[0-9].[0-9]-"
LABEL_TABLES = ("chexpert", "negbio")
IMAGE_SUFFIXES = (".jpg", ".png", ".dcm")  # resized copies are often PNG; MIMIC-CXR itself is DICOM in the same tree
ReportReader = Callable[[str, str], str]  # (subject_id, study_id) -> text, "" where there is none


class MimicCxrSource:
    """Studies of root, the folder with files/ and the CSVs; reports: the zip or folder of the texts, if elsewhere.

    labels: "chexpert" or "negbio"; by default the first that is there. style: see `parse_report`.
    """

    name = "mimic-cxr"
    synthetic = False
    has_reports = True

    def __init__(
        self, root: str | Path, reports: str | Path | None = None, *, labels: str | None = None, style: str = "tolerant"
    ):
        self._root = Path(root)
        self._style = style
        self._images = _read_metadata(_require_table(self._root, "metadata"))
        self._splits = _read_splits(newest_table(self._root, TABLE + "split"), self._images)
        self._labels = _read_label_table(self._root, labels)
        self._reports = _find_reports(self._root, Path(reports) if reports else None)
        self._suffix = self._image_suffix()

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Study]:
        with _open_reports(self._reports) as read_report:
            for (subject, study), images in self._images.items():
                parsed = parse_report(read_report(subject, study), self._style)
                yield Study(
                    patient_id=subject,
                    study_id=study,
                    split=self._splits.get(study) or split_by_hash(subject),
                    findings=parsed.findings,
                    impression=parsed.impression,
                    radiographs=tuple(
                        RadiographRef(dicom, view, partial(load_radiograph, self._image_path(subject, study, dicom)))
                        for dicom, view in images
                    ),
                    labels=self._labels.get(study, {}),
                )

    def _image_path(self, subject: str, study: str, dicom: str, suffix: str | None = None) -> Path:
        return _patient_folder(self._root / "files", subject) / f"s{study}" / f"{dicom}{suffix or self._suffix}"

    def _image_suffix(self) -> str:
        for (subject, study), images in self._images.items():
            for suffix in IMAGE_SUFFIXES:
                if self._image_path(subject, study, images[0][0], suffix).is_file():
                    return suffix
        raise FileNotFoundError(f"{self._root}: none of the images in the metadata is there; expected {LAYOUT}")


def _patient_folder(files: Path, subject: str) -> Path:
    return files / f"p{subject[:2]}" / f"p{subject}"


def _require_table(root: Path, kind: str) -> Path:
    return require_table(root, TABLE + kind, called=f"mimic-cxr-2.x.0-{kind}.csv or .csv.gz", layout=LAYOUT)


def _read_metadata(path: Path) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(subject, study) -> its (dicom_id, view position)."""
    images = defaultdict(list)
    for row in read_rows(path, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        images[row["subject_id"], row["study_id"]].append((row["dicom_id"], parse_view(row["ViewPosition"])))
    return images


def _read_splits(path: Path | None, images: dict[tuple[str, str], list]) -> dict[str, str]:
    if path is None:
        return {}
    splits, patients = {}, []
    for row in read_rows(path, ("study_id", "subject_id", "split")):
        splits[row["study_id"]] = parse_split(row, "split", path)
        patients.append((row["subject_id"], splits[row["study_id"]]))
    check_patient_splits(patients, path)
    missing = sum(study not in splits for _, study in images)
    if missing:
        raise ValueError(
            f"{path}: no row for {missing} of {len(images)} studies; is it of the version of the metadata?"
        )
    return splits


def _read_label_table(root: Path, kind: str | None) -> dict[str, dict[str, int]]:
    if kind is not None and kind not in LABEL_TABLES:
        raise ValueError(f"labels = {kind!r}: must be one of {', '.join(LABEL_TABLES)}")
    found = (newest_table(root, TABLE + name) for name in LABEL_TABLES)
    path = _require_table(root, kind) if kind else next(filter(None, found), None)
    if path is None:
        return {}
    rows = read_rows(path, ("subject_id", "study_id"))
    return {
        row["study_id"]: read_labels(row, [n for n in row if n not in ("", "subject_id", "study_id")], path)
        for row in rows
    }


def _find_reports(root: Path, given: Path | None) -> Path:
    """The zip, or the folder that holds p10/p10000032/s50414267.txt."""
    archive = given or root / "mimic-cxr-reports.zip"
    if archive.is_file():
        if not zipfile.is_zipfile(archive):
            raise ValueError(f"{archive}: not a whole zip file; download it again")
        return archive
    tops = [given] if given else [root, root / "mimic-cxr-reports", root / "reports"]
    for folder in (folder for top in tops for folder in (top / "files", top)):
        # Of 65 thousand patient folders a few tell: most have no .txt at all where only the images were unpacked.
        if any(next(patient.glob("s*.txt"), None) for patient in islice(folder.glob("p1?/p*"), 50)):
            return folder
    where = f"reports = {str(given)!r}" if given else str(root)
    raise FileNotFoundError(
        f"{where}: no reports; expected {REPORT_LAYOUT}. Give their place with --option reports=PATH"
    )


def _read_text(folder: Path, subject: str, study: str) -> str:
    path = _patient_folder(folder, subject) / f"s{study}.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@contextmanager
def _open_reports(path: Path) -> Iterator[ReportReader]:
    if path.is_dir():
        yield partial(_read_text, path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = {PurePosixPath(name).stem: name for name in archive.namelist() if name.endswith(".txt")}
            yield partial(_read_member, archive, names)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):  # their messages quote names of members
        raise ValueError(f"{path}: damaged or encrypted zip file; download it again") from None


def _read_member(archive: zipfile.ZipFile, names: dict[str, str], subject: str, study: str) -> str:
    name = names.get(f"s{study}")
    return archive.read(name).decode("utf-8", errors="replace") if name else ""

"""Any CSV of images and reports as a source, and the reading of CSV files that the other sources share."""

import csv
import gzip
import hashlib
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from imitate_ds.batch import is_missing
from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.reports import parse_report
from imitate_ds.data.sources.base import RadiographRef, Study

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


VIEW_POSITIONS = {
    "frontal": "frontal", "pa": "frontal", "ap": "frontal", "ap supine": "frontal", "ap erect": "frontal",
    "lateral": "lateral", "ll": "lateral", "rl": "lateral", "lat": "lateral",
}  # fmt: skip


SHOWN_COLUMNS = 40  # names of a header that a message lists
# What a line of a file without a header holds and no header does: numbers, ids, paths, sentences
_NOT_A_NAME = re.compile(
    r"\d\d|^\W*\d|\.(png|jpe?g|dcm|dicom|tiff?|txt|gz)?$|\\|^.{61}|(\S+\s+){5}|^[^\w\[(#%]", re.IGNORECASE
)


class Row(dict[str, str]):
    """Cells by the name of their column, and the line of the file on which the row ends."""

    __slots__ = ("line",)

    def __init__(self, cells: Iterable[tuple[str, str]], line: int):
        super().__init__(cells)
        self.line = line


def newest_table(root: Path, name: str) -> Path | None:
    """The last of root's files name.csv and name.csv.gz (name: a glob pattern); not name.csv.gz.part or name.csv.bak."""
    return max((path for suffix in ("csv", "csv.gz") for path in root.glob(f"{name}.{suffix}")), default=None)


def require_table(root: Path, name: str, *, called: str, layout: str) -> Path:
    """newest_table, or FileNotFoundError that says what it is called and what the folder should hold."""
    if path := newest_table(root, name):
        return path
    raise FileNotFoundError(f"{root}: no {called}; expected {layout}")


def read_rows(path: Path, required: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a CSV (.tsv: tab-separated; .gz: compressed), header names stripped, blank cells as "".

    Raises FileNotFoundError, or ValueError naming the file, the column that is missing and the columns there are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        try:
            yield from _rows(path, csv.reader(file, delimiter=delimiter), required)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text; save it as CSV in UTF-8") from None
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise ValueError(f"{path}: damaged gzip file; download it again") from None
        except csv.Error as error:
            raise ValueError(f"{path}: not a readable CSV file ({error})") from None


def _rows(path: Path, reader, required: Sequence[str]) -> Iterator[Row]:
    header = [name.strip() for name in next(reader, [])]
    require_columns(path, header, required)
    for row in reader:
        if len(row) > len(header):
            raise ValueError(f"{path}, line {reader.line_num}: {len(row)} cells under {len(header)} columns")
        if row:
            row += [""] * (len(header) - len(row))
            yield Row(zip(header, row, strict=True), reader.line_num)


def require_columns(path: Path, columns: Sequence[str], required: Iterable[str]) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(map(repr, missing))}; {shown_columns(columns)}")


def shown_columns(header: Sequence[str]) -> str:
    """What a message may say of the first line of a table: without a header it holds the data of a patient."""
    names = [name for name in header if name]
    if len(set(names)) < len(names) or any(_NOT_A_NAME.search(name) for name in names):
        return "its first line does not look like a header (short names, each once), and so is not shown"
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return f"it has: {', '.join(names[:SHOWN_COLUMNS]) or 'none'}{more}"


def section_text(cell: str) -> str:
    """A report section as it stands in a cell; "" where people wrote a placeholder for nothing."""
    return "" if is_missing(cell) else cell.strip()


def parse_view(cell: str) -> str:
    return VIEW_POSITIONS.get(cell.strip().lower(), "unknown")


def parse_split(row: Row, column: str, path: Path) -> str:
    try:
        return SPLIT_NAMES[row[column].strip().lower()]
    except KeyError:
        rule = f"must be one of {', '.join(SPLIT_NAMES)}"
        raise ValueError(f"{path}, line {row.line}: {column} is {described(row[column])}: {rule}") from None


def described(cell: str) -> str:
    """A cell as an error message may show it: anything but a short number may be report text or the id of a patient."""
    cell = cell.strip()
    try:
        float(cell)
    except ValueError:
        return f"a text of {len(cell)} characters" if cell else "blank"
    return cell if len(cell) <= 4 else f"a number of {len(cell)} characters"


def split_by_hash(patient_id: str, *, train: int = 90, val: int = 5) -> str:
    """train % of the patients in train, val % in val, the rest in test, the same on every machine."""
    digest = hashlib.blake2b(patient_id.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") % 100
    return "train" if share < train else "val" if share < train + val else "test"


def check_patients(patients: Iterable[str], column: str, path: Path) -> None:
    """Raises ValueError where the patient of a row is blank."""
    blank = sum(map(is_missing, patients))
    if blank:
        raise ValueError(
            f"{path}: {column} is blank in {blank} rows; every row must name its patient, for all images of a patient go "
            "into one split"
        )


def check_patient_splits(pairs: Iterable[tuple[str, str]], path: Path) -> None:
    """Raises ValueError where (patient id, split) pairs put a patient into more than one split."""
    splits = defaultdict(set)
    for patient_id, split in pairs:
        splits[patient_id].add(split)
    torn = sum(len(found) > 1 for found in splits.values())
    if torn:
        raise ValueError(
            f"{path}: {torn} of {len(splits)} patients are in more than one split; give all rows of a patient one "
            "split, or take the splits out to have them drawn by patient"
        )


def read_labels(row: Row, columns: Iterable[str], path: Path) -> dict[str, int]:
    """The cells that hold 1, 0 or -1 (uncertain); blank cells are left out."""
    labels = {}
    for name in columns:
        cell = row[name].strip()
        if is_missing(cell):
            continue
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if value not in (1.0, 0.0, -1.0):
            rule = "a label must be 1, 0, -1 (uncertain) or blank"
            raise ValueError(f"{path}, line {row.line}: {name} is {described(cell)}: {rule}")
        labels[name] = int(value)
    return labels


ROLES = ("image", "patient", "study", "findings", "impression", "report", "view", "split", "labels")
TEXT_ROLES = ("findings", "impression", "report")


class TableSource:
    """One row per image of any CSV or TSV; rows with the same patient and study are one study.

    root is the file, or a folder that holds one; image paths start from the folder of the file. columns names, by role,
    the columns that are not called as the role is: image, patient (both needed), study (else every row is its own),
    findings, impression, report (the whole text, from which the sections that have no column are parsed), view (else all
    are frontal) and split (else drawn by patient). columns["labels"] is a list of columns, or the prefix of their
    names; without it that is "label_".
    """

    name = "table"
    synthetic = False
    has_reports = True

    def __init__(
        self, root: str | Path, columns: Mapping[str, str | Sequence[str]] | None = None, *, style: str = "tolerant"
    ):
        self._path = _table_file(Path(root))
        self._style = style
        first = next(read_rows(self._path), None)
        if first is None:
            raise ValueError(f"{self._path}: no rows")
        self._columns, self._labels = _resolve_columns(self._path, list(first), dict(columns or {}))
        self._studies: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in read_rows(self._path):
            self._studies[self._cell(row, "patient"), self._study_id(row)].append(row)
        named = (patient for (patient, _), rows in self._studies.items() for _ in rows)
        check_patients(named, self._columns["patient"], self._path)
        if "split" in self._columns:
            splits = (
                (patient, self._split(patient, row)) for (patient, _), rows in self._studies.items() for row in rows
            )
            check_patient_splits(splits, self._path)

    def __len__(self) -> int:
        return len(self._studies)

    def __iter__(self) -> Iterator[Study]:
        for (patient_id, study_id), rows in self._studies.items():
            findings, impression = self._sections(rows)
            yield Study(
                patient_id=patient_id,
                study_id=study_id,
                split=self._split(patient_id, rows[0]),
                findings=findings,
                impression=impression,
                radiographs=tuple(self._radiograph(row) for row in rows),
                labels={name: value for row in rows for name, value in self._row_labels(row).items()},
            )

    def _cell(self, row: Row, role: str) -> str:
        return row[self._columns[role]].strip() if role in self._columns else ""

    def _study_id(self, row: Row) -> str:
        """Names such as study1 come back with every patient, so the patient is part of the id."""
        return f"{self._cell(row, 'patient')}/{self._cell(row, 'study') or self._cell(row, 'image')}"

    def _split(self, patient_id: str, row: Row) -> str:
        column = self._columns.get("split")
        return parse_split(row, column, self._path) if column else split_by_hash(patient_id)

    def _sections(self, rows: list[Row]) -> tuple[str, str]:
        """The first of each section that any row of the study has."""
        cells = {
            role: next((t for row in rows if (t := section_text(self._cell(row, role)))), "") for role in TEXT_ROLES
        }
        parsed = parse_report(cells["report"], self._style)
        return cells["findings"] or parsed.findings, cells["impression"] or parsed.impression

    def _radiograph(self, row: Row) -> RadiographRef:
        image = self._cell(row, "image")
        view = parse_view(self._cell(row, "view")) if "view" in self._columns else "frontal"
        return RadiographRef(image, view, partial(load_radiograph, self._path.parent / image))

    def _row_labels(self, row: Row) -> dict[str, int]:
        labels = read_labels(row, self._labels, self._path)
        return {self._labels[column]: value for column, value in labels.items()}


def _table_file(root: Path) -> Path:
    if root.is_file():
        return root
    found = sorted(path for suffix in ("csv", "csv.gz", "tsv", "tsv.gz") for path in root.glob(f"*.{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{root}: expected one CSV or TSV file, found: {names}; give the file itself as --root")
    return found[0]


def _resolve_columns(path: Path, header: list[str], columns: dict) -> tuple[dict[str, str], dict[str, str]]:
    """(column of each role that the table has, label name of each label column)."""
    unknown = columns.keys() - set(ROLES)
    if unknown:
        raise ValueError(
            f"columns: {', '.join(sorted(map(str, unknown)))} is not a role; the roles are {', '.join(ROLES)}"
        )
    labels = columns.pop("labels", "label_")
    for role, column in [*columns.items(), *([] if isinstance(labels, Sequence) else [("labels", labels)])]:
        if not isinstance(column, str):
            raise ValueError(f"columns: {role} = {column!r}: must be the name of a column (labels: or a list of them)")
    require_columns(path, header, columns.values())
    found = {role: role for role in ROLES if role in header} | columns
    if "patient" not in found:
        raise ValueError(
            f"{path}: no column for patient; {shown_columns(header)}. Name it with columns={{'patient': ...}}; where "
            "every image is another patient that is the image column"
        )
    require_columns(path, header, [found.get("image", "image")])
    if not any(role in found for role in TEXT_ROLES):
        raise ValueError(f"{path}: no column for findings, impression or report; {shown_columns(header)}")
    if isinstance(labels, str):
        return found, {name: name.removeprefix(labels) for name in header if labels and name.startswith(labels)}
    require_columns(path, header, labels)
    return found, {name: name for name in labels}

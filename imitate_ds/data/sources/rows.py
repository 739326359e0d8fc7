"""The tables of collections: rows, splits, labels, and messages that show nothing of a patient."""

import csv
import gzip
import hashlib
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from imitate_ds.batch import is_missing

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


VIEW_POSITIONS = {
    "frontal": "frontal", "pa": "frontal", "ap": "frontal", "ap supine": "frontal", "ap erect": "frontal",
    "lateral": "lateral", "l": "lateral", "ll": "lateral", "rl": "lateral", "lat": "lateral",
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

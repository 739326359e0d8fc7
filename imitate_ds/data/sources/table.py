"""Any CSV of images and reports as a source, and the reading of CSV files that the other sources share."""

import csv
import gzip
import hashlib
import math
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


def read_rows(path: Path, required: Sequence[str] = ()) -> Iterator[dict[str, str]]:
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
        except (csv.Error, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a readable CSV file ({error})") from None


def _rows(path: Path, reader, required: Sequence[str]) -> Iterator[dict[str, str]]:
    header = [name.strip() for name in next(reader, [])]
    require_columns(path, header, required)
    for row in reader:
        if len(row) > len(header):
            raise ValueError(f"{path}, line {reader.line_num}: {len(row)} cells under {len(header)} columns")
        if row:
            row += [""] * (len(header) - len(row))
            yield dict(zip(header, row, strict=True))


def require_columns(path: Path, columns: Sequence[str], required: Iterable[str]) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(map(repr, missing))}; it has: {', '.join(columns) or 'none'}")


def section_text(cell: str) -> str:
    """A report section as it stands in a cell; "" where people wrote a placeholder for nothing."""
    return "" if is_missing(cell) else cell.strip()


def parse_split(value: str, path: Path) -> str:
    try:
        return SPLIT_NAMES[value.strip().lower()]
    except KeyError:
        raise ValueError(f"{path}: split = {value!r}: must be one of {', '.join(SPLIT_NAMES)}") from None


def split_by_hash(patient_id: str) -> str:
    """90 % train, 5 % val, 5 % test, the same on every machine."""
    digest = hashlib.blake2b(patient_id.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") % 100
    return "train" if share < 90 else "val" if share < 95 else "test"


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


def read_labels(row: Mapping[str, str], columns: Iterable[str], path: Path) -> dict[str, int]:
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
            raise ValueError(f"{path}: label {name} = {cell!r}: must be 1, 0, -1 (uncertain) or blank")
        labels[name] = int(value)
    return labels

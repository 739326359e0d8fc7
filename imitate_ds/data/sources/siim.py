"""SIIM-ACR Pneumothorax Segmentation of 2019, as Kaggle or the Google Cloud Healthcare API serve it."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from imitate_ds.data.dicom import DicomHeader, read_dicom_header
from imitate_ds.data.sources.annotations import image_file, image_study, read_patient_splits
from imitate_ds.data.sources.base import Published, Study
from imitate_ds.data.sources.rows import Row, described, read_rows, split_by_hash

# That of stage 2 has the rows of the other and those of the test set of stage 1.
TABLES = ("stage_2_train.csv", "train-rle.csv")
LAYOUT = f"{' or '.join(TABLES)} and <ImageId>.dcm, in any folders"
# Unique ImageIds of each, as people counted them on Kaggle; some copies of train-rle.csv have those of stage 2
PUBLISHED = {"stage_2_train.csv": 12_047, "train-rle.csv": 10_675}
EMPTY = "-1"
PNEUMOTHORAX = "pneumothorax"


class SiimSource:
    """Images that the table names, each a study, with a label and a mask; -1 in the table is an empty mask.

    The rows of an image are united. There is no official split: 70 % of the patients are train, 15 % val, 15 % test, by a
    hash, or splits names a CSV (patient, split). The patient is the PatientID in the DICOM header, for which the head of every
    file is read once; an image whose header has none, or that is not there, is a patient of its own.
    """

    name = "siim"
    synthetic = False
    has_reports = False

    def __init__(self, root: str | Path, *, splits: str | None = None):
        root = Path(root)
        table = _find_table(root)
        self.published: Published = {"all": {"radiographs": PUBLISHED[table.name]}}
        rows: dict[str, list[Row]] = defaultdict(list)
        for row in read_rows(table, ("ImageId", "EncodedPixels")):
            rows[row["ImageId"].strip()].append(row)
        files = {path.stem: path for path in sorted(root.rglob("*.dcm"))}
        if rows.keys().isdisjoint(files):
            raise FileNotFoundError(f"{root}: none of the images that {table.name} names is there; expected {LAYOUT}")
        self._paths = {image_id: files.get(image_id, root / f"{image_id}.dcm") for image_id in rows}
        headers = {image_id: _header(path) for image_id, path in self._paths.items()}
        self._runs = {
            image_id: tuple(_parse_runs(row, headers[image_id], table) for row in found if _has_pixels(row))
            for image_id, found in rows.items()
        }
        self._patients = {name: (header and header.patient_id) or name for name, header in headers.items()}
        self._splits = read_patient_splits(Path(splits), self._patients.values()) if splits else {}

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Study]:
        for image_id, path in self._paths.items():
            patient, runs = self._patients[image_id], self._runs[image_id]
            yield image_study(
                image_file(image_id, path),
                patient=patient,
                split=self._splits.get(patient) or split_by_hash(patient, train=70, val=15),
                labels={PNEUMOTHORAX: int(bool(runs))},
                masks={PNEUMOTHORAX: partial(runs_mask, path, runs)},
            )


Runs = tuple[int, ...]  # pixels to skip, pixels inside, pixels to skip, ...


def runs_mask(path: Path, annotations: tuple[Runs, ...]) -> np.ndarray:
    """The union of run-length codes over a DICOM file: down its columns, each start counted from the end before it."""
    header = read_dicom_header(path)
    mask = np.zeros(header.width * header.height, np.uint8)
    for runs in annotations:
        edges = np.cumsum(runs)
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            mask[start:end] = 255
    return np.ascontiguousarray(mask.reshape(header.width, header.height).T)


def _find_table(root: Path) -> Path:
    """In root, or in a folder of it, as pneumothorax/ is."""
    for name in TABLES:
        for path in (root / name, *sorted(root.glob(f"*/{name}"))):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{root}: no {' or '.join(TABLES)}; expected {LAYOUT}")


def _header(path: Path) -> DicomHeader | None:
    """None where the file is not there or not whole: reading the radiograph will say so, by its key.

    A disk that fails is another matter: the image may be read later, and its patient would not be known, nor be in one split.
    """
    try:
        return read_dicom_header(path)
    except (FileNotFoundError, ValueError):
        return None


def _has_pixels(row: Row) -> bool:
    return row["EncodedPixels"].strip() != EMPTY


def _parse_runs(row: Row, header: DicomHeader | None, table: Path) -> Runs:
    """The numbers of a row. Raises ValueError naming file and line unless they come in pairs and end within the image."""
    cell = row["EncodedPixels"].strip()
    where = f"{table}, line {row.line}: EncodedPixels"
    numbers = cell.split()
    if not numbers or len(numbers) % 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError(f"{where} is {described(cell)}: must be {EMPTY}, or pairs of whole numbers, start and length")
    runs = tuple(map(int, numbers))
    if header and sum(runs) > header.height * header.width:
        size = f"{header.width} x {header.height}"
        raise ValueError(f"{where} ends after {sum(runs):,} pixels, and the image has {size}: the row is damaged")
    return runs

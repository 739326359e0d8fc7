"""VinDr-CXR with its boxes, as PhysioNet or Kaggle (VinBigData Chest X-ray Abnormalities Detection) serve it.

Nguyen et al., VinDr-CXR: An open dataset of chest X-rays with radiologist's annotations, Scientific Data 2022.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from imitate_ds.data.sources.annotations import (
    Box,
    box_of_corners,
    image_file,
    image_study,
    read_numbers,
    require_an_image,
)
from imitate_ds.data.sources.base import Published, RadiographRef, Study
from imitate_ds.data.sources.rows import Row, read_labels, read_rows, split_by_hash

LAYOUT = (
    "annotations/annotations_train.csv and annotations/image_labels_train.csv, the same of test, and train/*.dicom and "
    "test/*.dicom (PhysioNet); or train.csv and train/*.dicom (Kaggle)"
)
SUFFIXES = (".dicom", ".dcm", ".png", ".jpg")
CORNERS = ("x_min", "y_min", "x_max", "y_max")
NOTHING = "No finding"
SAME_LABEL = {"Other disease": "Other diseases"}  # as the labels of test spell it -> as those of train do
UNION = "union"
PUBLISHED = {"train + val": {"radiographs": 15_000}, "test": {"radiographs": 3_000}}  # the paper, abstract

Votes = dict[str, dict[str, dict[str, int]]]  # image -> reader -> label -> 1 or 0
Marks = dict[str, list[tuple[str, Box | None]]]  # image -> reader and box; None where a reader found nothing


class Part(NamedTuple):
    """The tables of one folder of images."""

    folder: str  # train or test
    boxes: Path
    labels: Path | None  # None: a label is what a reader drew a box of, as on Kaggle


class VinDrSource:
    """Images that the tables name, each a study and a patient, for the collection does not say whose they are.

    Three radiologists read every training image, and what they say is merged: a label is what most of them say (uncertain
    where they are even), and boxes are those of all, so that a finding may have three. reader, as in R9, takes what one of them
    says, and the images that he or she read. Labels and boxes of test are a consensus. A tenth of train is val, by a hash.
    Boxes are in pixels of the DICOM files; PNG or JPEG must have their size. Kaggle has no labels of test: it is left out.
    """

    name = "vindr"
    synthetic = False
    has_reports = False

    def __init__(self, root: str | Path, *, reader: str = UNION):
        root = Path(root)
        self.published: Published = PUBLISHED if reader == UNION else {}
        self._images: list[tuple[RadiographRef, dict[str, int], list[Box] | None]] = []
        for part in _find_parts(root):
            marks = _read_marks(part.boxes)
            votes = _read_votes(part.labels) if part.labels else _votes_of_marks(marks)
            chosen = _check_reader(reader, votes) if part.folder == "train" else UNION
            suffix = _image_suffix(root / part.folder, votes)
            for image_id in {**votes, **marks}:
                readers = {*votes.get(image_id, ()), *(name for name, _ in marks.get(image_id, ()))}
                if chosen == UNION or chosen in readers:
                    image = image_file(f"{part.folder}/{image_id}", root / part.folder / f"{image_id}{suffix}")
                    labels, boxes = _merged(votes.get(image_id, {}), chosen), _boxes(marks.get(image_id), chosen)
                    self._images.append((image, labels, boxes))
        require_an_image((image for image, *_ in self._images), root, layout=LAYOUT)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Study]:
        for image, labels, boxes in self._images:
            folder, _, image_id = image.image_id.partition("/")
            split = "test" if folder == "test" else split_by_hash(image_id, train=90, val=10)
            yield image_study(image, patient=image_id, split=split, labels=labels, boxes=boxes)


def _find_parts(root: Path) -> list[Part]:
    for folder in (root / "annotations", root):
        parts = [
            Part(name, boxes, labels if (labels := folder / f"image_labels_{name}.csv").is_file() else None)
            for name in ("train", "test")
            if (boxes := folder / f"annotations_{name}.csv").is_file()
        ]
        if parts:
            return parts
    if (root / "train.csv").is_file():
        return [Part("train", root / "train.csv", None)]
    raise FileNotFoundError(f"{root}: no annotations_train.csv and no train.csv; expected {LAYOUT}")


def _image_suffix(folder: Path, image_ids: Collection[str]) -> str:
    """That of the first image that is there: all are alike."""
    found = (suffix for name in image_ids for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file())
    return next(found, SUFFIXES[0])


def _reader(row: Row) -> str:
    """ "" in the tables of test, which say what all readers agreed on."""
    return next((row[name].strip() for name in ("rad_id", "rad_ID") if name in row), "")


def _read_votes(path: Path) -> Votes:
    votes: Votes = defaultdict(dict)
    for row in read_rows(path, ("image_id",)):
        names = [name for name in row if name and name not in ("image_id", "rad_id", "rad_ID")]
        labels = read_labels(row, names, path)
        votes[row["image_id"]][_reader(row)] = {SAME_LABEL.get(name, name): value for name, value in labels.items()}
    return votes


def _read_marks(path: Path) -> Marks:
    marks: Marks = defaultdict(list)
    for row in read_rows(path, ("image_id", "class_name", *CORNERS)):
        label = row["class_name"].strip()
        nothing = label == NOTHING
        where = f"{path}, line {row.line}"
        box = None if nothing else box_of_corners(label, *read_numbers(row, CORNERS, path), where=where)
        marks[row["image_id"]].append((_reader(row), box))
    return marks


def _votes_of_marks(marks: Marks) -> Votes:
    """Every reader of an image says of every class that anybody ever marked whether it is there."""
    names = sorted({box["label"] for found in marks.values() for _, box in found if box})
    votes: Votes = defaultdict(dict)
    for image_id, found in marks.items():
        for reader in dict.fromkeys(name for name, _ in found):
            seen = {box["label"] for name, box in found if name == reader and box}
            votes[image_id][reader] = {**{name: int(name in seen) for name in names}, NOTHING: int(not seen)}
    return votes


def _check_reader(reader: str, votes: Votes) -> str:
    readers = sorted({name for found in votes.values() for name in found}, key=lambda name: (len(name), name))
    if reader not in (UNION, *readers):
        raise ValueError(f"reader = {reader!r}: must be {UNION} or one of {', '.join(readers)}")
    return reader


def _merged(votes: Mapping[str, Mapping[str, int]], reader: str) -> dict[str, int]:
    """What most of the readers say of each label, or what one of them does; -1 where they are even."""
    if reader != UNION:
        return dict(votes.get(reader, {}))
    names = dict.fromkeys(name for labels in votes.values() for name in labels)
    said = {name: [labels[name] for labels in votes.values() if name in labels] for name in names}
    return {name: _majority(values.count(1), len(values)) for name, values in said.items()}


def _majority(positive: int, votes: int) -> int:
    return -1 if 2 * positive == votes else int(2 * positive > votes)


def _boxes(marks: list[tuple[str, Box | None]] | None, reader: str) -> list[Box] | None:
    """None where nobody looked for boxes, or the one reader did not."""
    mine = [box for name, box in marks or () if reader in (UNION, name)]
    return [box for box in mine if box] if mine else None

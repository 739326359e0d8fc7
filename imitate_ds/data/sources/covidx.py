"""COVIDx, radiographs of many public collections with one class each, as COVID-Net and Kaggle lay it out.

Wang et al., COVID-Net: a tailored deep convolutional neural network design for detection of COVID-19 cases from chest X-ray
images, Scientific Reports 2020. It grows: there is no count to compare with.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from imitate_ds.data.sources.annotations import image_file, image_study, one_hot, read_lines, require_an_image
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.rows import check_patient_splits, described, split_by_hash

LAYOUT = (
    "train/, test/, and train*.txt and test*.txt (also in labels/), lines of: patient file class source; "
    "with or without val/ and val*.txt"
)
COVID = "COVID-19"
CLASSES = ("normal", "pneumonia", COVID)
POSITIVE, NEGATIVE = "positive", "negative"
WORDS = {name.lower(): name for name in (*CLASSES, POSITIVE, NEGATIVE)}


class Line(NamedTuple):
    patient: str
    file: str
    word: str  # of WORDS
    number: int


class CovidxSource:
    """Images that the lists name, each a study. version, as in 9A, says which lists, where several lie side by side.

    Three classes where any line says normal or pneumonia; a line that says positive, as some of such lists do, is COVID-19
    then. Lists that know positive and negative alone have one label: COVID-19, 1 or 0. Without val*.txt a tenth of the patients
    of train are val, by a hash. The collections number their patients each for itself, so the source is part of the patient.
    """

    name = "covidx"
    synthetic = False
    has_reports = False

    def __init__(self, root: str | Path, *, version: str | None = None):
        self._root = Path(root)
        lists = {split: _find_list(self._root, split, version) for split in ("train", "val", "test")}
        lines = {split: list(_read_list(path)) for split, path in lists.items() if path}
        classes = _classes(lines, lists)
        self._drawn = "val" not in lines
        self._images: list[tuple[RadiographRef, str, dict[str, int]]] = []
        for split, found in lines.items():
            for line in found:
                image = image_file(f"{split}/{line.file}", self._root / split / line.file)
                self._images.append((image, line.patient, _labels(line, classes)))
        pairs = [(line.patient, split) for split, found in lines.items() for line in found]
        check_patient_splits(pairs, lists["test"] or self._root)
        require_an_image((image for image, *_ in self._images), self._root, layout=LAYOUT)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Study]:
        for image, patient, labels in self._images:
            split = image.image_id.partition("/")[0]
            if split == "train" and self._drawn:
                split = split_by_hash(patient, train=90, val=10)
            yield image_study(image, patient=patient, split=split, labels=labels)


def _find_list(root: Path, split: str, version: str | None) -> Path | None:
    """The list of a split; None where there is none of val."""
    pattern = f"{split}*{version}*.txt" if version else f"{split}*.txt"
    found = [path for folder in (root, root / "labels") for path in sorted(folder.glob(pattern))]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"{root}: several lists of {split}: {names}; say which with --option version=9A, or as they are called"
        )
    if not found and split != "val":
        raise FileNotFoundError(f"{root}: no {pattern}; expected {LAYOUT}")
    return found[0] if found else None


def _read_list(path: Path) -> Iterator[Line]:
    """Names of files may hold blanks, and old lists lack the source, so the class is looked for from the end."""
    for number, text in enumerate(read_lines(path), start=1):
        cells = text.split()
        place = next((at for at in (len(cells) - 2, len(cells) - 1) if at >= 2 and cells[at].lower() in WORDS), None)
        if place is not None:
            source = "".join(cells[place + 1 :]).lower()
            patient = f"{source}/{cells[0]}" if source else cells[0]
            yield Line(patient, " ".join(cells[1:place]), WORDS[cells[place].lower()], number)
        elif cells:
            rule = f"must be: patient file class source, and the class one of {', '.join(WORDS.values())}"
            raise ValueError(f"{path}, line {number}: is {described(text)}: {rule}")


def _classes(lines: dict[str, list[Line]], lists: dict[str, Path | None]) -> tuple[str, ...]:
    """The three classes, or COVID-19 alone. Raises ValueError where a list of three says negative, which is two of them."""
    words = {line.word for found in lines.values() for line in found}
    if words.isdisjoint(CLASSES[:2]):
        return (COVID,)
    for split, found in lines.items():
        for line in found:
            if line.word == NEGATIVE:
                rule = "in lists that also say normal or pneumonia, which of these is it? Take lists of one version"
                raise ValueError(f"{lists[split]}, line {line.number}: class is {NEGATIVE}: {rule}")
    return CLASSES


def _labels(line: Line, classes: tuple[str, ...]) -> dict[str, int]:
    return one_hot(COVID if line.word == POSITIVE else line.word, classes)

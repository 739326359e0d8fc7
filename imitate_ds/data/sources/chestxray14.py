"""ChestX-ray14 of the NIH Clinical Center, in the folders in which its archives or Kaggle unpack it.

Wang et al., ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks, CVPR 2017.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.sources.annotations import (
    Box,
    box_of_place,
    files_by_name,
    image_file,
    image_study,
    read_lines,
    read_numbers,
    require_an_image,
)
from imitate_ds.data.sources.base import Published, RadiographRef, Study
from imitate_ds.data.sources.rows import (
    Row,
    check_patient_splits,
    check_patients,
    described,
    parse_view,
    read_rows,
    require_table,
    split_by_hash,
)

LAYOUT = (
    "Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, train_val_list.txt, test_list.txt, BBox_List_2017.csv (optional) and "
    "images_001/images/*.png to images_012/images/*.png, or images/*.png"
)
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")
LABELS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia"),
    *("Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)
SIDE = 1024  # pixels of every image of the release
NOTHING = "No Finding"
BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")  # one name, "Bbox [x,y,w,h]", whose commas are those of the CSV too
BOX_LABELS = {"Infiltrate": "Infiltration"}  # as the table of boxes spells it -> as the table of labels does


class ChestXray14Source:
    """Images of root, each a study. The official lists say what is test; val is a tenth of the others, by hash of the patient.

    Boxes are there for the few images that radiologists marked: the others were not looked at for them.
    """

    name = "chestxray14"
    synthetic = False
    has_reports = False
    # The two lists and the table of boxes of the release; 112,120 and 30,805 are also in its README
    published: ClassVar[Published] = {
        "train + val": {"radiographs": 86_524, "patients": 28_008},
        "test": {"radiographs": 25_596, "patients": 2_797},
        "all": {"radiographs": 112_120, "patients": 30_805, "boxes": 984},
    }

    def __init__(self, root: str | Path):
        self._root = Path(root)
        table = require_table(self._root, "Data_Entry_2017*", called="Data_Entry_2017[_v2020].csv", layout=LAYOUT)
        rows = list(read_rows(table, COLUMNS))
        check_patients((row["Patient ID"] for row in rows), "Patient ID", table)
        self._files = files_by_name(
            sorted(self._root.glob("images*/images")) + sorted(self._root.glob("images*")), {".png"}
        )
        self._boxes = _read_boxes(self._root / "BBox_List_2017.csv")
        self._tests = self._read_lists({row["Image Index"] for row in rows}, table)
        self._images = [(self._image(row), row["Patient ID"], _labels(row, table)) for row in rows]
        listed = (("test" if self._is_test(image) else "train", patient) for image, patient, _ in self._images)
        check_patient_splits(((patient, split) for split, patient in listed), self._root / "test_list.txt")
        require_an_image((image for image, *_ in self._images), self._root, layout=LAYOUT)
        self._check_size()

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Study]:
        for image, patient, labels in self._images:
            split = "test" if self._is_test(image) else split_by_hash(patient, train=90, val=10)
            yield image_study(image, patient=patient, split=split, labels=labels, boxes=self._boxes.get(image.image_id))

    def _image(self, row: Row) -> RadiographRef:
        name = row["Image Index"]
        return image_file(name, self._files.get(name, self._root / "images" / name), parse_view(row["View Position"]))

    def _is_test(self, image: RadiographRef) -> bool:
        return image.image_id in self._tests

    def _check_size(self) -> None:
        """Raises ValueError where boxes would lie in the wrong place: there are smaller copies of the collection."""
        boxed = next((file for name, file in self._files.items() if name in self._boxes), None)
        if boxed and (shape := load_radiograph(boxed).shape) != (SIDE, SIDE):
            raise ValueError(
                f"{self._root}: BBox_List_2017.csv has boxes in images of {SIDE} pixels a side, and these are "
                f"{shape[1]} wide and {shape[0]} high; take the images of the release, or take that file away"
            )

    def _read_lists(self, names: set[str], table: Path) -> set[str]:
        """The test images; ValueError where an image is in neither list, or in both."""
        train, test = (_read_list(self._root / f"{name}_list.txt") for name in ("train_val", "test"))
        if lost := len(names - train - test):
            raise ValueError(
                f"{table}: {lost} of {len(names)} images are in neither train_val_list.txt nor test_list.txt"
            )
        if both := len(train & test):
            raise ValueError(f"{self._root / 'test_list.txt'}: {both} of its images are in train_val_list.txt too")
        return test


def _read_list(path: Path) -> set[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name}; expected {LAYOUT}")
    return {name for line in read_lines(path) for name in line.split()}


def _labels(row: Row, table: Path) -> dict[str, int]:
    found = {name.strip() for name in row["Finding Labels"].split("|")}
    if not found <= {*LABELS, NOTHING} or (NOTHING in found and len(found) > 1):
        rule = f"must be {NOTHING}, or findings of the fourteen with | between them"
        raise ValueError(f"{table}, line {row.line}: Finding Labels is {described(row['Finding Labels'])}: {rule}")
    return {name: int(name in found) for name in LABELS}


def _read_boxes(path: Path) -> dict[str, list[Box]]:
    boxes = defaultdict(list)
    for row in read_rows(path, ("Image Index", "Finding Label", *BOX_COLUMNS)) if path.is_file() else ():
        label = BOX_LABELS.get(row["Finding Label"], row["Finding Label"])
        where = f"{path}, line {row.line}"
        if label not in LABELS:
            raise ValueError(f"{where}: Finding Label is {described(label)}: must be one of the fourteen findings")
        boxes[row["Image Index"]].append(box_of_place(label, *read_numbers(row, BOX_COLUMNS, path), where=where))
    return boxes

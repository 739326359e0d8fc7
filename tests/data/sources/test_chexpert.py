import csv

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.collection_check import check_collection, check_lines
from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.chexpert import CheXpertSource

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Edema", "Support Devices"]
TRAIN = [
    ["train/patient00001/study1/view1_frontal.jpg", "Female", "68", "Frontal", "AP", "1.0", "", "-1.0"],
    ["train/patient00001/study1/view2_lateral.jpg", "Female", "68", "Lateral", "", "1.0", "", "-1.0"],
    ["train/patient00001/study2/view1_frontal.jpg", "Unknown", "0", "Frontal", "PA", "", "0.0", "1.0"],
]
VALID = [["valid/patient64541/study1/view1_frontal.jpg", "Male", "73", "Frontal", "AP", "0.0", "1.0", "0.0"]]


def write_table(path, rows, prefix="CheXpert-v1.0-small/", header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *([prefix + row[0], *row[1:]] for row in rows)])


def write_tree(root, prefix="CheXpert-v1.0-small/"):
    root.mkdir(parents=True, exist_ok=True)
    write_table(root / "train.csv", TRAIN, prefix)
    write_table(root / "valid.csv", VALID, prefix)
    for row in TRAIN + VALID:
        (root / row[0]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(root / row[0])
    return root


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [
        ("", "CheXpert-v1.0-small/"),
        ("CheXpert-v1.0-small", "CheXpert-v1.0-small/"),
        ("CheXpert-v1.0", "CheXpert-v1.0/"),
        ("CheXpert-v1.0", ""),
    ],
)
def test_the_folder_itself_or_its_parent(tmp_path, folder, prefix):
    write_tree(tmp_path / folder, prefix)
    source = open_source("chexpert", tmp_path)
    first, second, third = source
    assert (source.name, source.has_reports, len(source)) == ("chexpert", False, 3)
    assert (first.patient_id, first.study_id, first.split) == ("patient00001", "train/patient00001/study1", "train")
    assert (second.split, third.split) == ("train", "val")
    assert [image.view_position for image in first.radiographs] == ["frontal", "lateral"]
    assert first.radiographs[0].read().shape == (8, 8)
    assert (first.findings, first.impression, first.masks, first.extra) == ("", "", {}, {})


def test_labels_are_uncertain_or_left_out(tmp_path):
    assert [study.labels for study in CheXpertSource(write_tree(tmp_path))] == [
        {"No Finding": 1, "Support Devices": -1},
        {"Edema": 0, "Support Devices": 1},
        {"No Finding": 0, "Edema": 1, "Support Devices": 0},
    ]


@pytest.mark.parametrize("name", ["test.csv", "test_labels.csv"])
def test_the_test_set_where_it_is_there(tmp_path, name):
    """Its table has the path and the labels alone."""
    rows = [["test/patient64741/study1/view1_frontal.jpg", "0.0", "1.0", "0.0"]]
    write_table(write_tree(tmp_path) / name, rows, "", ["Path", "No Finding", "Edema", "Support Devices"])
    study = list(CheXpertSource(tmp_path))[-1]
    assert (study.split, study.radiographs[0].view_position) == ("test", "frontal")
    assert study.labels == {"No Finding": 0, "Edema": 1, "Support Devices": 0}


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        (0, "patient00001.jpg", r"train\.csv, line 4: Path is a text of 36 characters: must end in train/patient00001"),
        (0, "a/patient00001/study1/v.jpg", r"train\.csv, line 4: Path is a text of \d+ characters: must end in"),
        (6, "maybe", r"train\.csv, line 4: Edema is a text of 5 characters: a label must be 1, 0, -1"),
        (0, VALID[0][0], "1 of 2 patients are in more than one split"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, column, cell, message):
    rows = [list(row) for row in TRAIN]
    rows[2][column] = cell
    if cell == VALID[0][0]:
        rows[2][0] = "train/patient64541/study9/view1_frontal.jpg"
    write_table(write_tree(tmp_path) / "train.csv", rows)
    with pytest.raises(ValueError, match=message) as error:
        CheXpertSource(tmp_path)
    assert "patient64541" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\.csv; expected train\.csv, valid\.csv and"):
        CheXpertSource(tmp_path)
    write_table(tmp_path / "train.csv", TRAIN)
    with pytest.raises(FileNotFoundError, match="none of the images that its tables name is there; expected"):
        CheXpertSource(tmp_path)


def test_a_part_of_the_collection_is_less_than_was_published(tmp_path):
    check = check_collection(CheXpertSource(write_tree(tmp_path)))
    assert not check.is_whole
    assert check_lines(check) == [
        "train: 3 radiographs, 223,414 published: 223,411 fewer",
        "train: 1 patients, 64,540 published: 64,539 fewer",
        "val: 1 radiographs, 234 published: 233 fewer",
        "val: 1 patients, 200 published: 199 fewer",
        "test: not here; 668 radiographs published",
        "chexpert: something is missing or wrong",
    ]

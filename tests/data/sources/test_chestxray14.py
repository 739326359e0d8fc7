import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources import chestxray14, open_source
from imitate_ds.data.sources.chestxray14 import LABELS, ChestXray14Source
from imitate_ds.data.sources.rows import split_by_hash

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
ROWS = [
    "00000001_000.png,Cardiomegaly|Emphysema,000,1,057Y,M,PA,2682,2749,0.143,0.143,\n",
    "00000001_001.png,No Finding,001,1,058Y,M,AP,2894,2729,0.143,0.143,\n",
    "00000002_000.png,Infiltration,000,2,080Y,M,PA,2500,2048,0.171,0.171,\n",
]
BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000002_000.png,Infiltrate,2.5,1.0,3.0,4.5,,,\n"


def write_tree(
    root, table="Data_Entry_2017.csv", images=("images_001/images", "images_001/images", "images_002/images")
):
    (root / table).write_text(HEADER + "".join(ROWS))
    (root / "BBox_List_2017.csv").write_text(BOXES)
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (root / "test_list.txt").write_text("00000002_000.png")
    for row, folder in zip(ROWS, images, strict=True):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), 100, np.uint8)).save(root / folder / row.partition(",")[0])
    return root


@pytest.fixture(autouse=True)
def _small_images(monkeypatch):
    monkeypatch.setattr(chestxray14, "SIDE", 16)


@pytest.mark.parametrize(
    ("table", "images"),
    [
        ("Data_Entry_2017.csv", ("images_001/images", "images_001/images", "images_002/images")),
        ("Data_Entry_2017_v2020.csv", ("images", "images", "images")),
    ],
)
def test_reads_the_layouts_people_have(tmp_path, table, images):
    source = open_source("chestxray14", write_tree(tmp_path, table, images))
    first, second, third = source
    assert (source.name, source.has_reports, len(source)) == ("chestxray14", False, 3)
    assert (first.patient_id, first.study_id, second.patient_id) == ("1", "00000001_000.png", "1")
    assert first.split == second.split == split_by_hash("1", train=90, val=10)
    assert third.split == "test"
    assert [study.radiographs[0].view_position for study in source] == ["frontal"] * 3
    assert third.radiographs[0].read().shape == (16, 16)


def test_every_finding_is_a_label(tmp_path):
    first, second, third = ChestXray14Source(write_tree(tmp_path))
    assert {name for name, value in first.labels.items() if value} == {"Cardiomegaly", "Emphysema"}
    assert second.labels == dict.fromkeys(LABELS, 0)
    assert third.labels == dict.fromkeys(LABELS, 0) | {"Infiltration": 1}


def test_boxes_where_radiologists_marked_them(tmp_path):
    first, _, third = ChestXray14Source(write_tree(tmp_path))
    assert third.extra == {"boxes": [{"label": "Infiltration", "x": 2.5, "y": 1.0, "width": 3.0, "height": 4.5}]}
    assert first.extra == {}
    (tmp_path / "BBox_List_2017.csv").unlink()
    assert [study.extra for study in ChestXray14Source(tmp_path)] == [{}] * 3


def test_a_smaller_copy_of_the_images_is_refused_where_there_are_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(chestxray14, "SIDE", 1024)
    with pytest.raises(ValueError, match="boxes in images of 1024 pixels a side, and these are 16 wide and 16 high"):
        ChestXray14Source(write_tree(tmp_path))
    (tmp_path / "BBox_List_2017.csv").unlink()
    assert len(ChestXray14Source(tmp_path)) == 3


def test_val_is_a_tenth_of_the_patients():
    splits = [split_by_hash(str(number), train=90, val=10) for number in range(2000)]
    assert {"train", "val"} == set(splits)
    assert splits.count("val") / 2000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "Data_Entry_2017.csv",
            "No Finding",
            "Jane Doe",
            r"line 3: Finding Labels is a text of 8 characters: must be No",
        ),
        ("Data_Entry_2017.csv", "No Finding", "No Finding|Mass", r"line 3: Finding Labels is a text of 15 characters"),
        ("Data_Entry_2017.csv", ",001,1,", ",001,,", "Patient ID is blank in 1 rows"),
        ("Data_Entry_2017.csv", "Patient ID", "Patient", "no column 'Patient ID'; it has: Image Index"),
        (
            "BBox_List_2017.csv",
            "Infiltrate",
            "Nothing",
            "line 2: Finding Label is a text of 7 characters: must be one of",
        ),
        ("BBox_List_2017.csv", "3.0", "wide", r"line 2: w is a text of 4 characters: must be a number of pixels"),
        ("BBox_List_2017.csv", "3.0", "0", "line 2: a box is 0 wide and 4.5 high: both must be greater than 0"),
        ("BBox_List_2017.csv", "Bbox [x,y,w,h]", "x,y,w,h", r"no column 'Bbox \[x', 'h\]'; it has"),
        ("test_list.txt", "2_000.png", "1_001.png", "1 of 3 images are in neither train_val_list"),
        ("test_list.txt", "00000002", "00000001_001.png 00000002", "1 of its images are in train_val_list.txt too"),
        ("Data_Entry_2017.csv", ",000,2,", ",000,1,", "1 of 1 patients are in more than one split"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, file, old, new, message):
    path = write_tree(tmp_path) / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        ChestXray14Source(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "Doe" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Data_Entry_2017\[_v2020\]\.csv; expected"):
        ChestXray14Source(tmp_path)
    write_tree(tmp_path)
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no test_list\.txt; expected"):
        ChestXray14Source(tmp_path)
    write_tree(tmp_path)
    for path in tmp_path.glob("images*/images/*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of the images that its tables name is there"):
        ChestXray14Source(tmp_path)

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.rows import split_by_hash
from imitate_ds.data.sources.vindr import VinDrSource
from tests.data.test_radiographs import save_dicom

BOXES = """image_id,rad_id,class_name,x_min,y_min,x_max,y_max
aa01,R9,No finding,,,,
aa01,R10,No finding,,,,
aa01,R11,Cardiomegaly,1.5,2,6.5,8
bb02,R8,Cardiomegaly,1,2,7,8
bb02,R9,Cardiomegaly,2,2,7,9
bb02,R9,Nodule/Mass,3,3,4,4
bb02,R10,No finding,,,,
"""
LABELS = """image_id,rad_id,Cardiomegaly,Nodule/Mass,Tuberculosis,Other diseases,No finding
aa01,R9,0,0,0,0,1
aa01,R10,0,0,1,0,0
aa01,R11,1,0,1,0,0
bb02,R8,1,0,0,0,0
bb02,R9,1,1,0,0,0
bb02,R10,0,0,0,0,1
"""
TEST_BOXES = """image_id,class_name,x_min,y_min,x_max,y_max
cc03,No finding,,,,
dd04,Cardiomegaly,1,2,7,8
"""
TEST_LABELS = """image_id,Cardiomegaly,Nodule/Mass,Tuberculosis,Other disease,No finding
cc03,0,0,0,1,0
dd04,1,0,0,0,0
"""
KAGGLE = """image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
aa01,No finding,14,R9,,,,
aa01,No finding,14,R10,,,,
aa01,Cardiomegaly,3,R11,1.5,2,6.5,8
bb02,Cardiomegaly,3,R8,1,2,7,8
bb02,Cardiomegaly,3,R9,2,2,7,9
bb02,No finding,14,R10,,,,
"""


def write_images(root, suffix=".dicom"):
    pixels = np.arange(144, dtype=np.uint8).reshape(12, 12)
    for folder, names in (("train", ("aa01", "bb02")), ("test", ("cc03", "dd04"))):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = root / folder / f"{name}{suffix}"
            if suffix in (".dicom", ".dcm"):
                save_dicom(path, pixels, bits=8)
            else:
                Image.fromarray(pixels).save(path)
    return root


def write_tree(root, suffix=".dicom", folder="annotations"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    tables = {"annotations_train": BOXES, "image_labels_train": LABELS}
    tables |= {"annotations_test": TEST_BOXES, "image_labels_test": TEST_LABELS}
    for name, text in tables.items():
        (root / folder / f"{name}.csv").write_text(text)
    return write_images(root, suffix)


def box(label, x, y, width, height):
    return {"label": label, "x": float(x), "y": float(y), "width": float(width), "height": float(height)}


@pytest.mark.parametrize(("suffix", "folder"), [(".dicom", "annotations"), (".dcm", ""), (".png", ""), (".jpg", "")])
def test_reads_the_layouts_people_have(tmp_path, suffix, folder):
    if suffix in (".dicom", ".dcm"):
        pytest.importorskip("pydicom")
    source = open_source("vindr", write_tree(tmp_path, suffix, folder))
    studies = list(source)
    assert (source.name, source.has_reports, len(source)) == ("vindr", False, 4)
    assert [study.study_id for study in studies] == ["train/aa01", "train/bb02", "test/cc03", "test/dd04"]
    assert [study.split for study in studies] == [
        *(split_by_hash(name, train=90, val=10) for name in ("aa01", "bb02")),
        *("test", "test"),
    ]
    assert studies[0].radiographs[0].read().shape == (12, 12)


def test_labels_are_what_most_readers_say_and_boxes_those_of_all(tmp_path):
    first, second, third, fourth = VinDrSource(write_tree(tmp_path, ".png"))
    assert first.labels == {
        "Cardiomegaly": 0,
        "Nodule/Mass": 0,
        "Tuberculosis": 1,
        "Other diseases": 0,
        "No finding": 0,
    }
    assert second.labels["Cardiomegaly"] == 1
    assert second.labels["Nodule/Mass"] == second.labels["No finding"] == 0
    assert first.extra["boxes"] == [box("Cardiomegaly", 1.5, 2, 5, 6)]
    assert second.extra["boxes"] == [
        *(box("Cardiomegaly", 1, 2, 6, 6), box("Cardiomegaly", 2, 2, 5, 7), box("Nodule/Mass", 3, 3, 1, 1))
    ]
    assert third.extra["boxes"] == []
    assert third.labels["Other diseases"] == 1  # the tables of test say "Other disease"
    assert fourth.extra["boxes"] == [box("Cardiomegaly", 1, 2, 6, 6)]


def test_one_reader_and_the_images_that_he_read(tmp_path):
    write_tree(tmp_path, ".png")
    first, second, *_ = VinDrSource(tmp_path, reader="R9")
    assert first.labels["No finding"] == 1
    assert first.extra["boxes"] == []
    assert second.extra["boxes"] == [box("Cardiomegaly", 2, 2, 5, 7), box("Nodule/Mass", 3, 3, 1, 1)]
    assert [study.study_id for study in VinDrSource(tmp_path, reader="R8")] == ["train/bb02", "test/cc03", "test/dd04"]
    with pytest.raises(ValueError, match="reader = 'R1': must be union or one of R8, R9, R10, R11"):
        VinDrSource(tmp_path, reader="R1")


def test_the_form_of_kaggle_where_boxes_are_the_labels(tmp_path):
    (write_images(tmp_path, ".png") / "train.csv").write_text(KAGGLE)
    first, second = VinDrSource(tmp_path)
    assert first.labels == {"Cardiomegaly": 0, "No finding": 1}
    assert second.labels == {"Cardiomegaly": 1, "No finding": 0}
    assert first.extra["boxes"] == [box("Cardiomegaly", 1.5, 2, 5, 6)]
    assert len(second.extra["boxes"]) == 2


def test_readers_who_are_even_leave_a_label_uncertain(tmp_path):
    lines = [line for line in LABELS.splitlines() if not line.startswith("aa01,R11")]
    (write_tree(tmp_path, ".png") / "annotations" / "image_labels_train.csv").write_text("\n".join(lines))
    assert next(iter(VinDrSource(tmp_path))).labels["Tuberculosis"] == -1


def test_an_image_without_a_row_of_boxes_was_not_looked_at_for_them(tmp_path):
    lines = [line for line in BOXES.splitlines() if not line.startswith("aa01")]
    (write_tree(tmp_path, ".png") / "annotations" / "annotations_train.csv").write_text("\n".join(lines))
    studies = {study.study_id: study.extra for study in VinDrSource(tmp_path)}
    assert studies["train/aa01"] == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("annotations_train", "1.5,2,6.5", "Doe,2,6.5", "line 4: x_min is a text of 3 characters: must be a number of"),
        (
            "annotations_train",
            "1.5,2,6.5",
            "9,2,6.5",
            "line 4: a box is -2.5 wide and 6 high: both must be greater than 0",
        ),
        ("annotations_train", "class_name", "class", "no column 'class_name'; it has: image_id, rad_id, class"),
        ("image_labels_train", "R9,0", "R9,2", "line 2: Cardiomegaly is 2: a label must be 1, 0, -1"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, file, old, new, message):
    path = write_tree(tmp_path, ".png") / "annotations" / f"{file}.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        VinDrSource(tmp_path)
    assert str(error.value).startswith(str(path))
    assert "Doe" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no annotations_train\.csv and no train\.csv; expected"):
        VinDrSource(tmp_path)
    (tmp_path / "train.csv").write_text(KAGGLE)
    with pytest.raises(FileNotFoundError, match="none of the images that its tables name is there"):
        VinDrSource(tmp_path)

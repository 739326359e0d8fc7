import pickle

import numpy as np
import pytest

from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.rows import split_by_hash
from imitate_ds.data.sources.siim import SiimSource
from tests.data.test_radiographs import save_dicom

# 12 rows and 16 columns of pixels: a column is 12 numbers. "25 3 9 2": three pixels from row 1 of column 2, two below its end.
ROWS = {
    "1.2.276.14508": ["25 3 9 2", "0 1"],
    "1.2.276.1034": ["-1"],
    "1.2.276.2000": ["180 12"],
}
PATIENTS = {"1.2.276.14508": "p1", "1.2.276.1034": "p1", "1.2.276.2000": ""}


def write_tree(root, name="train-rle.csv", header="ImageId, EncodedPixels", blank=" ", folder="dicom-images-train"):
    pytest.importorskip("pydicom")
    lines = [f"{image},{blank}{cell}\n" for image, cells in ROWS.items() for cell in cells]
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(header + "\n" + "".join(lines))
    for image in ROWS:
        path = root / folder / f"{image}.1" / f"{image}.2" / f"{image}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_dicom(path, np.arange(12 * 16, dtype=np.uint8).reshape(12, 16), bits=8, PatientID=PATIENTS[image])
    return root


@pytest.mark.parametrize(
    ("name", "header", "blank", "folder"),
    [
        ("train-rle.csv", "ImageId, EncodedPixels", " ", "dicom-images-train"),
        ("train-rle.csv", "ImageId,EncodedPixels", "", "dicom-images-train"),
        ("stage_2_train.csv", "ImageId,EncodedPixels", "", "stage_2_images"),
        ("pneumothorax/train-rle.csv", "ImageId, EncodedPixels", " ", "pneumothorax/dicom-images-train"),
    ],
)
def test_reads_the_forms_people_have(tmp_path, name, header, blank, folder):
    source = open_source("siim", write_tree(tmp_path, name, header, blank, folder))
    studies = list(source)
    assert (source.name, source.has_reports, len(source)) == ("siim", False, 3)
    assert [study.study_id for study in studies] == list(ROWS)
    assert [study.labels for study in studies] == [{"pneumothorax": 1}, {"pneumothorax": 0}, {"pneumothorax": 1}]
    assert studies[0].radiographs[0].read().shape == (12, 16)


def test_masks_go_down_the_columns_and_rows_are_united(tmp_path):
    first, second, third = (study.masks["pneumothorax"] for study in SiimSource(write_tree(tmp_path)))
    expected = np.zeros((12, 16), np.uint8)
    expected[1:4, 2] = expected[1:3, 3] = expected[0, 0] = 255
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(first))(), expected)
    np.testing.assert_array_equal(second(), np.zeros((12, 16), np.uint8))
    expected = np.zeros((12, 16), np.uint8)
    expected[:, 15] = 255
    np.testing.assert_array_equal(third(), expected)


def test_the_table_of_stage_2_wins(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "stage_2_train.csv").write_text("ImageId,EncodedPixels\n1.2.276.1034,-1\n")
    assert [study.study_id for study in SiimSource(tmp_path)] == ["1.2.276.1034"]


def test_the_patient_is_that_of_the_header(tmp_path):
    studies = list(SiimSource(write_tree(tmp_path)))
    assert [study.patient_id for study in studies] == ["p1", "p1", "1.2.276.2000"]
    assert [study.split for study in studies] == [split_by_hash(s.patient_id, train=70, val=15) for s in studies]
    path = tmp_path / "mine.csv"
    path.write_text("patient,split\np1,test\n1.2.276.2000,train\n")
    assert [study.split for study in SiimSource(tmp_path, splits=str(path))] == ["test", "test", "train"]


def test_an_image_that_is_missing_or_damaged_is_left_to_the_build(tmp_path):
    write_tree(tmp_path)
    next(tmp_path.rglob("1.2.276.1034.dcm")).unlink()
    next(tmp_path.rglob("1.2.276.2000.dcm")).write_bytes(b"half")
    studies = list(SiimSource(tmp_path))
    assert [study.patient_id for study in studies] == ["p1", "1.2.276.1034", "1.2.276.2000"]
    with pytest.raises(FileNotFoundError):
        studies[1].radiographs[0].read()
    with pytest.raises(ValueError, match="damaged DICOM file"):
        studies[2].radiographs[0].read()


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("25 3 9", "EncodedPixels is a text of 6 characters: must be -1, or pairs of whole numbers, start and length"),
        ("25 3 9 Doe", "EncodedPixels is a text of 10 characters"),
        ("25 -3 9 2", "EncodedPixels is a text of 9 characters"),
        ("", "EncodedPixels is blank"),
        ("25 3 9 200", "EncodedPixels ends after 237 pixels, and the image has 16 x 12: the row is damaged"),
    ],
)
def test_a_code_that_is_malformed_or_overruns_the_image_is_refused(tmp_path, new, message):
    path = write_tree(tmp_path) / "train-rle.csv"
    path.write_text(path.read_text().replace("25 3 9 2", new))
    with pytest.raises(ValueError, match=rf"train-rle\.csv, line 2: {message}") as error:
        SiimSource(tmp_path)
    assert "Doe" not in str(error.value)
    assert "1.2.276" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no stage_2_train\.csv or train-rle\.csv; expected"):
        SiimSource(tmp_path)
    (tmp_path / "train-rle.csv").write_text("ImageId,EncodedPixels\n1.2,-1\n")
    with pytest.raises(FileNotFoundError, match=r"none of the images that train-rle\.csv names is there"):
        SiimSource(tmp_path)


def test_a_disk_that_fails_is_no_unknown_patient(tmp_path):
    """Whose image it is stands in a header that cannot be read now, and may be later."""
    path = next(write_tree(tmp_path).rglob("1.2.276.14508.dcm"))
    path.unlink()
    path.symlink_to(path)  # the system gives up on it, with an error that is not "no such file"
    with pytest.raises(OSError, match="symbolic links"):
        SiimSource(tmp_path)

import json
import pickle
import tarfile

import numpy as np
import pytest

from imitate_ds.data.radiographs import decode_radiograph
from imitate_ds.data.shards import build_shards, load_index, read_samples
from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.rows import split_by_hash
from imitate_ds.data.sources.rsna import RsnaSource
from tests.data.test_radiographs import save_dicom

LABELS = """patientId,x,y,width,height,Target
0004cfab,,,,,0
00436515,2.0,3.0,4.0,5.0,1
00436515,10.0,3.0,2.0,2.0,1
00569f44,,,,,0
"""
CLASSES = """patientId,class
0004cfab,No Lung Opacity / Not Normal
00436515,Lung Opacity
00436515,Lung Opacity
00569f44,Normal
"""


def write_tree(root):
    pytest.importorskip("pydicom")
    folder = root / "stage_2_train_images"
    folder.mkdir(exist_ok=True)
    (root / "stage_2_test_images").mkdir(exist_ok=True)
    (root / "stage_2_train_labels.csv").write_text(LABELS)
    (root / "stage_2_detailed_class_info.csv").write_text(CLASSES)
    pixels = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
    for name in ("0004cfab", "00436515", "00569f44"):
        save_dicom(folder / f"{name}.dcm", pixels, bits=8, PatientID=name)
    save_dicom(root / "stage_2_test_images" / "0000a175.dcm", pixels, bits=8)
    return root


def test_an_image_is_a_study_and_the_test_images_are_left_out(tmp_path):
    source = open_source("rsna", write_tree(tmp_path))
    assert (source.name, source.has_reports, len(source)) == ("rsna", False, 3)
    assert [study.study_id for study in source] == ["0004cfab", "00436515", "00569f44"]
    assert [study.patient_id for study in source] == ["0004cfab", "00436515", "00569f44"]
    assert [study.split for study in source] == [split_by_hash(s.patient_id, train=70, val=15) for s in source]
    assert next(iter(source)).radiographs[0].read().shape == (12, 16)


def test_labels_with_the_three_classes_where_they_are_there(tmp_path):
    _, second, third = RsnaSource(write_tree(tmp_path))
    assert second.labels == {"pneumonia": 1, "Lung Opacity": 1, "No Lung Opacity / Not Normal": 0, "Normal": 0}
    assert third.labels == {"pneumonia": 0, "Lung Opacity": 0, "No Lung Opacity / Not Normal": 0, "Normal": 1}
    (tmp_path / "stage_2_detailed_class_info.csv").unlink()
    assert [study.labels for study in RsnaSource(tmp_path)] == [{"pneumonia": 0}, {"pneumonia": 1}, {"pneumonia": 0}]


def test_boxes_and_the_mask_they_make(tmp_path):
    first, second, _ = RsnaSource(write_tree(tmp_path))
    assert first.extra == {"boxes": []}
    assert second.extra["boxes"] == [
        {"label": "pneumonia", "x": 2.0, "y": 3.0, "width": 4.0, "height": 5.0},
        {"label": "pneumonia", "x": 10.0, "y": 3.0, "width": 2.0, "height": 2.0},
    ]
    expected = np.zeros((12, 16), np.uint8)
    expected[3:8, 2:6] = expected[3:5, 10:12] = 255
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(second.masks["pneumonia"]))(), expected)
    np.testing.assert_array_equal(first.masks["pneumonia"](), np.zeros((12, 16), np.uint8))


def test_patients_of_the_nih_where_the_mappings_are_there(tmp_path):
    pairs = [("0004cfab", "00000030_001.png"), ("00436515", "00000030_002.png"), ("00569f44", "00000031_000.png")]
    path = write_tree(tmp_path) / "pneumonia-challenge-dataset-mappings_2018.json"
    path.write_text(json.dumps([{"subset_img_id": image, "img_id": nih, "orig_labels": []} for image, nih in pairs]))
    studies = list(RsnaSource(tmp_path))
    assert [study.patient_id for study in studies] == ["00000030", "00000030", "00000031"]
    assert studies[0].split == studies[1].split
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"mappings_2018\.json: must be a JSON list of objects with subset_img_id"):
        RsnaSource(tmp_path)


def test_a_split_list_of_ones_own(tmp_path):
    write_tree(tmp_path)
    path = tmp_path / "mine.csv"
    path.write_text("patient,split\n0004cfab,train\n00436515,valid\n00569f44,test\n")
    assert [study.split for study in RsnaSource(tmp_path, splits=str(path))] == ["train", "val", "test"]
    path.write_text("patient,split\n0004cfab,train\n0004cfab,test\n")
    with pytest.raises(ValueError, match="1 of 1 patients are in more than one split"):
        RsnaSource(tmp_path, splits=str(path))
    path.write_text("patient,split\n0004cfab,train\n")
    with pytest.raises(ValueError, match=r"mine\.csv: no row for 2 of 3 patients; add them"):
        RsnaSource(tmp_path, splits=str(path))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("labels", "cfab,,,,,0", "cfab,,,,,2", "line 2: Target is 2: must be 1 or 0"),
        ("labels", "2.0,3.0", "2.0,Doe", "line 3: y is a text of 3 characters: must be a number of pixels"),
        ("labels", "4.0,5.0", ",5.0", "line 3: width is blank: must be a number of pixels"),
        ("labels", "4.0,5.0", "-4.0,5.0", "line 3: a box is -4 wide and 5 high: both must be greater than 0"),
        ("labels", "Target", "target", "no column 'Target'; it has: patientId, x, y, width, height, target"),
        (
            "class_info",
            "Normal\n",
            "Healthy\n",
            "line 2: class is a text of 29 characters: must be one of Lung Opacity",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, file, old, new, message):
    (path,) = write_tree(tmp_path).glob(f"stage_2*{file}.csv")
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        RsnaSource(tmp_path)
    assert str(error.value).startswith(str(path))
    assert "Doe" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no stage_2_train_labels\.csv; expected stage_2_train_labels"):
        RsnaSource(tmp_path)
    for path in (write_tree(tmp_path) / "stage_2_train_images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of the images that its tables name is there"):
        RsnaSource(tmp_path)


def test_shards_hold_label_boxes_and_mask(tmp_path):
    source = RsnaSource(write_tree(tmp_path))
    report = build_shards(source, tmp_path / "out", image_size=16, workers=0, progress=False)
    assert report["dropped_images"] == report["dropped_studies"] == {}
    assert sum(split["samples"] for split in report["kept"].values()) == 3
    index = load_index(tmp_path / "out")
    metas = [meta for split in index.splits for _, _, meta in read_samples(index, split)]
    (positive,) = (meta for meta in metas if meta["labels"]["pneumonia"])
    # 16 x 12 pixels lie in the middle of the square, 2 rows below its top
    assert positive["extra"]["boxes"][0] == {"label": "pneumonia", "x": 2.0, "y": 5.0, "width": 4.0, "height": 5.0}
    masks = {}
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".pneumonia.mask.png")]
            masks |= {name[:16]: decode_radiograph(tar.extractfile(name).read()) for name in names}  # type: ignore[union-attr]
    assert len(masks) == 3
    (drawn,) = (mask for mask in masks.values() if mask.any())
    assert (drawn[5:10, 2:6].min(), int((drawn > 0).sum())) == (255, 24)

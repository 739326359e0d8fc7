import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.covidx import CovidxSource
from imitate_ds.data.sources.rows import split_by_hash

THREE = {
    "train_COVIDx9A.txt": [
        "3 SARS-10.1148rg.jpeg pneumonia cohen",
        "3 other patient.png normal rsna",
        "COVID-00001 a b.jpg COVID-19 fig1",
        "MIDRC-1 c.jpg positive ricord",
    ],
    "test_COVIDx9A.txt": ["4 d.png normal rsna", "5 e.png COVID-19 rsna"],
}
FILES = {"train": ("SARS-10.1148rg.jpeg", "other patient.png", "a b.jpg", "c.jpg"), "test": ("d.png", "e.png")}


def write_tree(root, lists=THREE, files=FILES, folder=""):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        (root / folder / name).write_text("\n".join(lines) + "\n")
    for split, names in files.items():
        (root / split).mkdir(exist_ok=True)
        for name in names:
            Image.fromarray(np.full((8, 8), 100, np.uint8)).save(root / split / name)
    return root


@pytest.mark.parametrize("folder", ["", "labels"])
def test_three_classes_of_which_positive_is_covid(tmp_path, folder):
    source = open_source("covidx", write_tree(tmp_path, folder=folder))
    studies = list(source)
    assert (source.name, source.has_reports, len(source)) == ("covidx", False, 6)
    assert [next(name for name, value in s.labels.items() if value) for s in studies] == [
        *("pneumonia", "normal", "COVID-19", "COVID-19", "normal", "COVID-19")
    ]
    assert all(list(s.labels) == ["normal", "pneumonia", "COVID-19"] and sum(s.labels.values()) == 1 for s in studies)
    assert [s.patient_id for s in studies[:3]] == ["cohen/3", "rsna/3", "fig1/COVID-00001"]
    assert [s.split for s in studies] == [
        *(split_by_hash(s.patient_id, train=90, val=10) for s in studies[:4]),
        *("test", "test"),
    ]
    assert all(study.radiographs[0].read().shape == (8, 8) for study in studies)


def test_two_classes_are_one_label(tmp_path):
    lists = {"train.txt": ["1 a.png positive x", "2 b.png negative x"], "test.txt": ["3 c.png negative x"]}
    source = CovidxSource(write_tree(tmp_path, lists, {"train": ("a.png", "b.png"), "test": ("c.png",)}))
    assert [study.labels for study in source] == [{"COVID-19": 1}, {"COVID-19": 0}, {"COVID-19": 0}]


def test_old_lists_without_a_source_and_new_ones_with_val(tmp_path):
    lists = {"train.txt": ["1 a.png normal"], "val.txt": ["2 b.png COVID-19 "], "test.txt": ["", "3 c.png pneumonia"]}
    files = {"train": ("a.png",), "val": ("b.png",), "test": ("c.png",)}
    source = CovidxSource(write_tree(tmp_path, lists, files))
    assert [(study.patient_id, study.split) for study in source] == [("1", "train"), ("2", "val"), ("3", "test")]
    assert [study.study_id for study in source] == ["train/a.png", "val/b.png", "test/c.png"]


def test_which_lists_where_two_versions_lie_side_by_side(tmp_path):
    other = {name.replace("9A", "9B"): ["9 d.png negative x"] for name in THREE}
    write_tree(tmp_path, THREE | other)
    with pytest.raises(
        ValueError, match=r"several lists of train: train_COVIDx9A\.txt, train_COVIDx9B\.txt; say which"
    ):
        CovidxSource(tmp_path)
    assert len(CovidxSource(tmp_path, version="9A")) == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "Jane Doe",
            r"train_COVIDx9A\.txt, line 5: is a text of 8 characters: must be: patient file class source, and",
        ),
        ("9 f.png ill cohen", r"line 5: is a text of 17 characters: must be"),
        ("9 f.png negative cohen", "line 5: class is negative: in lists that also say normal or pneumonia, which"),
        ("4 f.png normal rsna", "1 of 6 patients are in more than one split"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, line, message):
    lists = THREE | {"train_COVIDx9A.txt": [*THREE["train_COVIDx9A.txt"], line]}
    with pytest.raises(ValueError, match=message) as error:
        CovidxSource(write_tree(tmp_path, lists))
    assert "Doe" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\*\.txt; expected train/, test/"):
        CovidxSource(tmp_path)
    write_tree(tmp_path, files={})
    with pytest.raises(FileNotFoundError, match="none of the images that its tables name is there"):
        CovidxSource(tmp_path)
    (tmp_path / "test_COVIDx9A.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"test_COVIDx9A\.txt: not UTF-8 text"):
        CovidxSource(tmp_path)

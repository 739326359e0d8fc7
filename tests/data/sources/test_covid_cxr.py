"""Miniature folders of the layout; the collection itself is none of the project's, and is read only where it lies."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.shard_index import load_index
from imitate_ds.data.shards import build_shards, read_samples
from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.covid_cxr import STRUCTURES, CovidCxrSource
from imitate_ds.data.sources.rows import split_by_hash

REAL = Path(os.environ.get("IMITATE_DS_REAL_DATA", "")) / "covid_cxr"  # a folder of collections, where there is one
TABLE = """file,filename,patientid,view,finding,lung_mask,seg,n_lung_boxes,clinical_notes
images/a.jpg,a.png,5,PA,ARDS,,seg/a.png,2,"Severe, intubated."
images/b.jpg,b.jpg,17,AP Supine,"COVID-19, ARDS",lung_masks/b.png,,2,
images/c.jpg,c.jpg,17,L,todo,,,0,
images/d.jpg,d.jpg,18,?,No Finding,,seg/d.png,0,
"""
LUNGS = "file,class,x1,y1,x2,y2\nimages/a.jpg,Right Lung,1.5,1,5,10\nimages/a.jpg,Left Lung,6,1,10,10.5\n"
PATHOLOGY = "file,class,x1,y1,x2,y2,area_frac\nimages/a.jpg,Consolidation,2,2,4,5,0.05\n"


def write_tree(root):
    for folder in ("images", "lung_masks", "seg"):
        (root / folder).mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12)).astype(np.uint8)
    for name in "abcd":
        Image.fromarray(pixels).save(root / "images" / f"{name}.jpg")
    mask = np.zeros((12, 12), np.uint8)
    mask[2:6, 2:6], mask[6:8, 2:6] = 255, 127
    Image.fromarray(mask).save(root / "lung_masks" / "b.png")
    bits = np.zeros((12, 12), np.uint8)
    bits[2:6, 2:6] = 1 + 16
    bits[8:, 8:] = 128
    for name in "ad":
        Image.fromarray(bits).save(root / "seg" / f"{name}.png")
    (root / "metadata.csv").write_text(TABLE)
    (root / "lung_boxes.csv").write_text(LUNGS)
    (root / "pathology_boxes.csv").write_text(PATHOLOGY)
    return root


def test_an_image_is_a_study_and_its_findings_are_labels(tmp_path):
    source = open_source("covid-cxr", write_tree(tmp_path))
    studies = list(source)
    assert (source.name, source.has_reports, len(source)) == ("covid-cxr", False, 4)
    assert [study.labels for study in studies] == [
        {"ARDS": 1, "COVID-19": 0, "No Finding": 0},
        {"ARDS": 1, "COVID-19": 1, "No Finding": 0},
        {},
        {"ARDS": 0, "COVID-19": 0, "No Finding": 1},
    ]
    assert [s.radiographs[0].view_position for s in studies] == ["frontal", "frontal", "lateral", "unknown"]
    assert [s.split for s in studies] == [split_by_hash(s.patient_id, train=60, val=20) for s in studies]
    assert {(s.findings, s.impression) for s in studies} == {("", "")}


def test_masks_of_lungs_and_structures(tmp_path):
    first, second, third, _ = CovidCxrSource(write_tree(tmp_path))
    assert list(first.masks) == list(STRUCTURES)
    assert list(second.masks) == ["lungs"]
    assert third.masks == {}
    lungs = second.masks["lungs"]()
    assert [lungs[3, 3], lungs[7, 3], lungs[0, 0]] == [255, 127, 0]
    consolidation, pneumothorax = first.masks["consolidation"](), first.masks["pneumothorax"]()
    assert (consolidation.dtype, consolidation.sum()) == (np.uint8, 255 * 16)
    assert consolidation[2:6, 2:6].min() == pneumothorax[8:, 8:].min() == 255
    assert first.masks["effusion"]().max() == 0


def test_boxes_of_lungs_or_of_pathology(tmp_path):
    write_tree(tmp_path)
    assert [study.extra for study in CovidCxrSource(tmp_path)] == [{}] * 4
    lungs = [study.extra for study in CovidCxrSource(tmp_path, boxes="lungs")]
    assert lungs[0]["boxes"] == [
        {"label": "Right Lung", "x": 1.5, "y": 1.0, "width": 3.5, "height": 9.0},
        {"label": "Left Lung", "x": 6.0, "y": 1.0, "width": 4.0, "height": 9.5},
    ]
    assert lungs[1:] == [{}] * 3
    pathology = [study.extra for study in CovidCxrSource(tmp_path, boxes="pathology")]
    assert [box["label"] for box in pathology[0]["boxes"]] == ["Consolidation"]
    assert pathology[1:] == [{}, {}, {"boxes": []}]
    with pytest.raises(ValueError, match="boxes = 'both': must be one of lungs, pathology"):
        CovidCxrSource(tmp_path, boxes="both")


def test_shards_keep_masks_and_boxes_and_drop_what_is_not_frontal(tmp_path):
    source = CovidCxrSource(write_tree(tmp_path), boxes="lungs")
    report = build_shards(source, tmp_path / "out", image_size=32, workers=0, progress=False)
    assert report["dropped_images"] == {"view position: lateral": 1, "view position: unknown": 1}
    index = load_index(tmp_path / "out")
    metas = [meta for split in index.splits for _, _, meta in read_samples(index, split)]
    assert sorted(len(meta["extra"].get("boxes", ())) for meta in metas) == [0, 2]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metadata.csv", "patientid", "patient", "no column 'patientid'; it has: file, filename, patient"),
        ("metadata.csv", ",5,PA", ",,PA", "patientid is blank in 1 rows"),
        ("lung_boxes.csv", "1.5", "Doe", "line 2: x1 is a text of 3 characters: must be a number of pixels"),
        ("lung_boxes.csv", "images/", "", "its column file names none of the images of the table"),
        ("lung_boxes.csv", "Right Lung", "", "line 2: a box has no label: must say what it is of"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, file, old, new, message):
    path = write_tree(tmp_path) / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        CovidCxrSource(tmp_path, boxes="lungs")
    assert str(error.value).startswith(str(path))
    assert "Doe" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metadata\.csv; expected metadata\.csv, images/"):
        CovidCxrSource(tmp_path)
    (write_tree(tmp_path) / "lung_boxes.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lung_boxes\.csv: no such file"):
        CovidCxrSource(tmp_path, boxes="lungs")
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of the images that its tables name is there"):
        CovidCxrSource(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="IMITATE_DS_REAL_DATA names no folder with covid_cxr")
def test_the_collection_itself():
    """Counts that its README gives; nothing of it is kept."""
    studies = list(CovidCxrSource(REAL, boxes="pathology"))
    assert len(studies) == 340
    assert sum("lungs" in study.masks for study in studies) == 176
    boxes = [study.extra["boxes"] for study in studies if "boxes" in study.extra]
    assert (len(boxes), sum(map(len, boxes))) == (29, 70)
    study = next(study for study in studies if "lungs" in study.masks)
    assert study.masks["lungs"]().shape == study.radiographs[0].read().shape

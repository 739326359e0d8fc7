import pickle

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.openi import OpenISource

REPORTS = """uid,MeSH,Problems,image,indication,comparison,findings,impression
1,normal,normal,Xray Chest PA and Lateral,cough,None.,"The lungs are clear, XXXX.",Normal chest.
2,x,x,x,x,x,,"Two lines,
one cell."
3,x,x,x,x,x,Clear.,nan
"""
PROJECTIONS = """uid,filename,projection
1,1_IM-0001-4001.dcm.png,Frontal
1,1_IM-0001-3001.dcm.png,Lateral
2,2_IM-0652-1001.dcm.png,Frontal
"""


def write_tree(root, folder="images/images_normalized", suffix=".dcm.png"):
    (root / folder).mkdir(parents=True)
    (root / "indiana_reports.csv").write_text(REPORTS)
    (root / "indiana_projections.csv").write_text(PROJECTIONS)
    for number, stem in enumerate(("1_IM-0001-4001", "1_IM-0001-3001", "2_IM-0652-1001")):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(root / folder / f"{stem}{suffix}")
    return root


@pytest.mark.parametrize(
    ("folder", "suffix"),
    [("images/images_normalized", ".dcm.png"), ("images", ".png"), ("images", ".jpg"), ("images_normalized", ".png")],
)
def test_reads_the_layouts_people_have(tmp_path, folder, suffix):
    source = open_source("openi", write_tree(tmp_path, folder, suffix))
    studies = list(source)
    assert (source.name, source.synthetic, len(source)) == ("openi", False, 3)
    assert [study.study_id for study in studies] == [study.patient_id for study in studies] == ["1", "2", "3"]
    assert (studies[0].findings, studies[0].impression) == ("The lungs are clear, XXXX.", "Normal chest.")
    assert (studies[1].findings, studies[1].impression) == ("", "Two lines,\none cell.")
    assert (studies[2].impression, studies[2].radiographs) == ("", ())
    assert [ref.view_position for ref in studies[0].radiographs] == ["frontal", "lateral"]
    assert [int(ref.read()[0, 0]) for ref in studies[0].radiographs] == [0, 1]
    assert pickle.loads(pickle.dumps(studies[1])).radiographs[0].read()[0, 0] == 2
    assert [study.study_id for study in source] == ["1", "2", "3"]


def test_an_image_that_is_missing_fails_when_it_is_read(tmp_path):
    root = write_tree(tmp_path)
    (root / "images/images_normalized/1_IM-0001-4001.dcm.png").unlink()
    first = next(iter(OpenISource(root)))
    assert len(first.radiographs) == 2
    with pytest.raises(FileNotFoundError):
        first.radiographs[0].read()


def test_splits_come_from_the_file_or_from_the_patient(tmp_path):
    root = write_tree(tmp_path)
    drawn = [study.split for study in OpenISource(root)]
    assert drawn == [study.split for study in OpenISource(root)]
    assert set(drawn) <= {"train", "val", "test"}
    (root / "splits.csv").write_text("uid,split\n1,train\n2,validation\n3,test\n")
    assert [study.split for study in OpenISource(root)] == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("uid,split\n1,train\n1,val\n2,train\n3,train\n", "1 of 3 patients are in more than one split; give"),
        ("uid,split\n1,train\n", "no row for 2 of 3 reports"),
        ("uid,split\n1,left\n2,train\n3,train\n", "line 2: split is a text of 4 characters: must be one of train"),
        ("uid,part\n1,train\n", r"splits\.csv: no column 'split'; it has: uid, part"),
    ],
)
def test_splits_that_cannot_be_are_refused(tmp_path, splits, message):
    (write_tree(tmp_path) / "splits.csv").write_text(splits)
    with pytest.raises(ValueError, match=message):
        OpenISource(tmp_path)


def test_labels(tmp_path):
    root = write_tree(tmp_path)
    (root / "labels.csv").write_text("uid,normal,effusion\n1,1,0\n2,-1.0,\n")
    assert [study.labels for study in OpenISource(root)] == [{"normal": 1, "effusion": 0}, {"normal": -1}, {}]
    (root / "labels.csv").write_text("uid,normal\n1,yes\n")
    with pytest.raises(ValueError, match="line 2: normal is a text of 3 characters: a label must be 1, 0, -1"):
        OpenISource(root)


def test_reports_and_labels_that_come_twice_are_refused(tmp_path):
    root = write_tree(tmp_path)
    (root / "labels.csv").write_text("uid,normal\n1,1\n1,0\n2,1\n")
    with pytest.raises(ValueError, match=r"labels\.csv: 1 of 3 rows repeat a uid; leave one row of each"):
        OpenISource(root)
    (root / "indiana_reports.csv").write_text(REPORTS + "2,x,x,x,x,x,Other.,Other.\n3,x,x,x,x,x,Other.,Other.\n")
    with pytest.raises(ValueError, match=r"indiana_reports\.csv: 2 of 5 rows repeat a uid"):
        OpenISource(root)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no indiana_reports.csv; expected indiana_reports\.csv"):
        OpenISource(tmp_path)
    root = write_tree(tmp_path / "a")
    (root / "indiana_reports.csv").write_text("uid,findings\n1,x\n")
    with pytest.raises(ValueError, match=r"indiana_reports\.csv: no column 'impression'; it has: uid, findings"):
        OpenISource(root)
    root = write_tree(tmp_path / "b", suffix=".gif")
    with pytest.raises(FileNotFoundError, match="no PNG or JPEG under images/"):
        OpenISource(root)


def test_the_door_names_sources_and_options(tmp_path):
    with pytest.raises(ValueError, match="source = 'openI': must be one of openi, mimic-cxr"):
        open_source("openI", tmp_path)
    with pytest.raises(ValueError, match="source openi: needs --root"):
        open_source("openi", None)
    with pytest.raises(FileNotFoundError, match=r"--root .* does not exist"):
        open_source("openi", tmp_path / "none")
    with pytest.raises(ValueError, match="stile is not an option of source mimic-cxr; it has: reports, labels, style"):
        open_source("mimic-cxr", tmp_path, stile="tolerant")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("phantom", {"studies": "abc"}, "option studies = 'abc': must be a whole number"),
        ("phantom", {"studies": 1e3}, "option studies = 1000.0: must be a whole number"),
        ("phantom", {"seed": True}, "option seed = True: must be a whole number"),
        ("phantom", {"val_share": "much"}, "option val_share = 'much': must be a number"),
        ("mimic-cxr", {"reports": 5}, "option reports = 5: must be a text"),
        ("table", {"columns": "foo"}, "option columns = 'foo': must be a mapping of roles to columns"),
    ],
)
def test_the_door_refuses_options_of_another_type(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(name, tmp_path, **options)


def test_the_door_opens_the_phantom_without_a_root():
    source = open_source("phantom", None, studies=3, seed=1)
    assert source.synthetic
    assert len(list(source)) == 3

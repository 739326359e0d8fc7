import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.shards import build_shards
from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.rows import read_rows, split_by_hash
from imitate_ds.data.sources.table import TableSource

KERMANY = Path(os.environ.get("IMITATE_DS_REAL_DATA", "")) / "kermany960"  # a folder of collections, where there is one
DEFAULT = """image,patient,study,view,findings,impression,split,label_edema,label_mass
i/a.png,p1,s1,PA,Clear.,Normal.,train,0,
i/b.png,p1,s1,Lateral,Clear.,Normal.,train,0,1
i/c.png,p2,s1,AP,,Edema.,dev,1,-1
"""
OWN = """Image Index\tPatient ID\tText\tMass
i/a.png\tp1\tFINDINGS: Clear. IMPRESSION: Normal.\t1
i/b.png\tp1\tno section\t0
"""


def write_table(root, text, name="table.csv"):
    (root / "i").mkdir(exist_ok=True)
    for image in "abc":
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(root / "i" / f"{image}.png")
    (root / name).write_text(text)
    return root / name


def test_columns_called_as_their_roles(tmp_path):
    write_table(tmp_path, DEFAULT)
    source = TableSource(tmp_path)
    first, second = source
    assert (source.name, len(source)) == ("table", 2)
    assert (first.patient_id, first.study_id, first.split) == ("p1", "p1/s1", "train")
    assert (second.patient_id, second.study_id, second.split) == ("p2", "p2/s1", "val")
    assert (first.findings, first.impression) == ("Clear.", "Normal.")
    assert (second.findings, second.impression) == ("", "Edema.")
    assert (first.labels, second.labels) == ({"edema": 0, "mass": 1}, {"edema": 1, "mass": -1})
    assert [ref.view_position for ref in first.radiographs] == ["frontal", "lateral"]
    assert first.radiographs[1].image_id == "i/b.png"
    assert first.radiographs[1].read().shape == (8, 8)


def test_columns_of_ones_own(tmp_path):
    path = write_table(tmp_path, OWN, "mine.tsv")
    columns = {"image": "Image Index", "patient": "Patient ID", "report": "Text", "labels": ["Mass"]}
    first, second = open_source("table", path, columns=columns)
    assert (first.findings, first.impression, first.labels) == ("Clear.", "Normal.", {"Mass": 1})
    assert (second.findings, second.impression, second.labels) == ("", "", {"Mass": 0})
    assert first.study_id != second.study_id
    assert first.split == second.split == split_by_hash("p1")
    assert first.radiographs[0].view_position == "frontal"


def test_a_section_of_its_own_wins_over_the_report(tmp_path):
    text = "image,patient,report,impression\ni/a.png,p1,FINDINGS: Clear. IMPRESSION: From the report.,From the cell.\n"
    (study,) = TableSource(write_table(tmp_path, text))
    assert (study.findings, study.impression) == ("Clear.", "From the cell.")


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (DEFAULT, {"images": "image"}, "images is not a role; the roles are image, patient"),
        (DEFAULT, {"view": "ViewPosition"}, r"table\.csv: no column 'ViewPosition'; it has: image, patient"),
        (DEFAULT, {"labels": ["edema"]}, "no column 'edema'"),
        (DEFAULT, {"labels": 5}, "columns: labels = 5: must be the name of a column"),
        (DEFAULT, {"view": ["view"]}, r"columns: view = \['view'\]: must be the name of a column"),
        (DEFAULT, {5: "view"}, "columns: 5 is not a role"),
        (OWN.replace("\t", ","), {"patient": "Patient ID"}, "no column 'image'; it has: Image Index"),
        ("image,text\na,b\n", {}, "no column for patient; it has: image, text. Name it with columns="),
        ("image,patient\na,b\n", {}, "no column for findings, impression or report"),
        ("image,patient,report\n", {}, "no rows"),
        ("image,patient,report\na,b,c,d\n", {}, "line 2: 4 cells under 3 columns"),
        (DEFAULT.replace(",dev,", ",,"), {}, "line 4: split is blank: must be one of train"),
        (
            DEFAULT.replace(",p2,", ", ,").replace("i/b.png,p1", "i/b.png,nan"),
            {},
            "patient is blank in 2 rows; every row must",
        ),
        (DEFAULT.replace("i/b.png,p1,s1", "i/b.png,p2,s2"), {}, "1 of 2 patients are in more than one split"),
        (DEFAULT.replace("train,0,1", "val,0,1"), {}, "1 of 2 patients are in more than one split"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, text, columns, message):
    path = write_table(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        TableSource(path, columns)


def test_a_label_that_is_no_label_is_refused(tmp_path):
    path = write_table(tmp_path, DEFAULT.replace("dev,1", "dev,2"))
    with pytest.raises(ValueError, match=r"table\.csv, line 4: label_edema is 2: a label must be 1, 0, -1"):
        list(TableSource(path))


@pytest.mark.parametrize(
    ("cell", "shown"), [("Edema of Jane Doe", "a text of 17 characters"), ("10000032", "a number of 8 characters")]
)
def test_no_message_shows_a_cell_that_may_be_text_or_an_id(tmp_path, cell, shown):
    label = write_table(tmp_path, DEFAULT.replace("dev,1", f"dev,{cell}"))
    with pytest.raises(ValueError, match=f"line 4: label_edema is {shown}: a label must be") as label_error:
        list(TableSource(label))
    split = write_table(tmp_path, DEFAULT.replace("dev", cell))
    with pytest.raises(ValueError, match=f"line 4: split is {shown}: must be one of train") as split_error:
        list(TableSource(split))
    assert cell not in f"{label_error.value}{split_error.value}"


@pytest.mark.parametrize(
    "line",
    [
        "i/a.png,patient17,Jane Doe",
        "1,normal,Cardiomegaly",
        "10000032,50414267,train",
        "Doe,The heart is large and the lungs are,train",
        "Doe,The lungs are clear.,train",
        "Doe,2020-01-01,F",
        r"\\server\a,Doe,F",
        "x" * 61,
    ],
)
def test_a_first_line_that_is_no_header_is_not_shown(tmp_path, line):
    path = write_table(tmp_path, f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="its first line does not look like a header") as error:
        list(read_rows(path, ("uid",)))
    with pytest.raises(ValueError, match="its first line does not look like a header") as other:
        TableSource(path)
    said = str(error.value).replace(str(path), "") + str(other.value).replace(str(path), "")
    assert not any(cell in said for cell in line.split(","))


def test_a_first_line_that_repeats_itself_is_no_header(tmp_path):
    with pytest.raises(ValueError, match="its first line does not look like a header"):
        list(read_rows(write_table(tmp_path, "Doe,Doe,F\n"), ("uid",)))


def test_a_header_is_shown_up_to_forty_names(tmp_path):
    names = ["AP/PA", "No Finding", "OriginalImage[Width", "Height]", "#", "", *("x" * n for n in range(2, 42))]
    with pytest.raises(ValueError, match=r"it has: AP/PA, No Finding, OriginalImage\[Width, .* and 5 more$"):
        list(read_rows(write_table(tmp_path, ",".join(names)), ("uid",)))


def test_which_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected one CSV or TSV file, found: none"):
        TableSource(tmp_path)
    write_table(tmp_path, DEFAULT)
    write_table(tmp_path, DEFAULT, "more.csv")
    with pytest.raises(FileNotFoundError, match=r"found: more\.csv, table\.csv; give the file itself as --root"):
        TableSource(tmp_path)


def test_read_rows_takes_gz_a_byte_order_mark_and_short_rows(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress("\ufeff uid , split\n1,train\n\n2\n".encode()))
    assert list(read_rows(path)) == [{"uid": "1", "split": "train"}, {"uid": "2", "split": ""}]
    whole = path.read_bytes()
    for damaged in (whole[:30], whole[:12] + b"\xff\xff\xff" + whole[15:], b"<html>", whole[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.csv\.gz: damaged gzip file; download it again"):
            list(read_rows(path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read_rows(tmp_path / "b.csv"))
    (tmp_path / "c.csv").write_bytes(b"uid\n\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_rows(tmp_path / "c.csv"))


def test_the_hash_gives_90_5_5():
    splits = [split_by_hash(f"patient{number}") for number in range(4000)]
    shares = [splits.count(name) / 4000 for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.02)
    assert split_by_hash("patient0") == splits[0]


ANNOTATED = """image,patient,split,class,mask_lungs,mask_heart,boxes
i/a.png,p1,train,pneumonia,m/a.png,,"[{""label"": ""mass"", ""x"": 1, ""y"": 2.5, ""width"": 3, ""height"": 4}]"
i/b.png,p1,train,normal,m/b.png,m/b.png,[]
i/c.png,p2,val,,,,
"""
BOXES = "file,class,x1,y1,x2,y2\ni/a.png,Right Lung,1,2,3.5,7\ni/a.png,Left Lung,4,2,6,7\ni/b.png,,,,,\n"


def write_annotated(root, text=ANNOTATED):
    path = write_table(root, text)
    (root / "m").mkdir(exist_ok=True)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4], mask[4:6] = 255, 127
    Image.fromarray(mask).save(root / "m" / "a.png")
    Image.fromarray(np.zeros_like(mask)).save(root / "m" / "b.png")
    return path


def test_a_table_of_annotations_needs_no_text(tmp_path):
    source = TableSource(write_annotated(tmp_path))
    first, second, third = source
    assert (source.has_reports, TableSource(write_table(tmp_path, DEFAULT, "text.csv")).has_reports) == (False, True)
    assert [study.labels for study in source] == [{"normal": 0, "pneumonia": 1}, {"normal": 1, "pneumonia": 0}, {}]
    assert first.extra == {"boxes": [{"label": "mass", "x": 1.0, "y": 2.5, "width": 3.0, "height": 4.0}]}
    assert (second.extra, third.extra) == ({"boxes": []}, {})
    assert (list(first.masks), list(second.masks), list(third.masks)) == (["lungs"], ["lungs", "heart"], [])
    lungs = first.masks["lungs"]()
    assert [lungs[2, 0], lungs[4, 0], lungs[0, 0]] == [255, 127, 0]
    assert second.masks["heart"]().max() == 0


def test_annotations_in_columns_of_ones_own(tmp_path):
    text = ANNOTATED.replace("class,mask_lungs,mask_heart,boxes", "kind,lung,heart,marks")
    columns = {"class": "kind", "masks": ["lung", "heart"], "boxes": "marks"}
    first, second, _ = TableSource(write_annotated(tmp_path, text), columns)
    assert (list(first.masks), list(second.masks)) == (["lung"], ["lung", "heart"])
    assert (first.labels["pneumonia"], len(first.extra["boxes"])) == (1, 1)


def test_boxes_in_another_table(tmp_path):
    text = "image,patient,findings\ni/a.png,p1,Clear.\ni/b.png,p2,Clear.\ni/c.png,p3,Clear.\n"
    path = write_annotated(tmp_path, text)
    (tmp_path / "lung.csv").write_text(BOXES)
    first, second, third = open_source("table", path, boxes="lung.csv")
    assert [box["label"] for box in first.extra["boxes"]] == ["Right Lung", "Left Lung"]
    assert first.extra["boxes"][0] == {"label": "Right Lung", "x": 1.0, "y": 2.0, "width": 2.5, "height": 5.0}
    assert (second.extra, third.extra) == ({"boxes": []}, {})
    assert first.findings == "Clear."
    (tmp_path / "lung.csv").write_text(BOXES.replace("1,2,3.5", "x,2,3.5"))
    with pytest.raises(
        ValueError, match=r"lung\.csv, line 2: x1 is a text of 1 characters: must be a number of pixels"
    ):
        TableSource(path, boxes="lung.csv")
    (tmp_path / "lung.csv").write_text(BOXES.replace("i/", "images/"))
    with pytest.raises(ValueError, match=r"lung\.csv: its column file names none of the images of the table"):
        TableSource(path, boxes="lung.csv")
    with pytest.raises(ValueError, match=r"boxes = 'lung\.csv': .* has a column of boxes too; leave one of them out"):
        TableSource(write_annotated(tmp_path), boxes="lung.csv")


@pytest.mark.parametrize(
    ("old", "new", "columns", "message"),
    [
        ('""x"": 1', '""x"": ""Doe""', {}, "line 2: boxes, x is a text of 3 characters: must be a number of pixels"),
        ('""x"": 1, ', "", {}, "line 2: boxes is a text of 54 characters: must be a JSON list of"),
        ("[]", "[Doe", {}, "line 3: boxes is a text of 4 characters: must be a JSON list of"),
        ("[]", "[5]", {}, "line 3: boxes is a text of 3 characters: must be a JSON list of"),
        ("[]", '"[{""label"": 5, ""x"": 1, ""y"": 1, ""width"": 1, ""height"": 1}]"', {}, "must be a JSON list of"),
        ('""width"": 3', '""width"": 0', {}, "line 2: boxes: a box is 0 wide and 4 high: both must be greater than 0"),
        ("mask_heart", "mask_a.b", {}, r"mask_a\.b names a mask 'a\.b': must be a name without"),
        ("", "", {"masks": ["heart"]}, "no column 'heart'; it has: image, patient, split, class, mask_lungs"),
        ("", "", {"masks": 5}, "columns: masks = 5: must be the name of a column"),
        ("", "", {"boxes": "marks"}, "no column 'marks'"),
        ("i/b.png,p1,train", "i/b.png,p1,test", {}, "1 of 2 patients are in more than one split"),
        ("i/b.png,p1,train,normal", "i/b.png,p1,train,normal,Doe", {}, "line 3: 8 cells under 7 columns"),
    ],
)
def test_annotations_that_cannot_be_read_are_refused(tmp_path, old, new, columns, message):
    path = write_annotated(tmp_path, ANNOTATED.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        list(TableSource(path, columns))
    assert str(error.value).startswith((str(path), "columns: "))
    assert "Doe" not in str(error.value)


def test_ids_are_no_classes(tmp_path):
    rows = "".join(f"i/a.png,p{number},patient{number}\n" for number in range(101))
    with pytest.raises(ValueError, match=r"class has 101 values: a column of classes has at most 100") as error:
        TableSource(write_table(tmp_path, f"image,patient,class\n{rows}"))
    assert "patient17" not in str(error.value)


def test_a_study_with_masks_has_one_frontal_image(tmp_path):
    text = "image,patient,study,view,mask_lungs\ni/a.png,p1,s1,PA,m/a.png\ni/b.png,p1,s1,{},m/b.png\n"
    (study,) = TableSource(write_annotated(tmp_path, text.format("Lateral")))
    assert study.masks["lungs"]().max() == 255
    with pytest.raises(
        ValueError, match=r"table\.csv, line 2: one of 2 frontal images of its study: a study with masks"
    ):
        list(TableSource(write_annotated(tmp_path, text.format("AP"))))


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (np.eye(8, dtype=np.uint8), "mask has no grey level that counts"),
        (np.zeros((8, 9), np.uint8), "mask and radiograph differ in size"),
    ],
)
def test_a_mask_that_is_none_is_counted_by_the_build(tmp_path, caplog, mask, rule):
    path = write_annotated(tmp_path)
    for name in "abc":
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "i" / f"{name}.png")
    Image.fromarray(mask).save(tmp_path / "m" / "a.png")
    report = build_shards(TableSource(path), tmp_path / "out", image_size=16, workers=0, progress=False)
    assert report["dropped_images"] == {f"unreadable image: {rule}": 1}
    assert f"dropped: unreadable image: {rule}" in caplog.text
    assert report["kept"] == {"train": {"studies": 1, "samples": 1}, "val": {"studies": 1, "samples": 1}}


@pytest.mark.skipif(not KERMANY.is_dir(), reason="IMITATE_DS_REAL_DATA names no folder with kermany960")
def test_a_collection_of_classes_as_a_table():
    """Counts that its README gives; nothing of it is kept."""
    columns = {"image": "file", "patient": "patientid", "class": "label"}
    studies = list(TableSource(KERMANY / "labels.csv", columns))
    assert len(studies) == 719
    assert all(sum(study.labels.values()) == 1 and len(study.labels) == 3 for study in studies)
    assert studies[0].radiographs[0].read().ndim == 2

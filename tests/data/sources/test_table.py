import gzip

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.table import TableSource, read_rows, split_by_hash

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

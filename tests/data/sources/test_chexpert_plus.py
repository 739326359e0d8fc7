import csv
import json

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources.chexpert_plus import CheXpertPlusSource
from tests.data.test_radiographs import save_dicom

COLUMNS = (
    *("path_to_image", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order", "report"),
    *("section_findings", "section_impression", "split"),
)
ROWS = [
    ("train/patient1/study1/view1_frontal.jpg", "Frontal", "AP", "patient1", "1", "x", "Clear.", "1.Normal.", "train"),
    ("train/patient1/study1/view2_lateral.jpg", "Lateral", "", "patient1", "1", "x", "Clear.", "1.Normal.", "train"),
    ("train/patient1/study2/view1_frontal.jpg", "Frontal", "PA", "patient1", "2", "x", "", "Worse.", "train"),
    ("valid/patient9/study1/view1_frontal.jpg", "Frontal", "PA", "patient9", "1", "x", "Clear.", "", "valid"),
]


def write_table(root, rows, columns=COLUMNS):
    root.mkdir(parents=True, exist_ok=True)
    with (root / "df_chexpert_plus_240401.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_tree(root, folder="", suffix=".jpg", prefix=""):
    write_table(root, [(prefix + row[0], *row[1:]) for row in ROWS])
    for row in ROWS:
        path = (root / folder / row[0]).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(path)
    return root


@pytest.mark.parametrize(
    ("folder", "suffix", "prefix"),
    [
        ("", ".jpg", ""),
        ("PNG", ".png", ""),
        ("PNG/PNG", ".png", ""),
        ("CheXpert-v1.0", ".jpg", ""),
        ("CheXpert-v1.0-small", ".jpg", "CheXpert-v1.0/"),
        ("images", ".png", "/data/chexpert/"),
    ],
)
def test_reads_the_layouts_people_have(tmp_path, folder, suffix, prefix):
    source = CheXpertPlusSource(write_tree(tmp_path, folder, suffix, prefix))
    studies = list(source)
    assert len(source) == 3
    assert [study.study_id for study in studies] == ["patient1/study1", "patient1/study2", "patient9/study1"]
    assert [study.patient_id for study in studies] == ["patient1", "patient1", "patient9"]
    assert [study.split for study in studies] == ["train", "train", "val"]
    assert [(study.findings, study.impression) for study in studies] == [
        ("Clear.", "1.Normal."),
        ("", "Worse."),
        ("Clear.", ""),
    ]
    assert [ref.view_position for ref in studies[0].radiographs] == ["frontal", "lateral"]
    assert studies[0].radiographs[0].image_id == "train/patient1/study1/view1_frontal.jpg"
    assert all(ref.read().shape == (8, 8) for study in studies for ref in study.radiographs)
    assert [study.labels for study in studies] == [{}, {}, {}]


# All columns of the table as it is served
SERVED = (
    *(
        "path_to_image",
        "path_to_dcm",
        "frontal_lateral",
        "ap_pa",
        "deid_patient_id",
        "patient_report_date_order",
        "report",
    ),
    *("section_narrative", "section_clinical_history", "section_history", "section_comparison", "section_technique"),
    *("section_procedure_comments", "section_findings", "section_impression", "section_end_of_impression"),
    *("section_summary", "section_accession_number", "age", "sex", "race", "ethnicity", "interpreter_needed"),
    *("insurance_type", "recent_bmi", "deceased", "split"),
)


def test_the_table_as_it_is_served(tmp_path):
    """Twenty-seven columns, most cells blank, reports over many lines, a byte order mark."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    rows[0] |= {"report": 'NARRATIVE:\nCHEST, "2 views"\n\nIMPRESSION:\n1.Normal.', "age": "67.0"}
    rows[2] |= {"frontal_lateral": "", "section_findings": "nan"}
    write_tree(tmp_path)
    write_table(tmp_path, [[row.get(name, "") for name in SERVED] for row in rows], SERVED)
    path = tmp_path / "df_chexpert_plus_240401.csv"
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    studies = list(CheXpertPlusSource(tmp_path))
    assert [(s.findings, s.impression) for s in studies] == [("Clear.", "1.Normal."), ("", "Worse."), ("Clear.", "")]
    assert [image.view_position for s in studies for image in s.radiographs] == [
        *("frontal", "lateral", "unknown", "frontal")
    ]


@pytest.mark.parametrize("folder", ["DICOM", "DICOM/DICOM"])
def test_the_release_in_dicom(tmp_path, folder):
    pytest.importorskip("pydicom")
    write_table(tmp_path, ROWS)
    for row in ROWS:
        path = (tmp_path / folder / row[0]).with_suffix(".dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_dicom(path, np.arange(64, dtype=np.uint8).reshape(8, 8), bits=8)
    images = [image for study in CheXpertPlusSource(tmp_path) for image in study.radiographs]
    assert images[0].image_id == "train/patient1/study1/view1_frontal.jpg"  # as in the other releases: keys agree
    assert all(image.read().shape == (8, 8) for image in images)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("path_to_image", "", "line 4: path_to_image is blank: must end in train/patient1/study1/view1_frontal"),
        ("path_to_image", "patient17.jpg", "line 4: path_to_image is a text of 13 characters: must end in"),
        ("deid_patient_id", " ", "deid_patient_id is blank in 1 rows; every row must name its patient"),
        ("deid_patient_id", "nan", "deid_patient_id is blank in 1 rows"),
        ("split", "", "line 4: split is blank: must be one of train"),
    ],
)
def test_cells_that_must_not_be_blank(tmp_path, column, cell, message):
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    rows[2][column] = cell
    write_table(write_tree(tmp_path), [row.values() for row in rows])
    with pytest.raises(ValueError, match=message) as error:
        CheXpertPlusSource(tmp_path)
    assert "patient17" not in str(error.value)


def test_downloads_and_copies_beside_the_table_are_not_read(tmp_path):
    root = write_tree(tmp_path)
    for suffix in (".csv.gz.part", ".csv.bak"):
        (root / f"df_chexpert_plus_250101{suffix}").write_bytes(b"half")
    assert len(CheXpertPlusSource(root)) == 3


def test_labels_of_chexbert(tmp_path):
    folder = write_tree(tmp_path) / "chexbert_labels"
    folder.mkdir()
    for name, edema in (("report", -1.0), ("impression", 0.0)):
        rows = [{"path_to_image": ROWS[0][0], "Edema": edema, "Fracture": None, "No Finding": 1.0}]
        (folder / f"{name}_fixed.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert next(iter(CheXpertPlusSource(tmp_path))).labels == {"Edema": -1, "No Finding": 1}
    assert next(iter(CheXpertPlusSource(tmp_path, labels="impression"))).labels == {"Edema": 0, "No Finding": 1}
    with pytest.raises(FileNotFoundError, match=r"no findings_fixed\.json; unpack chexbert_labels\.zip"):
        CheXpertPlusSource(tmp_path, labels="findings")
    with pytest.raises(ValueError, match="labels = 'text': must be one of report, impression, findings"):
        CheXpertPlusSource(tmp_path, labels="text")
    (folder / "report_fixed.json").write_text(json.dumps({"path_to_image": ROWS[0][0], "Edema": "Jane Doe"}))
    with pytest.raises(
        ValueError, match=r"report_fixed\.json, line 1: Edema is a text of 8 characters: a label must be"
    ):
        CheXpertPlusSource(tmp_path)
    (folder / "report_fixed.json").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"report_fixed\.json, line 1: not a JSON object with path_to_image"):
        CheXpertPlusSource(tmp_path)


def test_labels_of_chexpert(tmp_path):
    root = write_tree(tmp_path, folder="CheXpert-v1.0-small")
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema\n"
    row = "CheXpert-v1.0-small/train/patient1/study1/view1_frontal.jpg,Male,60,Frontal,AP,,-1.0\n"
    (root / "CheXpert-v1.0-small" / "train.csv").write_text(header + row)
    assert [study.labels for study in CheXpertPlusSource(root)] == [{"Edema": -1}, {}, {}]


def test_a_patient_in_two_splits_is_refused(tmp_path):
    root = write_tree(tmp_path)
    write_table(root, [*ROWS[:2], (*ROWS[2][:-1], "valid"), ROWS[3]])
    with pytest.raises(ValueError, match="1 of 2 patients are in more than one split"):
        CheXpertPlusSource(root)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no df_chexpert_plus_240401\.csv; expected"):
        CheXpertPlusSource(tmp_path)
    write_table(tmp_path, ROWS)
    with pytest.raises(FileNotFoundError, match=r"none of the images in df_chexpert_plus_240401\.csv is there"):
        CheXpertPlusSource(tmp_path)
    write_table(tmp_path, [row[:-1] for row in ROWS], COLUMNS[:-1])
    with pytest.raises(ValueError, match=r"no column 'split'; it has: path_to_image, frontal_lateral"):
        CheXpertPlusSource(tmp_path)

import gzip
import zipfile

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources.mimic_cxr import MimicCxrSource

METADATA = """dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns
aaa-1,10000032,50414267,CHEST (PA AND LAT),PA,3056,2544
aaa-2,10000032,50414267,CHEST (PA AND LAT),LATERAL,3056,2544
bbb-1,10000032,53189527,CHEST (PORTABLE AP),AP,3056,2544
ccc-1,11000011,51029426,CHEST,LL,3056,2544
ccc-2,11000011,51029426,CHEST,,3056,2544
"""
SPLIT = """dicom_id,study_id,subject_id,split
aaa-1,50414267,10000032,train
aaa-2,50414267,10000032,train
bbb-1,53189527,10000032,train
ccc-1,51029426,11000011,validate
ccc-2,51029426,11000011,validate
"""
CHEXPERT = """subject_id,study_id,Atelectasis,Edema,No Finding
10000032,50414267,1.0,-1.0,
10000032,53189527,,0.0,
"""
REPORTS = {
    "p10/p10000032/s50414267": " FINAL REPORT\n FINDINGS:\n\n Clear ___.\n\n IMPRESSION:\n\n Normal.\n",
    "p10/p10000032/s53189527": " FINAL REPORT\n IMPRESSION: Normal.\n",
}


def write_file(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_tree(root, version="2.0.0", packed=True, suffix=".jpg", labels="chexpert"):
    tables = {"metadata": METADATA, "split": SPLIT, labels: CHEXPERT}
    for kind, text in tables.items():
        data = gzip.compress(text.encode()) if packed else text
        write_file(root / f"mimic-cxr-{version}-{kind}.csv{'.gz' if packed else ''}", data)
    for line in METADATA.splitlines()[1:]:
        dicom, subject, study = line.split(",")[:3]
        path = root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(path)
    return root


def write_reports(folder):
    for name, text in REPORTS.items():
        write_file(folder / f"{name}.txt", text)
    return folder


def write_zip(path, prefix="files/"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in REPORTS.items():
            archive.writestr(f"{prefix}{name}.txt", text)
    return path


def check(source):
    studies = {study.study_id: study for study in source}
    assert list(studies) == ["50414267", "53189527", "51029426"]
    assert len(source) == 3
    first, second, third = studies.values()
    assert (first.findings, first.impression) == ("Clear ___.", "Normal.")
    assert (second.findings, second.impression) == ("", "Normal.")
    assert (third.findings, third.impression) == ("", "")
    assert [study.patient_id for study in studies.values()] == ["10000032", "10000032", "11000011"]
    assert [study.split for study in studies.values()] == ["train", "train", "val"]
    assert [ref.view_position for study in studies.values() for ref in study.radiographs] == [
        *("frontal", "lateral", "frontal", "lateral", "unknown")
    ]
    assert [study.labels for study in studies.values()] == [{"Atelectasis": 1, "Edema": -1}, {"Edema": 0}, {}]
    assert third.radiographs[0].image_id == "ccc-1"
    assert third.radiographs[0].read().shape == (8, 8)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("labels", ["chexpert", "negbio"])
def test_reports_beside_the_images(tmp_path, packed, labels):
    write_reports(write_tree(tmp_path, packed=packed, labels=labels) / "files")
    check(MimicCxrSource(tmp_path))


@pytest.mark.parametrize("prefix", ["files/", "mimic-cxr-reports/files/"])
def test_reports_in_the_zip(tmp_path, prefix):
    write_zip(write_tree(tmp_path, version="2.1.0") / "mimic-cxr-reports.zip", prefix)
    check(MimicCxrSource(tmp_path))


# All columns of the table as it is served, and a study of the kinds of projection that are neither frontal nor lateral
SERVED = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning\n"
)
TEST_SET = """study_id,Airspace Opacity,Atelectasis,Edema
50414267,,1.0,0.0
51029426,1.0,,
"""


@pytest.mark.parametrize("packed", [True, False])
def test_release_2_1_calls_its_tables_2_0_0_and_adds_one_of_other_columns(tmp_path, packed):
    root = write_tree(tmp_path, version="2.0.0", packed=packed)
    (root / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text(TEST_SET)
    for kind in ("metadata", "split", "chexpert"):  # a table of somebody's own is not of the collection
        (root / f"mimic-cxr-2.1.0-my-{kind}.csv").write_text("x\n")
    for name in ("IMAGE_FILENAMES", "SHA256SUMS.txt", "LICENSE.txt", "README", "index.html"):
        (root / name).write_text("files/p10/p10000032/s50414267/aaa-1.jpg\n")
    write_reports(root / "files")
    check(MimicCxrSource(root))
    with pytest.raises(ValueError, match="labels = 'test-set-labeled': must be one of chexpert, negbio"):
        MimicCxrSource(root, labels="test-set-labeled")


def test_metadata_as_they_are_served(tmp_path):
    root = write_tree(tmp_path, packed=False)
    views = ("PA", "AP", "LATERAL", "LL", "AP LLD", "LAO", "SWIMMERS", "")
    rows = [
        f"d-{n},10000032,50414267,CHEST (PA AND LAT),{view},3056,2544,21800506,213014.531,CHEST (PA AND LAT),"
        f"postero-anterior,Erect\n" for n, view in enumerate(views)
    ]  # fmt: skip
    (root / "mimic-cxr-2.0.0-metadata.csv").write_text(SERVED + "".join(rows))
    write_reports(root / "files")
    Image.fromarray(np.full((8, 8), 1, np.uint8)).save(root / "files/p10/p10000032/s50414267/d-0.jpg")
    (study,) = MimicCxrSource(root)
    assert [image.view_position for image in study.radiographs] == [
        *("frontal", "frontal", "lateral", "lateral", "unknown", "unknown", "unknown", "unknown")
    ]
    (root / "mimic-cxr-2.0.0-metadata.csv").write_text(SERVED.replace("dicom_id", "image_id") + "".join(rows))
    with pytest.raises(
        ValueError, match=r"no column 'dicom_id'; it has: image_id, .*, PatientOrientationCodeSequence_CodeMe"
    ):
        MimicCxrSource(root)
    (root / "mimic-cxr-2.0.0-metadata.csv").write_text("".join(rows))
    with pytest.raises(
        ValueError, match=r"no column 'dicom_id', 'subject_id'.*; its first line does not look like"
    ) as error:
        MimicCxrSource(root)
    assert "10000032" not in str(error.value)


def test_reports_elsewhere(tmp_path):
    root = write_tree(tmp_path / "jpg")
    check(MimicCxrSource(root, reports=write_zip(tmp_path / "texts.zip")))
    write_reports(tmp_path / "mimic-cxr" / "files")
    check(MimicCxrSource(root, reports=tmp_path / "mimic-cxr"))
    check(MimicCxrSource(root, reports=str(tmp_path / "mimic-cxr" / "files")))


def test_resized_images_and_images_that_were_not_downloaded(tmp_path):
    write_reports(write_tree(tmp_path, suffix=".png") / "files")
    (tmp_path / "files/p10/p10000032/s50414267/aaa-1.png").unlink()
    first = next(iter(MimicCxrSource(tmp_path)))
    with pytest.raises(FileNotFoundError):
        first.radiographs[0].read()
    assert first.radiographs[1].read().shape == (8, 8)


def test_style_reaches_the_parser(tmp_path):
    write_reports(write_tree(tmp_path) / "files")
    write_file(tmp_path / "files/p11/p11000011/s51029426.txt", "No header.\n\n The lungs are clear.\n")
    assert [study.impression for study in MimicCxrSource(tmp_path)] == ["Normal.", "Normal.", ""]
    assert [study.impression for study in MimicCxrSource(tmp_path, style="mit-lcp")][2] == "The lungs are clear."


def test_without_a_split_file_the_patient_decides(tmp_path):
    write_reports(write_tree(tmp_path) / "files")
    (tmp_path / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    studies = list(MimicCxrSource(tmp_path))
    assert studies[0].split == studies[1].split


def test_a_patient_in_two_splits_is_refused_without_its_id(tmp_path):
    write_reports(write_tree(tmp_path, packed=False) / "files")
    torn = SPLIT.replace("bbb-1,53189527,10000032,train", "bbb-1,53189527,10000032,test")
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text(torn)
    with pytest.raises(ValueError, match="1 of 2 patients are in more than one split") as error:
        MimicCxrSource(tmp_path)
    assert "10000032" not in str(error.value)


@pytest.mark.parametrize("damage", ["content", "directory"])
def test_a_damaged_zip_says_so_without_naming_a_patient(tmp_path, damage):
    path = write_zip(write_tree(tmp_path) / "mimic-cxr-reports.zip")
    data = path.read_bytes()
    place = data.index(b"FINDINGS") if damage == "content" else data.rindex(b"PK\x01\x02")
    path.write_bytes(data[:place] + b"????" + data[place + 4 :])
    with pytest.raises(ValueError, match=r"reports\.zip: damaged or encrypted zip file; download it again") as error:
        list(MimicCxrSource(tmp_path))
    assert "p10" not in str(error.value)


def test_downloads_and_copies_beside_the_tables_are_not_read(tmp_path):
    write_reports(write_tree(tmp_path) / "files")
    for kind in ("metadata", "split", "chexpert"):
        for suffix in (".csv.gz.part", ".csv.bak"):
            (tmp_path / f"mimic-cxr-2.1.0-{kind}{suffix}").write_bytes(b"half")
    check(MimicCxrSource(tmp_path))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no mimic-cxr-2\.x\.0-metadata\.csv or \.csv\.gz; expected files/p10"):
        MimicCxrSource(tmp_path)
    root = write_tree(tmp_path / "jpg", packed=False)
    with pytest.raises(FileNotFoundError, match=r"no reports; expected mimic-cxr-reports\.zip or .*reports=PATH"):
        MimicCxrSource(root)
    with pytest.raises(FileNotFoundError, match=r"reports = '.*none': no reports"):
        MimicCxrSource(root, reports=tmp_path / "none")
    write_reports(root / "files")
    with pytest.raises(ValueError, match="labels = 'chexbert': must be one of chexpert, negbio"):
        MimicCxrSource(root, labels="chexbert")
    with pytest.raises(FileNotFoundError, match=r"no mimic-cxr-2\.x\.0-negbio\.csv"):
        MimicCxrSource(root, labels="negbio")
    (root / "mimic-cxr-reports.zip").write_bytes(b"PK half")
    with pytest.raises(ValueError, match="not a whole zip file"):
        MimicCxrSource(root)
    (root / "mimic-cxr-reports.zip").unlink()
    (root / "mimic-cxr-2.0.0-split.csv").write_text(SPLIT.replace("51029426", "51029427"))
    with pytest.raises(ValueError, match="no row for 1 of 3 studies"):
        MimicCxrSource(root)
    (root / "mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id,subject_id,study_id\n")
    with pytest.raises(ValueError, match=r"no column 'ViewPosition'; it has: dicom_id, subject_id, study_id"):
        MimicCxrSource(root)


def test_no_image_at_all_is_refused(tmp_path):
    write_reports(write_tree(tmp_path) / "files")
    for image in tmp_path.glob("files/**/*.jpg"):
        image.unlink()
    with pytest.raises(FileNotFoundError, match="none of the images in the metadata is there"):
        MimicCxrSource(tmp_path)

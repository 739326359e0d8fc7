"""Open-i in XML, as NLMCXR_reports and NLMCXR_png have it."""

import shutil

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.shard_index import sample_key
from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.openi import OpenISource

BOTH = "Xray Chest PA and Lateral"
# number of the report: its sections, its images. Only those of report 1 have its number twice.
REPORTS = {
    "1": ({"FINDINGS": "The lungs are clear, XXXX.", "IMPRESSION": "Normal chest."},
          [("CXR1_1_IM-0001-3001", BOTH), ("CXR1_1_IM-0001-4001", BOTH)]),
    "2": ({"FINDINGS": None, "IMPRESSION": "Borderline &lt;heart&gt;."}, [("CXR2_IM-0652-1001", "PORTABLE CHEST AP")]),
    "10": ({"COMPARISON": "None.", "FINDINGS": "nan"}, []),
    "9": ({"INDICATION": "cough", "FINDINGS": "Clear.", "IMPRESSION": "  Normal. "},
          [("CXR9_IM-2407-1001", "Chest, frontal"), ("CXR9_IM-2407-2001", "Chest, lateral view.")]),
}  # fmt: skip
IMAGES = [name for _, images in REPORTS.values() for name, _ in images]
PROJECTIONS = """uid,filename,projection
1,1_IM-0001-4001.dcm.png,Frontal
1,1_IM-0001-3001.dcm.png,Lateral
2,2_IM-0652-1001.dcm.png,Frontal
9,9_IM-2407-1001.dcm.png,Frontal
9,9_IM-2407-2001.dcm.png,Lateral
"""
SECTIONS = """uid,MeSH,Problems,image,indication,comparison,findings,impression
1,x,x,x,x,x,"The lungs are clear, XXXX.",Normal chest.
2,x,x,x,x,x,,Borderline <heart>.
9,x,x,x,x,x,Clear.,Normal.
10,x,x,x,x,x,nan,
"""


def report(number, sections, images):
    """One file, laid out as those of the library, notes and all."""
    texts = "".join(f'<AbstractText Label="{label}">{text or ""}</AbstractText>' for label, text in sections.items())
    parents = "".join(
        f'<parentImage id="{name}"><figureId>F{n}</figureId><caption>{caption}</caption><panel type="single">'
        f"<url>/hadoop/storage/radiology/extract/{name}.jpg</url><imgModality>7</imgModality></panel></parentImage>"
        for n, (name, caption) in enumerate(images, start=1)
    )
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/><uId id="CXR{number}"/>'
        f'<pmcId id="{number}"/><docSource>CXR</docSource><IUXRId id="{number}"/>'
        f'<MedlineCitation Owner="Indiana University"><Article PubModel="Electronic"><Abstract>{texts}</Abstract></Article>'
        f"</MedlineCitation><MeSH><major>normal</major><automatic>effusion</automatic></MeSH>{parents}</eCitation>\n"
    )


def write_reports(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (sections, images) in REPORTS.items():
        (folder / f"{number}.xml").write_text(report(number, sections, images), encoding="utf-8")
    return folder


def write_tree(root, reports="ecgen-radiology", images="NLMCXR_png", suffix=".png"):
    write_reports(root / reports)
    (root / images).mkdir(exist_ok=True)
    for number, name in enumerate(IMAGES):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(root / images / f"{name}{suffix}")
    return root


def facts(source):
    return [(s.patient_id, s.study_id, s.split, s.findings, s.impression, s.labels,
             sorted((i.image_id, i.view_position) for i in s.radiographs)) for s in source]  # fmt: skip


@pytest.mark.parametrize(
    ("reports", "images"),
    [
        ("ecgen-radiology", "NLMCXR_png"),
        ("ecgen-radiology", "images"),
        ("ecgen-radiology", "."),
        ("NLMCXR_reports/ecgen-radiology", "NLMCXR_png"),
        (".", "images"),
        (".", "."),
    ],
)
def test_reads_the_layouts_people_have(tmp_path, reports, images):
    (write_tree(tmp_path, reports, images) / "indiana_projections.csv").write_text(PROJECTIONS)
    source = open_source("openi", tmp_path)
    studies = list(source)
    assert (source.name, source.synthetic, len(source)) == ("openi", False, 4)
    assert [study.study_id for study in studies] == [study.patient_id for study in studies] == ["1", "2", "9", "10"]
    assert [(study.findings, study.impression) for study in studies] == [
        ("The lungs are clear, XXXX.", "Normal chest."),
        ("", "Borderline <heart>."),
        ("Clear.", "Normal."),
        ("", ""),
    ]
    assert [[(i.image_id, i.view_position) for i in study.radiographs] for study in studies] == [
        [("1_IM-0001-3001", "lateral"), ("1_IM-0001-4001", "frontal")],
        [("2_IM-0652-1001", "frontal")],
        [("9_IM-2407-1001", "frontal"), ("9_IM-2407-2001", "lateral")],
        [],
    ]
    assert [int(image.read()[0, 0]) for study in studies for image in study.radiographs] == [0, 1, 2, 3, 4]


def test_dicom_in_a_folder_for_each_report(tmp_path):
    pytest.importorskip("pydicom")
    write_reports(tmp_path / "ecgen-radiology")
    for name in IMAGES:
        plain = name.removeprefix("CXR1_" if name.startswith("CXR1_") else "CXR")
        path = tmp_path / "NLMCXR_dcm" / plain.partition("_")[0] / f"{plain}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    images = [image for study in OpenISource(tmp_path, views="caption") for image in study.radiographs]
    assert len(images) == 5
    for image in images:
        with pytest.raises(ValueError, match="damaged DICOM"):  # it was found, and it is empty
            image.read()


def test_both_forms_give_the_same_studies_and_keys(tmp_path):
    xml = write_tree(tmp_path / "xml")
    (xml / "indiana_projections.csv").write_text(PROJECTIONS)
    (tmp_path / "csv").mkdir()
    for number, name in enumerate(name for _, name, _ in csv_rows()):
        (tmp_path / "csv" / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "csv" / "images" / name)
    for root in (xml, tmp_path / "csv"):
        (root / "indiana_projections.csv").write_text(PROJECTIONS)
        (root / "labels.csv").write_text("uid,normal\n1,1\n2,0\n")
    (tmp_path / "csv" / "indiana_reports.csv").write_text(SECTIONS)
    one, other = OpenISource(xml), OpenISource(tmp_path / "csv")
    assert facts(one) == facts(other)
    keys = [{sample_key(s.name, t.study_id, i.image_id) for t in s for i in t.radiographs} for s in (one, other)]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 5


def csv_rows():
    return [line.split(",") for line in PROJECTIONS.splitlines()[1:]]


def test_csv_wins_where_both_are_there(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "indiana_projections.csv").write_text(PROJECTIONS)
    (tmp_path / "indiana_reports.csv").write_text(SECTIONS.replace("Normal chest.", "From the CSV."))
    first = next(iter(OpenISource(tmp_path)))
    assert first.impression == "From the CSV."
    assert {image.read()[0, 0] for image in first.radiographs} == {0, 1}  # its images are found as NLMCXR_png


def test_splits_may_be_called_as_either_form_calls_them(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "splits.csv").write_text("uid,split\nCXR1,train\n2,val\nCXR9,test\n10,test\n")
    assert [study.split for study in OpenISource(tmp_path, views="caption")] == ["train", "val", "test", "test"]


def test_without_projections_somebody_must_say_which_image_is_frontal(tmp_path):
    write_tree(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no indiana_projections\.csv, and reports in XML do not say which"
    ) as e:
        OpenISource(tmp_path)
    assert "--option views=caption" in str(e.value)
    with pytest.raises(ValueError, match="views = 'first': must be 'caption', or be left out"):
        OpenISource(tmp_path, views="first")
    (tmp_path / "indiana_projections.csv").write_text(PROJECTIONS)
    with pytest.raises(ValueError, match=r"views = 'caption': .*indiana_projections\.csv says which image is frontal"):
        OpenISource(tmp_path, views="caption")


def test_a_caption_counts_where_it_is_of_one_image_and_names_one_projection(tmp_path):
    source = OpenISource(write_tree(tmp_path), views="caption")
    assert [[image.view_position for image in study.radiographs] for study in source] == [
        ["unknown", "unknown"],
        ["frontal"],
        ["frontal", "lateral"],
        [],
    ]


@pytest.mark.parametrize(
    ("captions", "views"),
    [
        (["CHEST PA"], ["frontal"]),
        (["Chest, postero-anterior projection"], ["frontal"]),
        (["CHEST PA", "CHEST PA"], ["unknown", "unknown"]),  # the examination's, and the second may be lateral
        (["PA and lateral chest"], ["unknown"]),
        (["Chest 2 views"], ["unknown"]),
        (["Bilateral apical chest"], ["unknown"]),
        (["Chest lat"], ["lateral"]),
        (["", "PA"], ["unknown", "frontal"]),
    ],
)
def test_captions(tmp_path, captions, views):
    write_tree(tmp_path)
    images = [(f"CXR2_IM-0652-{n}", caption) for n, caption in enumerate(captions)]
    (tmp_path / "ecgen-radiology" / "2.xml").write_text(report("2", {"FINDINGS": "Clear."}, images))
    study = next(s for s in OpenISource(tmp_path, views="caption") if s.study_id == "2")
    assert [image.view_position for image in study.radiographs] == views


def test_an_image_without_a_projection_is_of_an_unknown_view(tmp_path):
    (write_tree(tmp_path) / "indiana_projections.csv").write_text("\n".join(PROJECTIONS.splitlines()[:2]))
    views = [[image.view_position for image in study.radiographs] for study in OpenISource(tmp_path)]
    assert views == [["unknown", "frontal"], ["unknown"], ["unknown", "unknown"], []]


def test_an_image_that_is_missing_fails_when_it_is_read(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "NLMCXR_png" / "CXR2_IM-0652-1001.png").unlink()
    study = list(OpenISource(tmp_path, views="caption"))[1]
    with pytest.raises(FileNotFoundError) as error:
        study.radiographs[0].read()
    assert "0652" not in str(error.value)


LAUGHS = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
GOOD = report("7", {"FINDINGS": "Jane Doe"}, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'<!DOCTYPE e [<!ENTITY l0 "ha">{LAUGHS}]><e>&l9;</e>', "with a DOCTYPE or an entity"),
        ('<!DOCTYPE e [<!ENTITY f SYSTEM "file:///etc/passwd">]><e>&f;</e>', "with a DOCTYPE or an entity"),
        (GOOD.replace("?>", "?><!DOCTYPE eCitation>"), "with a DOCTYPE or an entity"),
        (GOOD[:200], "not well-formed XML"),
        ("", "not well-formed XML"),
        ("<a>" * 300_000, "not well-formed XML"),
        (GOOD.replace('id="CXR7"', ""), "without a uId"),
        (GOOD.replace("<uId", "<uid"), "without a uId"),
        (GOOD.replace("Jane", "J" * 2**20), "of more than 1,048,576 bytes"),
        (GOOD.replace("CXR7", "CXR9"), "with the uId of another"),
        (GOOD.encode("utf-16"), "not UTF-8 text"),
    ],
    ids=["entities", "external entity", "doctype", "cut off", "empty", "deep", "no id", "no uId", "huge", "twice", "UTF-16"],
)  # fmt: skip
def test_files_that_are_no_report_are_counted_and_not_named(tmp_path, text, reason):
    folder = write_tree(tmp_path) / "ecgen-radiology"
    (folder / "7.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"1 of 5 reports cannot be read \(1 {reason}\); unpack NLMCXR_reports") as e:
        OpenISource(tmp_path, views="caption")
    assert "7.xml" not in str(e.value)
    assert "Jane" not in str(e.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no indiana_reports\.csv; expected .* or ecgen-radiology/\*\.xml"):
        OpenISource(tmp_path, views="caption")
    write_tree(tmp_path)
    shutil.rmtree(tmp_path / "NLMCXR_png")
    with pytest.raises(FileNotFoundError, match=r"no PNG or JPEG under images/.* or NLMCXR_png/"):
        OpenISource(tmp_path, views="caption")

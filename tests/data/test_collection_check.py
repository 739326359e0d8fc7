from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from imitate_ds.data.collection_check import check_collection, check_lines, check_table
from imitate_ds.data.shard_index import sample_key
from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.base import Study
from imitate_ds.data.sources.phantom import PhantomSource

TABLE = """image,patient,study,view,split,findings,label_edema,mask_lungs,boxes
i/a.png,p1,s1,PA,train,Clear.,0,m/a.png,"[{""label"": ""mass"", ""x"": 1, ""y"": 1, ""width"": 3, ""height"": 4}]"
i/b.png,p1,s1,LL,train,Clear.,0,,
i/c.png,p2,s1,AP,dev,,-1,m/c.png,[]
i/d.png,p3,s1,AP,dev,,1,,
"""


@pytest.fixture
def table(tmp_path):
    for name in ("i/a", "i/b", "i/c", "i/d", "m/a", "m/c"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    (tmp_path / "table.csv").write_text(TABLE)
    return tmp_path


@dataclass
class Published:
    """Studies of a source that knows what was published of it."""

    studies: list[Study]
    published: dict = field(default_factory=dict)
    name: str = "clinic"
    synthetic: bool = False
    has_reports: bool = True

    def __iter__(self):
        return iter(self.studies)

    def __len__(self):
        return len(self.studies)


def phantoms(count: int) -> list[Study]:
    """All in train but for the last, which is in val."""
    source = PhantomSource(count)
    return [replace(source.study(i), split="val" if i == count - 1 else "train") for i in range(count)]


def test_counts_of_every_split(table):
    check = check_collection(open_source("table", table))
    assert list(check.splits) == ["train", "val"]
    assert check.splits["train"].rows() == {
        "studies": "1",
        "patients": "1",
        "radiographs": "2",
        "frontal radiographs": "1",
        "studies with text": "1",
        "boxes of mass": "1",
        "studies annotated with boxes": "1",
        "studies with mask lungs": "1",
        "label edema": "0 / 1 / 0",
    }
    val = check.splits["val"].rows()
    assert (val["studies"], val["studies with text"], val["label edema"]) == ("2", "0", "1 / 0 / 1")
    assert (val["studies annotated with boxes"], val["studies with mask lungs"]) == ("1", "1")
    assert check.is_whole
    assert check_lines(check) == ["table: whole"]
    console = Console(width=120)
    with console.capture() as shown:
        console.print(check_table(check))
    assert "p1" not in shown.get()


def test_missing_files_are_named_by_key_unless_asked(table):
    (table / "i" / "b.png").unlink()
    (table / "i" / "d.png").write_bytes(b"")  # what a download that broke off leaves
    (table / "m" / "c.png").unlink()
    check = check_collection(open_source("table", table))
    assert not check.is_whole
    keys = [sample_key("table", study, image) for study, image in (("p1/s1", "i/b.png"), ("p2/s1", "i/c.png"))]
    train, val, hint, verdict = check_lines(check)
    assert train == f"train: 1 files that its tables name are not there, or empty: {keys[0]}"
    assert val.startswith(f"val: 2 files that its tables name are not there, or empty: {keys[1]}, ")
    assert "--show-names prints paths" in hint
    assert verdict == "table: something is missing or wrong"
    assert not any(name in line for line in check_lines(check) for name in (".png", "p1", "p2", str(table)))
    assert check_lines(check, show_names=True)[0].endswith(str(table / "i" / "b.png"))


def test_only_the_first_of_many_are_named(table):
    rows = [f"i/{number}.png,q{number},s1,AP,train,,,,\n" for number in range(8)]
    (table / "table.csv").write_text(TABLE + "".join(rows))
    line = check_lines(check_collection(open_source("table", table)))[0]
    assert line.startswith("train: 8 files")
    assert line.endswith(" and 3 more")
    assert line.count(",") == 5


@pytest.mark.parametrize(
    ("published", "lines", "whole"),
    [
        (
            {"train": {"radiographs": 3, "patients": 3}},
            ["3 radiographs, 3 published: the same", "3 patients, 3 p"],
            True,
        ),
        ({"train + val": {"radiographs": 5}}, ["train + val: 4 radiographs, 5 published: 1 fewer"], False),
        ({"all": {"radiographs": 3}}, ["all: 4 radiographs, 3 published: 1 more"], True),
        ({"test": {"radiographs": 668}}, ["test: not here; 668 radiographs published"], True),
    ],
)
def test_what_was_published_stands_beside(published, lines, whole):
    check = check_collection(Published(phantoms(4), published))
    said = check_lines(check)
    for line, expected in zip(said, lines, strict=False):
        assert expected in line
    assert check.is_whole == whole


def test_boxes_that_were_not_downloaded_are_not_missed():
    studies = [replace(study, extra={}) for study in phantoms(4)]
    published = {"all": {"radiographs": 4, "boxes": 984}}
    assert check_lines(check_collection(Published(studies, published))) == [
        "all: 4 radiographs, 4 published: the same",
        "clinic: whole",
    ]
    studies[0] = replace(studies[0], extra={"boxes": [{"label": "mass", "x": 1, "y": 1, "width": 1, "height": 1}]})
    assert "all: 1 boxes, 984 published: 983 fewer" in check_lines(check_collection(Published(studies, published)))


def test_a_patient_in_two_splits_is_counted():
    studies = [Study("p", f"s{split}", split, "Clear.", "", ()) for split in ("train", "test")]
    check = check_collection(Published(studies))
    assert not check.is_whole
    assert check_lines(check)[0] == "1 patients are in more than one split"


def test_phantoms_have_no_files():
    check = check_collection(PhantomSource(3, val_share=0.0))
    assert check.is_whole
    assert check.splits["train"].masks

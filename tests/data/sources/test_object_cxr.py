import numpy as np
import pytest
from PIL import Image

from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.object_cxr import ObjectCxrSource

TABLES = {
    "train": "image_name,annotation\n00001.jpg,0 1 2 5 6;1 7 8 9 11;2 3 9 1 4 6 5\n00002.jpg,\n",
    "dev": "image_name,annotation\n00003.jpg,0 1.5 2 5 6;\n",
    "test": "image_path,annotation\n/data/test/00004.jpg,\n",
}


def write_tree(root, tables=TABLES):
    for folder, text in tables.items():
        (root / f"{folder}.csv").write_text(text)
        (root / folder).mkdir(exist_ok=True)
        for number in range(1, 5):
            if f"0000{number}.jpg" in text:
                Image.fromarray(np.full((12, 12), 100, np.uint8)).save(root / folder / f"0000{number}.jpg")
    return root


def test_every_shape_is_its_hull(tmp_path):
    source = open_source("object-cxr", write_tree(tmp_path))
    first, second, third, fourth = source
    assert (source.name, source.has_reports, len(source)) == ("object-cxr", False, 4)
    assert [study.split for study in source] == ["train", "train", "val", "test"]
    assert [study.study_id for study in source][-1] == "test/00004.jpg"
    assert first.extra["boxes"] == [
        {"label": "foreign object", "x": 1.0, "y": 2.0, "width": 4.0, "height": 4.0},
        {"label": "foreign object", "x": 7.0, "y": 8.0, "width": 2.0, "height": 3.0},
        {"label": "foreign object", "x": 1.0, "y": 4.0, "width": 5.0, "height": 5.0},
    ]
    assert second.extra == fourth.extra == {"boxes": []}
    assert third.extra["boxes"] == [{"label": "foreign object", "x": 1.5, "y": 2.0, "width": 3.5, "height": 4.0}]
    assert [study.labels for study in source] == [{"foreign object": value} for value in (1, 0, 1, 0)]
    assert fourth.radiographs[0].read().shape == (12, 12)


def test_the_test_set_came_later(tmp_path):
    source = ObjectCxrSource(write_tree(tmp_path, {name: TABLES[name] for name in ("train", "dev")}))
    assert [study.split for study in source] == ["train", "train", "val"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            "3 1 2 5 6",
            "has a shape of kind 3 with 4 numbers: must be 0 or 1 and x1 y1 x2 y2, or 2 and x y of three points",
        ),
        ("0 1 2 5", "has a shape of kind 0 with 3 numbers"),
        ("2 1 2 5 6", "has a shape of kind 2 with 4 numbers"),
        ("2 1 2 5 6 7 8 9", "has a shape of kind 2 with 7 numbers"),
        ("0 1 2 5 Doe", "annotation is a text of 3 characters: must be a number of pixels"),
        ("0 1 2 nan 6", "annotation is nan: must be a number of pixels"),
        ("0 1 2 1 6", "a box is 0 wide and 4 high: both must be greater than 0"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, shape, message):
    path = write_tree(tmp_path) / "train.csv"
    path.write_text(path.read_text().replace("0 1 2 5 6", shape))
    with pytest.raises(
        ValueError, match=rf"train\.csv, line 2: annotation.*{message.removeprefix('annotation')}"
    ) as error:
        ObjectCxrSource(tmp_path)
    assert "Doe" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\.csv; expected train\.csv, dev\.csv"):
        ObjectCxrSource(tmp_path)
    write_tree(tmp_path, TABLES | {"dev": TABLES["dev"].replace("image_name", "image")})
    with pytest.raises(ValueError, match=r"dev\.csv: no column 'image_name'; it has: image, annotation"):
        ObjectCxrSource(tmp_path)
    write_tree(tmp_path)
    for path in tmp_path.glob("*/*.jpg"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of the images that its tables name is there"):
        ObjectCxrSource(tmp_path)

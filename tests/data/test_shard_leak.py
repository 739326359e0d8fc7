import csv
import io
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from rich.console import Console

from imitate_ds.data import shard_leak
from imitate_ds.data.shard_index import ShardIndex, load_index, sample_key
from imitate_ds.data.shard_leak import (
    KINDS,
    MAX_DISTANCE,
    MIN_CORRELATION_PHANTOM,
    MIN_REPORT_WORDS,
    LeakReport,
    alike,
    check_leak,
    comparable_id,
    leak_table,
    perceptual_hash,
    save_leaks,
    thumbnail,
)
from imitate_ds.data.shards import build_shards
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.phantom import PhantomSource

SIZE = 96  # pixels of the stored squares
PHANTOMS = PhantomSource(60, seed=5, size=SIZE)
LONG = " ".join(f"word{i}" for i in range(MIN_REPORT_WORDS))


@dataclass
class Collection:
    """Studies under the name of a source."""

    studies: list[Study]
    name: str = "clinic"
    synthetic: bool = True
    has_reports: bool = True

    def __iter__(self) -> Iterator[Study]:
        return iter(self.studies)

    def __len__(self) -> int:
        return len(self.studies)


def phantom(number: int, **changes) -> Study:
    """A phantom that shares nothing with the others, but for what changes say."""
    alone = {"patient_id": f"p{number}", "study_id": f"s{number}", "split": "train", "masks": {}, "extra": {}}
    texts = {"findings": f"Nothing but number {number}.", "impression": ""}
    return replace(PHANTOMS.study(number), **{**alone, **texts, **changes})


def build(
    studies: list[Study], folder: Path, *, name: str = "clinic", image_size: int = SIZE, synthetic: bool = True
) -> ShardIndex:
    source = Collection(studies, name, synthetic)
    build_shards(source, folder, image_size=image_size, workers=0, samples_per_shard=4, progress=False)
    return load_index(folder)


def shared(a, b, **arguments) -> LeakReport:
    return check_leak(a, b, progress=False, **arguments)


def found(report: LeakReport) -> dict[str, int]:
    return {kind: count for kind, count in report.counts.items() if count}


def key_of(study: Study, name: str = "clinic") -> str:
    return sample_key(name, study.study_id, study.radiographs[0].image_id)


def image_of(number: int, change: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels) -> tuple:
    """The radiograph of a phantom as another collection has it."""
    read = PHANTOMS.study(number).radiographs[0].read
    return (RadiographRef(f"image{number}", "frontal", lambda: change(read())),)


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def recompressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def cropped(pixels: np.ndarray, share: float) -> np.ndarray:
    cut = round(len(pixels) * share)
    return pixels[cut:-cut, cut:-cut]


def scanned(pixels: np.ndarray) -> np.ndarray:
    """Another size, another JPEG quality, more light, and a black frame around it."""
    brighter = recompressed(resized(pixels, 80), 70).astype(np.float32) * 1.1
    return np.pad(brighter.clip(0, 255).astype(np.uint8), ((0, 0), (12, 12)))


def printed(report: LeakReport) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(leak_table(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return build([phantom(i) for i in range(10)], tmp_path_factory.mktemp("ten") / "shards")


def test_a_copy_of_a_folder_shares_every_patient_study_and_image(ten, tmp_path):
    shutil.copytree(ten.root, tmp_path / "copy")
    report = shared(ten, load_index(tmp_path / "copy"))
    assert found(report) == {"patient": 10, "study": 10, "image": 10}
    assert all(leak.a == leak.b for leak in report.leaks)
    assert (report.leaking, report.samples_a, report.samples_b) == (10, 10, 10)
    assert report.common_wording == 10
    assert report.same_source


def test_each_kind_is_found_by_itself(ten, tmp_path):
    report_of_3 = phantom(33, findings=LONG)
    studies = [
        phantom(30, patient_id="p2"),
        phantom(31, study_id="s4"),
        phantom(32, radiographs=image_of(6)),
        report_of_3,
        phantom(34),
    ]
    seen = build([*(phantom(i) for i in range(7)), phantom(7, findings=LONG)], tmp_path / "a")
    report = shared(seen, build(studies, tmp_path / "b"))
    assert {leak.kind: (leak.a, leak.b) for leak in report.leaks} == {
        "patient": (key_of(phantom(2)), key_of(studies[0])),
        "study": (key_of(phantom(4)), key_of(studies[1])),
        "image": (key_of(phantom(6)), key_of(studies[2])),
        "report": (key_of(phantom(7)), key_of(report_of_3)),
    }
    assert (report.leaking, report.samples_b) == (4, 5)


@pytest.mark.parametrize(
    "change",
    [
        partial(recompressed, quality=50),
        partial(resized, size=48),
        partial(resized, size=192),
        partial(cropped, share=0.02),
        lambda pixels: (pixels * 0.7).astype(np.uint8),
        lambda pixels: np.ascontiguousarray(np.repeat(pixels, 2, axis=0)),
        scanned,
    ],
    ids=["recompressed", "half the size", "twice the size", "cropped", "darker", "twice as high", "scanned"],
)
def test_a_changed_copy_is_a_near_image(ten, tmp_path, change):
    # Stored smaller than in A besides.
    copies = [phantom(40 + i, radiographs=image_of(i, change)) for i in range(4)]
    report = shared(ten, build(copies, tmp_path / "b", image_size=80))
    assert found(report) == {"near image": 4}
    assert [(leak.a, leak.b) for leak in sorted(report.leaks, key=lambda leak: leak.b)] == sorted(
        ((key_of(phantom(i)), key_of(copies[i])) for i in range(4)), key=lambda pair: pair[1]
    )
    assert all(0 <= leak.distance <= MAX_DISTANCE for leak in report.leaks)


def test_phantoms_must_be_more_alike_than_real_radiographs(tmp_path):
    equalized = image_of(8, lambda pixels: np.asarray(ImageOps.equalize(Image.fromarray(pixels))))
    for synthetic, expected in ((False, {"near image": 1}), (True, {})):
        a = build([phantom(8), phantom(9)], tmp_path / f"a{synthetic}", synthetic=synthetic)
        b = build([phantom(20, radiographs=equalized)], tmp_path / f"b{synthetic}", synthetic=synthetic)
        assert found(shared(a, b)) == expected


def test_of_several_near_images_the_most_alike_is_named(tmp_path):
    # In a split other than train the order is the collection's. All three have one perceptual hash.
    rough, fine = (partial(recompressed, quality=quality) for quality in (15, 80))
    copies = [phantom(i, split="val", radiographs=image_of(6, change)) for i, change in enumerate((rough, fine, rough))]
    a = build(copies, tmp_path / "a")
    b = build([phantom(20, radiographs=image_of(6))], tmp_path / "b")
    assert [(leak.a, leak.distance) for leak in shared(a, b).leaks] == [(key_of(copies[1]), 0)]


def test_only_the_nearest_candidates_are_looked_at(ten, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_leak, "MAX_CANDIDATES", 1)
    copies = [phantom(40 + i, radiographs=image_of(i, scanned)) for i in range(10)]
    report = shared(ten, build(copies, tmp_path / "b"), max_distance=20)
    assert {(leak.a, leak.b) for leak in report.leaks} == {(key_of(phantom(i)), key_of(copies[i])) for i in range(10)}


def test_a_smaller_max_distance_looks_at_fewer_images(ten, tmp_path):
    copies = [phantom(40 + i, radiographs=image_of(i, partial(cropped, share=0.02))) for i in range(4)]
    b = build(copies, tmp_path / "b")
    distances = [leak.distance for leak in shared(ten, b).leaks]
    assert max(distances) > 0
    assert len(shared(ten, b, max_distance=max(distances) - 1).leaks) < len(distances)


def test_different_phantoms_share_nothing(tmp_path):
    folders = (tmp_path / "a", tmp_path / "b")
    for seed, folder in enumerate(folders):
        source = PhantomSource(150, seed=seed, size=64)
        build_shards(source, folder, image_size=64, workers=0, progress=False)
    report = shared(*(load_index(folder) for folder in folders))
    assert report.leaks == ()
    assert (report.leaking, report.samples_a, report.samples_b) == (0, 150, 150)


def test_no_two_phantoms_are_as_alike_as_copies():
    thumbs = np.stack([thumbnail(PHANTOMS.study(i).radiographs[0].read()) for i in range(40)])
    for i in range(40):
        likeness = alike(thumbs[i], thumbs)
        assert likeness[i] == pytest.approx(1, abs=1e-5)
        others = [j for j in range(40) if PHANTOMS.study(j).patient_id != PHANTOMS.study(i).patient_id]
        assert likeness[others].max() < MIN_CORRELATION_PHANTOM


def test_a_radiograph_is_compared_with_many_others_as_with_each():
    thumbs = np.stack([thumbnail(PHANTOMS.study(i).radiographs[0].read()) for i in range(5)])
    many = alike(thumbs[0], np.tile(thumbs, (120, 1, 1)))
    np.testing.assert_allclose(
        many, np.tile([alike(thumbs[0], thumbs[i : i + 1])[0] for i in range(5)], 120), atol=1e-5
    )


def test_the_perceptual_hash_tells_light_from_shape():
    first, second = (PHANTOMS.study(i).radiographs[0].read() for i in (0, 1))
    hashes = [perceptual_hash(thumbnail(p)) for p in (first, (first * 0.7).astype(np.uint8), second)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 2
    assert (hashes[0] ^ hashes[2]).bit_count() > 2
    assert all(0 <= value < 2**64 for value in hashes)


def test_a_short_report_is_common_wording_and_a_long_one_a_leak(tmp_path):
    words = LONG.split()
    short = " ".join(words[1:])
    a = build([phantom(0, findings=short), phantom(1, findings=LONG), phantom(2, findings="")], tmp_path / "a")
    retold = {"findings": " ".join(words[:30]).upper() + ",\n", "impression": "  ".join(words[30:]) + "."}
    b = build(
        [phantom(10, findings=short), phantom(11, **retold), phantom(12, findings=LONG + " more")], tmp_path / "b"
    )
    report = shared(a, b)
    assert [(leak.kind, leak.b) for leak in report.leaks] == [("report", key_of(phantom(11)))]
    assert report.common_wording == 1


def test_an_absent_report_is_nobody_elses(tmp_path):
    # A study without text is not built; of this one no word is left.
    a = build([phantom(0, findings="...!")], tmp_path / "a")
    b = build([phantom(1, findings="?!?")], tmp_path / "b")
    assert shared(a, b) == LeakReport(1, 1, (), True, 0, 0, 0, 0)


def test_short_ids_mean_nothing_in_another_source(tmp_path):
    ours = [phantom(0, patient_id="17"), phantom(1, patient_id="p10000032"), phantom(2, study_id="S-500 142 67")]
    theirs = [phantom(10, patient_id="17"), phantom(11, patient_id="10000032"), phantom(12, study_id="s50014267")]
    a, b = build(ours, tmp_path / "a", name="one"), build(theirs, tmp_path / "b", name="other")
    report = shared(a, b)
    assert found(report) == {"patient": 1, "study": 1}
    assert {leak.b for leak in report.leaks} == {key_of(study, "other") for study in theirs[1:]}
    assert not report.same_source
    assert report.short_ids == 1


def test_short_ids_are_the_same_person_within_one_collection_but_not_within_any_two_tables(tmp_path):
    ours, theirs = [phantom(0, patient_id="17")], [phantom(10, patient_id="17")]
    for name, expected, short in (("openi", {"patient": 1}, 0), ("table", {}, 1)):
        a, b = (build(s, tmp_path / f"{name}{i}", name=name) for i, s in enumerate((ours, theirs)))
        report = shared(a, b)
        assert (found(report), report.short_ids, report.same_source) == (expected, short, name == "openi")


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("17", ("17", False)),
        ("000017", ("000017", False)),
        ("patient00017", ("patient00017", False)),
        ("", ("", False)),
        ("p10000032", ("10000032", True)),
        ("10000032", ("10000032", True)),
        ("Patient-64541/Study_10", ("patient64541study10", True)),
    ],
)
def test_an_id_tells_something_with_six_digits(identifier, expected):
    assert comparable_id(identifier) == expected


def test_many_images_of_one_patient_give_one_row_each(tmp_path):
    ours = [phantom(i, patient_id="p") for i in range(6)]
    theirs = [phantom(10 + i, patient_id="p") for i in range(5)]
    a = build(ours, tmp_path / "a")
    report = shared(a, build(theirs, tmp_path / "b"))
    first = next(member.key for shard in a.shards for member in shard.members)
    assert found(report) == {"patient": 5}
    assert {leak.a for leak in report.leaks} == {first}
    assert {leak.b for leak in report.leaks} == {key_of(study) for study in theirs}


def test_two_splits_of_one_folder_are_compared(tmp_path):
    studies = [phantom(i, split="val" if i > 4 else "train") for i in range(8)]
    studies.append(phantom(20, split="val", radiographs=image_of(1)))
    index = build(studies, tmp_path / "a")
    report = shared(index, index, split_a="train", split_b="val")
    assert (report.samples_a, report.samples_b) == (5, 4)
    assert [(leak.kind, leak.a, leak.b) for leak in report.leaks] == [
        ("image", key_of(phantom(1)), key_of(studies[-1]))
    ]


def test_only_the_named_splits_are_read(ten, tmp_path):
    studies = [phantom(0, split="val"), phantom(20)]
    b = build(studies, tmp_path / "b")
    assert shared(ten, b).leaking == 1
    assert shared(ten, b, split_b="val").samples_b == 1
    assert shared(ten, b, split_b="train").leaks == ()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "are one folder"),
        ({"split_a": "train"}, "are one folder"),
        ({"split_b": "train"}, "name two different splits"),
        ({"split_a": "train", "split_b": "train"}, "it has: train"),
        ({"split_a": "train", "split_b": "vall"}, "has no such split; it has: train"),
        ({"split_a": "train", "split_b": "val", "max_distance": -1}, "max_distance = -1: must be 0 to 20"),
        ({"split_a": "train", "split_b": "val", "max_distance": 21}, "max_distance = 21"),
    ],
)
def test_a_folder_is_not_compared_with_itself_and_settings_are_checked(ten, arguments, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        shared(ten, ten, **arguments)


def test_nothing_of_ids_or_text_is_told(tmp_path):
    secret = {"patient_id": "Nobody123456", "study_id": "visit7654321", "findings": LONG + " unmistakable"}
    a = build([phantom(0, **secret), phantom(1)], tmp_path / "a", name="one")
    b = build([phantom(0, **secret), phantom(11)], tmp_path / "b", name="other")
    report = shared(a, b)
    assert found(report) == {"patient": 1, "study": 1, "image": 1, "report": 1}
    save_leaks(report, tmp_path / "leaks.csv")
    for told in (repr(report), printed(report), (tmp_path / "leaks.csv").read_text()):
        assert not re.search("nobody|123456|visit|654321|word1|unmistakable", told, re.IGNORECASE)


def test_the_csv_holds_one_pair_of_keys_a_row(ten, tmp_path):
    copy = phantom(20, patient_id="p3", radiographs=image_of(5, partial(recompressed, quality=40)))
    report = shared(ten, build([copy], tmp_path / "b"))
    save_leaks(report, tmp_path / "new" / "leaks.csv")
    rows = list(csv.DictReader((tmp_path / "new" / "leaks.csv").open()))
    near = next(leak for leak in report.leaks if leak.kind == "near image")
    assert rows == [
        {"kind": "patient", "key_a": key_of(phantom(3)), "key_b": key_of(copy), "distance": "0"},
        {"kind": "near image", "key_a": key_of(phantom(5)), "key_b": key_of(copy), "distance": str(near.distance)},
    ]


def test_the_table_has_a_row_for_each_kind(ten, tmp_path):
    report = shared(ten, build([phantom(0), phantom(20)], tmp_path / "b"))
    table = printed(report)
    assert all(kind in table for kind in KINDS)
    assert re.search(r"same patient\W+1\W+50\.00%\W+" + key_of(phantom(0)), table)
    assert re.search(r"any of these\W+1\W+50\.00%", table)
    assert re.search(r"near image\W+0\W+0\.00%", table)


def overwrite(index, which: str, data: bytes) -> str:
    """Write data over the start of the first sample's image or meta, and return its key."""
    shard = index.shards[0]
    member = shard.members[0]
    with (index.root / shard.name).open("r+b") as file:
        file.seek(getattr(member, f"{which}_offset"))
        file.write(data)
    return member.key


def test_a_damaged_radiograph_is_counted_and_named_by_its_key(ten, tmp_path, caplog):
    shutil.copytree(ten.root, tmp_path / "b")
    b = load_index(tmp_path / "b")
    key = overwrite(b, "image", b"no JPEG at all")
    report = shared(ten, b)
    assert found(report) == {"patient": 10, "study": 10, "image": 9}
    assert (report.damaged_a, report.damaged_b) == (0, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"sample {key}: its radiograph cannot be compared: checksum differs from the index"
    ]


def test_images_after_a_damaged_one_keep_their_keys(ten, tmp_path):
    shutil.copytree(ten.root, tmp_path / "a")
    a = load_index(tmp_path / "a")
    damaged = overwrite(a, "image", b"no JPEG at all")
    copies = [phantom(40 + i, radiographs=image_of(i, scanned)) for i in range(10)]
    report = shared(a, build(copies, tmp_path / "b"))
    expected = {(key_of(phantom(i)), key_of(copies[i])) for i in range(10) if key_of(phantom(i)) != damaged}
    assert {(leak.a, leak.b) for leak in report.leaks} == expected
    assert (report.damaged_a, report.damaged_b) == (1, 0)


def test_a_grey_square_has_no_thumbnail():
    with pytest.raises(ValueError, match="one pixel value"):
        thumbnail(np.full((64, 64), 7, np.uint8))


def test_damaged_json_is_refused_without_showing_it(ten, tmp_path):
    shutil.copytree(ten.root, tmp_path / "b")
    b = load_index(tmp_path / "b")
    overwrite(b, "meta", b"secret!")
    with pytest.raises(ValueError, match=r"train-000000\.tar: the JSON of a sample is damaged; see") as error:
        shared(ten, b)
    assert "secret" not in str(error.value)

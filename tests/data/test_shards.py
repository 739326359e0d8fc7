import errno
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from imitate_ds.data import shards
from imitate_ds.data.member_table import MEMBERS, map_table, table_bytes, table_of
from imitate_ds.data.radiographs import decode_radiograph, load_radiograph
from imitate_ds.data.shard_index import (
    BUILDING,
    INDEX,
    file_sha256,
    group_hash,
    load_index,
    load_report,
    read_samples,
    read_shard,
)
from imitate_ds.data.shard_recipe import load_recipe
from imitate_ds.data.shard_sample import encode_sample
from imitate_ds.data.shard_stats import report_table, samples_picture, shard_stats, stats_table
from imitate_ds.data.shards import build_shards, merge_parts, sample_key, verify_shards
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.phantom import PhantomSource
from imitate_ds.data.square import prepare_radiograph

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Clinic:
    """A small collection of PNG files on disk."""

    studies: list[Study]
    name: str = "clinic"
    synthetic: bool = False
    has_reports: bool = True

    def __iter__(self) -> Iterator[Study]:
        return iter(self.studies)

    def __len__(self) -> int:
        return len(self.studies)


def read_or_die(path: Path) -> np.ndarray:
    if path.with_suffix(".deadly").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return load_radiograph(path)


def radiograph(folder: Path, name: str, view: str = "frontal", shape: tuple[int, int] = (40, 48)) -> RadiographRef:
    path = folder / f"{name}.png"
    pixels = np.random.default_rng(len(name)).integers(0, 255, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return RadiographRef(name, view, functools.partial(read_or_die, path))


def clinic(folder: Path, count: int = 12) -> Clinic:
    """Studies S0, S1, ...; one in four is in val, one in three has no findings, every study its own patient."""
    folder.mkdir(exist_ok=True)
    return Clinic(
        [
            Study(
                patient_id=f"PATIENT{i}",
                study_id=f"S{i}",
                split="val" if i % 4 == 3 else "train",
                findings="" if i % 3 == 0 else f"Findings number {i}.",
                impression=f"Impression number {i}.",
                radiographs=(radiograph(folder, f"image{i}"),),
                labels={"normal": i % 2},
            )
            for i in range(count)
        ]
    )


def build(source, out: Path, **options) -> dict:
    return build_shards(
        source, out, **{"image_size": 32, "workers": 0, "samples_per_shard": 4, "progress": False, **options}
    )


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "shards"
    build(PhantomSource(40, size=64), out, image_size=64, samples_per_shard=16)
    return out


def test_every_sample_is_where_the_index_says(tmp_path):
    source = clinic(tmp_path / "files")
    build(source, tmp_path / "out")
    index = load_index(tmp_path / "out")
    by_key = {sample_key("clinic", s.study_id, s.radiographs[0].image_id): s for s in source}
    found = {m.key: (m, image, meta) for split in index.splits for m, image, meta in read_samples(index, split)}
    assert found.keys() == by_key.keys()
    for key, (member, image, meta) in found.items():
        study = by_key[key]
        assert (meta["study_id"], meta["findings"], meta["impression"]) == (
            study.study_id,
            study.findings,
            study.impression,
        )
        assert (member.study, member.patient) == (
            group_hash("clinic", study.study_id),
            group_hash("clinic", study.patient_id),
        )
        expected = prepare_radiograph(study.radiographs[0].read(), 32)
        assert np.abs(decode_radiograph(image).astype(int) - expected).mean() < 3  # JPEG at quality 95
        assert meta["labels"] == study.labels
        assert meta["synthetic"] is False
    assert index.labels == ("normal",)


def test_webdataset_reads_the_tars(phantoms):
    shard = load_index(phantoms).of_split("train")[0]
    samples = list(webdataset.WebDataset(str(phantoms / shard.name), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [member.key for member in shard.members]
    assert json.loads(samples[0]["json"])["synthetic"] is True
    assert [sample["jpg"] for sample in samples] == [image for _, image, _ in read_shard(phantoms, shard)]


def test_a_build_is_the_same_bytes_for_any_workers_and_parts(tmp_path, phantoms):
    source, options = PhantomSource(40, size=64), {"image_size": 64, "samples_per_shard": 16}
    build(source, tmp_path / "pool", workers=2, **options)
    assert tars(tmp_path / "pool") == tars(phantoms)
    for part in (2, 0, 1):
        with pytest.raises(FileNotFoundError):
            load_index(tmp_path / "parts")
        build(source, tmp_path / "parts", part=(part, 3), **options)
    assert tars(tmp_path / "parts") == tars(phantoms)
    indices = [(out / INDEX).read_bytes() for out in (phantoms, tmp_path / "pool", tmp_path / "parts")]
    assert indices[0] == indices[1] == indices[2]
    assert not (tmp_path / "parts" / BUILDING).exists()


def test_merge_parts_says_what_is_missing(tmp_path):
    source, out = clinic(tmp_path / "files"), tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no unfinished build here"):
        merge_parts(out)
    report = build(source, out, part=(0, 2))
    assert sum(split["samples"] for split in report["kept"].values()) < 12
    with pytest.raises(ValueError, match="2 of 4 shards are not built"):
        merge_parts(out)
    assert build(source, out, part=(1, 2)) == merge_parts(out) == load_report(out)


def test_a_build_that_others_finish_meanwhile_ends_well(tmp_path):
    source, out = clinic(tmp_path / "files"), tmp_path / "out"
    started, reports = [], []

    def read(path: Path) -> np.ndarray:
        if not started:
            started.append(path)
            reports.append(build(source, out))  # the job that was queued again, and all other parts
        return load_radiograph(path)

    source.studies = [replace(s, radiographs=(replace(i, read=functools.partial(read, i.read.args[0])),))
                      for s in source for i in s.radiographs]  # fmt: skip
    assert build(source, out, part=(1, 2)) == reports[0] == load_report(out)
    assert verify_shards(out) == []


def test_merge_parts_sees_that_another_has_merged_meanwhile(tmp_path, monkeypatch):
    source, out = clinic(tmp_path / "files"), tmp_path / "out"
    build(source, out, part=(0, 2))
    read = shards._read

    def read_late(path: Path) -> dict:
        values = read(path)
        if path.name == shards.PLAN:
            monkeypatch.setattr(shards, "_read", read)
            build(source, out, part=(1, 2))
        return values

    monkeypatch.setattr(shards, "_read", read_late)
    assert merge_parts(out) == load_report(out)


def test_a_finished_build_is_not_done_again(tmp_path):
    source, out = clinic(tmp_path / "files"), tmp_path / "out"
    report = build(source, out)
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build(source, out) == build(source, out, part=(1, 2)) == report
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written
    index = json.loads((out / INDEX).read_text())
    del index["fingerprint"]  # as earlier versions wrote it
    (out / INDEX).write_text(json.dumps(index))
    assert load_index(out).fingerprint == ""
    with pytest.raises(ValueError, match="holds finished shards of other data or options; choose another folder"):
        build(source, out)


def fail(number: int, path: Path) -> np.ndarray:
    raise OSError(number, os.strerror(number))


def test_a_disk_that_fails_stops_the_build_and_a_missing_file_does_not(tmp_path):
    source, path = clinic(tmp_path / "files"), tmp_path / "files" / "image2.png"
    image = source.studies[2].radiographs[0]
    for number in (errno.ENOENT, errno.EISDIR):
        broken = replace(image, read=functools.partial(fail, number, path))
        source.studies[2] = replace(source.studies[2], radiographs=(broken,))
        assert sum(build(source, tmp_path / str(number))["dropped_images"].values()) == 1
    broken = replace(image, read=functools.partial(fail, errno.EIO, path))
    source.studies[2] = replace(source.studies[2], radiographs=(broken,))
    with pytest.raises(
        OSError, match=f"sample {sample_key('clinic', 'S2', 'image2')}: Input/output error; run the build"
    ):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


def test_pictures_say_that_they_are_synthetic_and_are_the_same_pictures(tmp_path, phantoms):
    study = next(iter(PhantomSource(1, size=64)))
    marked, meta = encode_sample(study, study.radiographs[0], 64, synthetic=True)
    plain, _ = encode_sample(study, study.radiographs[0], 64, synthetic=False)
    assert meta["synthetic"] is True
    for name, data in marked.items():
        note = Image.open(io.BytesIO(data)).info["comment" if name == "jpg" else "Comment"]
        assert note in (b"synthetic phantom", "synthetic phantom")
        assert b"synthetic" not in plain[name]
        np.testing.assert_array_equal(decode_radiograph(data), decode_radiograph(plain[name]))
    assert all(b"synthetic phantom" in data for _, data, _ in read_samples(load_index(phantoms), "train"))


def test_training_studies_are_shuffled_and_whole(tmp_path):
    source = clinic(tmp_path / "files", 40)
    two = (*source.studies[0].radiographs, radiograph(tmp_path / "files", "another"))
    source.studies[0] = replace(source.studies[0], radiographs=two)
    build(source, tmp_path / "out")
    index = load_index(tmp_path / "out")
    order = [meta["study_id"] for _, _, meta in read_samples(index, "train")]
    assert sorted(set(order)) == sorted(s.study_id for s in source if s.split == "train")
    assert order != sorted(order, key=lambda name: int(name[1:]))
    places = [shard.name for shard in index.shards for m in shard.members if m.study == group_hash("clinic", "S0")]
    assert len(places) == 2
    assert len(set(places)) == 1


def test_a_killed_build_leaves_no_index_and_finishes_when_run_again(tmp_path):
    source, out = clinic(tmp_path / "files"), tmp_path / "out"
    build(source, tmp_path / "undisturbed")
    last = read_samples(load_index(tmp_path / "undisturbed"), "val")
    deadly = (tmp_path / "files" / f"{next(last)[2]['image_id']}").with_suffix(".deadly")
    deadly.touch()
    program = (
        f"from tests.data.test_shards import *; build(clinic(Path({str(tmp_path / 'files')!r})), Path({str(out)!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="the build is unfinished; run 'imitate-ds shards build' again"):
        load_index(out)
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert written
    damaged, *whole = written
    (out / damaged).write_bytes(b"half a tar")
    deadly.unlink()
    build(source, out)
    assert tars(out) == tars(tmp_path / "undisturbed")
    assert (out / INDEX).read_bytes() == (tmp_path / "undisturbed" / INDEX).read_bytes()
    assert all((out / name).stat().st_mtime_ns == written[name] for name in whole)  # not written a second time


def test_what_is_dropped_is_counted_by_reason_without_ids(tmp_path, caplog):
    source = clinic(tmp_path / "files")
    files, studies = tmp_path / "files", source.studies
    studies[0] = replace(studies[0], findings=" ", impression="nan")
    studies[1] = replace(studies[1], radiographs=(radiograph(files, "side", "lateral"),))
    studies[2] = replace(studies[2], radiographs=(*studies[2].radiographs, radiograph(files, "other", "unknown")))
    (files / "image4.png").write_bytes((files / "image4.png").read_bytes()[:200])
    Image.new("L", (40, 40), 7).save(files / "image5.png")
    (files / "image6.png").unlink()
    report = build(source, tmp_path / "out")
    assert report["studies"] == 12
    assert report["sections"] == {"both": 8, "findings only": 0, "impression only": 3, "none": 1}
    assert report["dropped_studies"] == {
        "neither findings nor impression": 1,
        "no frontal radiograph": 1,
        "no readable frontal radiograph": 3,
    }
    assert report["dropped_images"] == {
        "view position: lateral": 1,
        "view position: unknown": 1,
        "unreadable image: damaged image file (OSError)": 1,
        "unreadable image: image has one pixel value": 1,
        "unreadable image: no such file or directory": 1,
    }
    assert report["kept"] == {"train": {"studies": 4, "samples": 4}, "val": {"studies": 3, "samples": 3}}
    assert sample_key("clinic", "S4", "image4") in caplog.text
    for secret in ("PATIENT", "image4", "Impression", str(files)):
        assert secret not in caplog.text
        assert secret not in (tmp_path / "out" / INDEX).read_text()
    assert verify_shards(tmp_path / "out") == []
    assert report_table(report).row_count == 2 + 3 + 5 + 5


def test_a_damaged_image_is_tried_again_when_it_was_mended(tmp_path):
    source, out = clinic(tmp_path / "files"), tmp_path / "out"
    whole = (tmp_path / "files" / "image1.png").read_bytes()
    (tmp_path / "files" / "image1.png").write_bytes(whole[:99])
    for part in (0, 1):
        build(source, out, part=(part, 3))
    (tmp_path / "files" / "image1.png").write_bytes(whole)
    assert sum(split["samples"] for split in build(source, out)["kept"].values()) == 12


def test_masks_and_boxes_go_with_the_radiograph(tmp_path):
    path = tmp_path / "image.png"
    pixels = np.zeros((60, 80), np.uint8)
    pixels[10:50, :] = np.random.default_rng(0).integers(30, 255, (40, 80))  # a black border above and below
    Image.fromarray(pixels).save(path)
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 8:40] = 255
    study = Study(
        patient_id="p",
        study_id="s",
        split="train",
        findings="A lesion.",
        impression="",
        radiographs=(RadiographRef("i", "frontal", functools.partial(load_radiograph, path)),),
        extra={
            "boxes": [
                {"label": "lesion", "x": 8, "y": 20, "width": 32, "height": 20},
                {"label": "marker", "x": 8, "y": 2, "width": 6, "height": 6},  # in the border that is cropped
            ]
        },
        masks={"lesions": functools.partial(np.copy, mask)},
    )
    build(Clinic([study]), tmp_path / "out", image_size=40)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        files = {info.name.partition(".")[2]: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    stored = decode_radiograph(files["lesions.mask.png"])
    # 40 x 80 content is halved to 20 x 40 and lies in the middle of the square, 10 rows below its top
    expected = np.zeros((40, 40), np.uint8)
    expected[15:25, 4:20] = 255
    np.testing.assert_array_equal(stored, expected)
    (box,) = json.loads(files["json"])["extra"]["boxes"]
    assert box == {"label": "lesion", "x": 4.0, "y": 15.0, "width": 16.0, "height": 10.0}


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ((-0.9, 39.5, 10, 1.4), None),
        ((38, 0, 10.9, 40), None),
        ((-1, 0, 10, 10), "a box reaches out of the radiograph"),
        ((0, 0, 49, 10), "a box reaches out of the radiograph"),
        ((0, 31, 10, 10), "a box reaches out of the radiograph"),
        ((float("nan"), 0, 10, 10), "a box reaches out of the radiograph"),
        ((5, 5, 0, 10), "a box has no area"),
    ],
)
def test_a_box_outside_its_radiograph_is_named_by_key(tmp_path, caplog, place, rule):
    source = clinic(tmp_path, 4)
    box = dict(zip(("label", "x", "y", "width", "height"), ("mass", *place), strict=True))
    source.studies[0] = replace(source.studies[0], extra={"boxes": [box]})
    report = build(source, tmp_path / "out")
    if rule:
        assert report["dropped_images"][f"unreadable image: {rule}"] == 1
        assert f"sample {sample_key('clinic', 'S0', 'image0')} dropped: unreadable image: {rule}" in caplog.text
        return
    metas = [meta for _, _, meta in read_samples(load_index(tmp_path / "out"), "train") if meta["study_id"] == "S0"]
    (kept,) = metas[0]["extra"]["boxes"]
    assert kept["x"] >= 0 <= kept["y"]
    assert kept["x"] + kept["width"] <= 32 >= kept["y"] + kept["height"]


def test_a_collection_without_reports_keeps_its_studies(tmp_path):
    source = clinic(tmp_path / "files")
    studies = [replace(study, findings="", impression="") for study in source]
    report = build(Clinic(studies, has_reports=False), tmp_path / "out")
    assert report["kept"] == build(source, tmp_path / "other")["kept"]
    assert report["sections"]["none"] == report["studies"] == 12
    assert report["dropped_studies"] == {}


def test_a_patient_in_two_splits_stops_the_build_before_anything_is_written(tmp_path):
    source = clinic(tmp_path / "files")
    source.studies[0] = replace(source.studies[0], patient_id="PATIENT3")  # PATIENT3 is in val
    with pytest.raises(ValueError, match="1 patients are in two splits") as error:
        build(source, tmp_path / "out")
    assert "PATIENT3" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_repeated_ids_are_refused(tmp_path):
    source = clinic(tmp_path / "files")
    source.studies[1] = replace(source.studies[1], study_id="S0")
    with pytest.raises(ValueError, match="1 study ids are given to more than one study"):
        build(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, "image_size = 8"),
        ({"workers": -1}, "workers = -1"),
        ({"samples_per_shard": 0}, "samples_per_shard = 0"),
        ({"part": (2, 2)}, "part = 2/2: must be I/N with 0 <= I < N"),
    ],
)
def test_wrong_arguments_name_themselves(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(clinic(tmp_path / "files"), tmp_path / "out", **options)


def test_a_source_without_a_usable_study_is_refused(tmp_path):
    source = clinic(tmp_path / "files", 2)
    with pytest.raises(ValueError, match="2 with neither findings nor impression"):
        build(Clinic([replace(s, findings="", impression="N/A") for s in source]), tmp_path / "out")
    for study in source:
        (tmp_path / "files" / f"{study.radiographs[0].image_id}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not one radiograph was usable"):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out" / BUILDING).exists()


def test_a_folder_in_use_is_refused(tmp_path):
    source, out = clinic(tmp_path / "files"), tmp_path / "out"
    build(source, out, part=(0, 2))
    with pytest.raises(ValueError, match="unfinished build of other data or options"):
        build(source, out, image_size=48)
    build(source, out)
    with pytest.raises(ValueError, match="holds finished shards of other data or options; choose another folder"):
        build(source, out, image_size=48)
    (out / INDEX).unlink()
    with pytest.raises(ValueError, match="4 tars without an index"):
        build(source, out)


def test_load_index_says_what_is_wrong_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; build one with 'imitate-ds shards build'"):
        load_index(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no index\.json; build one with 'imitate-ds shards build'"):
        load_index(tmp_path / "empty")
    build(clinic(tmp_path / "files"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"split = 'test': .* it has: train, val"):
        load_index(tmp_path / "out").of_split("test")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tar = tmp_path / "out" / "train-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=r"bytes, index\.json says"):
        load_index(tmp_path / "out")
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000000\.tar: named in index.json, but missing"):
        load_index(tmp_path / "out")
    index["shards"][0]["samples"] = "many"
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a complete index"):
        load_index(tmp_path / "out")
    for text, message in [("{", "not valid JSON"), ('{"format": "x"}', "format must be"), ("[]", "format must be")]:
        (tmp_path / "out" / INDEX).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_index(tmp_path / "out")


def rewrite_members(root: Path, change) -> None:
    """Change the table of members, and its checksum with it."""
    index = json.loads((root / INDEX).read_text())
    rows = sum(shard["samples"] for shard in index["shards"])
    data = table_bytes([table_of(change(list(map_table(root / MEMBERS, rows))))])
    (root / MEMBERS).write_bytes(data)
    index["members"]["sha256"] = hashlib.sha256(data).hexdigest()
    (root / INDEX).write_text(json.dumps(index))


def test_a_table_of_members_of_another_build_is_refused(tmp_path, phantoms):
    out = Path(shutil.copytree(phantoms, tmp_path / "out"))
    (out / MEMBERS).write_bytes((out / MEMBERS).read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"members\.npy: of another build than index\.json; copy both"):
        load_index(out)
    rewrite_members(out, lambda members: members[:-1])
    with pytest.raises(ValueError, match=r"members\.npy: uint64 \[9, \d+\], not uint64 \[9, \d+\]"):
        load_index(out)
    (out / MEMBERS).unlink()
    with pytest.raises(FileNotFoundError, match="missing; copy it again"):
        load_index(out)


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/x.tar", "a/b.tar", ".x.tar", "x.zip", "x.tar\n"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, phantoms, name):
    out = Path(shutil.copytree(phantoms, tmp_path / "out"))
    index = json.loads((out / INDEX).read_text())
    index["shards"][0]["name"] = name
    (out / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: a shard is called .*ends in \.tar"):
        load_index(out)


def test_a_member_larger_than_any_radiograph_is_not_read(tmp_path, phantoms):
    out = Path(shutil.copytree(phantoms, tmp_path / "out"))
    rewrite_members(out, lambda members: [members[0]._replace(image_size=2**40), *members[1:]])
    with pytest.raises(ValueError, match=r"member too large: 1,099,511,627,776 bytes"):
        next(read_samples(load_index(out), "train"))


def test_verify_finds_a_changed_byte_and_a_wrong_index(tmp_path):
    out = tmp_path / "out"
    build(clinic(tmp_path / "files"), out)
    assert verify_shards(out) == []
    member = load_index(out).shards[0].members[0]
    rewrite_members(out, lambda members: [members[0]._replace(image_size=member.image_size - 100), *members[1:]])
    assert verify_shards(out) == [
        f"train-000000.tar: sample {member.key}: no radiograph where the index says",
        f"train-000000.tar: sample {member.key}: radiograph differs from its checksum in the index",
        f"train-000000.tar: sample {member.key}: radiograph cannot be decoded: damaged image file (OSError)",
    ]
    data = bytearray((out / "val-000000.tar").read_bytes())
    data[700] ^= 1
    (out / "val-000000.tar").write_bytes(data)
    assert "val-000000.tar: sha256 differs from the index; copy or build it again" in verify_shards(out)


def test_verify_finds_a_patient_in_two_splits_and_a_damaged_mask(tmp_path, phantoms):
    out = tmp_path / "out"
    shutil.copytree(phantoms, out)
    assert verify_shards(out) == []
    index = json.loads((out / INDEX).read_text())
    train = next(shard for shard in index["shards"] if shard["split"] == "train")
    tar = out / train["name"]
    with tarfile.open(tar) as file:
        mask = next(info for info in file if info.name.endswith(".mask.png"))
    data = bytearray(tar.read_bytes())
    data[mask.offset_data] ^= 1
    tar.write_bytes(data)
    train["sha256"] = file_sha256(tar)
    (out / INDEX).write_text(json.dumps(index))
    rewrite_members(out, lambda members: [*members[:-1], members[-1]._replace(patient=members[0].patient)])
    problems = verify_shards(out)
    assert any("1 of" in p and "patients are in more than one split" in p for p in problems)
    wrong = f"mask {mask.name}: cannot be decoded: not a JPEG, PNG, TIFF or DICOM image"
    assert f"{train['name']}: {wrong}" in problems


def test_stats_count_and_the_picture_shows_images_only(tmp_path, phantoms):
    stats = shard_stats(phantoms)
    assert sum(split["samples"] for split in stats["splits"].values()) == 40
    train = stats["splits"]["train"]
    assert train["findings"]["present"] + train["impression"]["present"] - train["both sections"] == train["studies"]
    assert train["impression"]["commonest (count)"] > 1  # many normal phantoms read alike
    assert 0 < train["labels"]["normal"]["positive (share)"] < 1
    assert stats_table(stats).row_count > 20
    samples_picture(phantoms, tmp_path / "samples.png", count=7)
    assert Image.open(tmp_path / "samples.png").size == (3 * 64, 3 * 64)


def test_repeated_reports_are_counted_per_study(tmp_path):
    source = clinic(tmp_path / "files", 8)
    texts = ["No acute disease.", "no acute  disease.", "No acute disease.", "Effusion."]
    for i, text in enumerate(texts):
        source.studies[i] = replace(source.studies[i], split="test", findings="", impression=text)
    build(source, tmp_path / "out")
    stats = shard_stats(tmp_path / "out")["splits"]["test"]["impression"]
    assert stats == {
        "present": 4,
        "words (mean)": 2.5,
        "words (longest)": 3,
        "different": 2,
        "repeated (share)": 0.75,
        "commonest (count)": 3,
    }


def test_recipes(tmp_path):
    for path in sorted((REPOSITORY / "shards").glob("*.yaml")):
        recipe = load_recipe(path, root=tmp_path, options={"seed": 7})
        assert (recipe.root, recipe.options["seed"]) == (tmp_path, 7)
    phantom = load_recipe(REPOSITORY / "shards" / "phantom.yaml", out=tmp_path, options={"studies": 5})
    assert len(PhantomSource(**phantom.options)) == 5
    recipe = tmp_path / "mine.yaml"
    with pytest.raises(FileNotFoundError, match="recipes that ship are in shards/"):
        load_recipe(recipe)
    for text, message in [
        ("source: openi\nout: x\nimagesize: 3", "imagesize is not a setting .did you mean image_size"),
        ("source: openi", "out = None: must be given"),
        ("source: openi\nout: x\nimage_size: big", "image_size = 'big': must be a whole number"),
        ("source: openi\nout: x\noptions: 3", "options = 3: must be a mapping"),
        ("source: openi\nout: x\noptions: {5: 3}", "options = .*: must be a mapping"),
        ("source: openi\nout: x\nroot: 5", "root = 5: must be a path"),
        ("[", "not valid YAML"),
        ("openi", "must be a mapping"),
    ]:
        recipe.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(recipe)

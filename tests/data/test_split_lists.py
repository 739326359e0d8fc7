"""Lists of samples: apart by patient, one within the other, the same again, and not to be changed by hand."""

import pytest

from imitate_ds.data.shards import load_index
from imitate_ds.data.split_lists import Part, make_split_lists, parse_part, read_split_list


def read(folder, name, index, split="train"):
    return read_split_list(folder / f"{name}.txt", build_id=index.build_id, split=split)


def test_parts_share_no_patient_and_lie_within_each_other(phantom_shards, tmp_path):
    index = load_index(phantom_shards)
    parts = {"fit": Part(0, 0.8), "val": Part(0.8, 1), "tenth": Part(0, 0.1), "all": Part(0, 1)}
    counts = make_split_lists(index, "train", parts, tmp_path, seed=3)
    lists = {name: set(read(tmp_path, name, index)) for name in parts}
    members = [member for shard in index.of_split("train") for member in shard.members]
    patients = {name: {m.patient for m in members if m.key in keys} for name, keys in lists.items()}
    assert counts == {name: len(keys) for name, keys in lists.items()}
    assert lists["all"] == {member.key for member in members}
    assert lists["fit"] | lists["val"] == lists["all"]
    assert not patients["fit"] & patients["val"]
    assert lists["tenth"] < lists["fit"]
    assert len(patients["tenth"]) == round(0.1 * len(patients["all"]))

    make_split_lists(index, "train", parts, tmp_path / "again", seed=3)
    make_split_lists(index, "train", parts, tmp_path / "other", seed=4)
    assert set(read(tmp_path / "again", "tenth", index)) == lists["tenth"]
    assert set(read(tmp_path / "other", "tenth", index)) != lists["tenth"]


def test_shares_of_what_is_annotated(phantom_shards, tmp_path):
    index = load_index(phantom_shards)
    some = {member.key for member in index.of_split("train")[0].members}
    make_split_lists(index, "train", {"all": Part(0, 1), "part": Part(0, 0.5)}, tmp_path, among=some)
    assert set(read(tmp_path, "all", index)) == some
    assert set(read(tmp_path, "part", index)) < some


def test_samples_may_be_drawn_instead(phantom_shards, tmp_path):
    index = load_index(phantom_shards)
    counts = make_split_lists(index, "train", {"part": Part(0, 0.5)}, tmp_path, unit="sample")
    samples = sum(shard.samples for shard in index.of_split("train"))
    assert counts["part"] == round(0.5 * samples)


def test_a_list_that_does_not_fit_is_refused(phantom_shards, tmp_path):
    index = load_index(phantom_shards)
    make_split_lists(index, "train", {"part": Part(0, 0.5)}, tmp_path)
    path = tmp_path / "part.txt"
    with pytest.raises(ValueError, match="split = train: must be val"):
        read(tmp_path, "part", index, split="val")
    with pytest.raises(ValueError, match="build_id"):
        read_split_list(path, build_id="other", split="train")
    path.write_text(path.read_text() + "0123456789abcdef\n")
    with pytest.raises(ValueError, match="SHA-256"):
        read(tmp_path, "part", index)
    path.write_text("0123456789abcdef\n")
    with pytest.raises(ValueError, match="its first line must be"):
        read(tmp_path, "part", index)
    with pytest.raises(FileNotFoundError, match="imitate-ds splits make"):
        read(tmp_path, "none", index)
    with pytest.raises(ValueError, match="widen it"):
        make_split_lists(index, "train", {"none": Part(0, 1e-6)}, tmp_path)


@pytest.mark.parametrize("text", ["train", "train=0.5", "=0:1", "a=0.5:0.2", "a=0:1.1", "../a=0:1", "a=x:y"])
def test_parts_are_ranges(text):
    with pytest.raises(ValueError, match="NAME=LOW:HIGH"):
        parse_part(text)
    assert parse_part("train=0:0.9") == ("train", Part(0, 0.9))

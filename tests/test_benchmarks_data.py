"""The benchmark of the data layer runs: at sizes that take seconds, and say nothing about speed."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
from torch import Tensor, uint8

from imitate_ds.config import AugmentConfig, build_run_config
from imitate_ds.data.shard_index import load_index
from imitate_ds.data.transforms import TrainViews

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peers(repository):
    """The module of the peers; benchmarks are scripts, which import one another by their folder."""
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        yield importlib.import_module("data_peers")
    finally:
        sys.path.remove(str(repository / "benchmarks"))


@pytest.fixture(scope="module")
def records(repository, phantom_shards, tmp_path_factory) -> dict[str, dict]:
    """What the benchmark writes, by part."""
    folder = tmp_path_factory.mktemp("results")
    before = set(os.listdir(phantom_shards.parent)), set(os.listdir(phantom_shards))
    for part in ("throughput", "start"):
        command = [sys.executable, "benchmarks/data.py", "--quick", "--only", part, "--out", str(folder / part)]
        command += ["--shards", str(phantom_shards)]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "| met " in done.stdout
    assert (set(os.listdir(phantom_shards.parent)), set(os.listdir(phantom_shards))) == before, "nothing is left behind"
    return {part: json.loads((folder / part).read_text()) for part in ("throughput", "start")}


def numbers(values) -> list[float]:
    """All numbers in a nest of JSON values."""
    if isinstance(values, (dict, list)):
        return [
            found for value in (values.values() if isinstance(values, dict) else values) for found in numbers(value)
        ]
    return [values] if isinstance(values, (int, float)) and not isinstance(values, bool) else []


def test_every_pipeline_is_timed_in_both_augmentations(records):
    blocks = records["throughput"]["throughput"]["blocks"]
    assert set(blocks) == {"paper", "default"}
    for block in blocks.values():
        assert len(block["rows"]) == 11
        for name, cell in block["rows"].items():
            assert len(cell["rounds"]) == 1, name
            assert all(math.isfinite(value) and value > 0 for value in numbers(cell)), name
        assert all(value > 0 for value in numbers([block["torchvision"], block["data_verify_full"]]))
        assert block["torchvision"]["fastest"] in block["torchvision"]["samples_per_second_and_core"]
        assert block["rows"]["decode + views alone"]["of_the_limit"] == block["rows"]["ours"]["ours_over_it"] == 1
        assert block["rows"]["raw tar read, CRC-32"]["of_the_limit"] > 1
    assert blocks["paper"]["augment"]["vertical_flip"] == 0.5


def test_start_is_measured_over_linked_samples(records):
    start = records["start"]["start"]
    assert start["samples"] >= 2_000
    steps = start["steps_per_epoch"]
    assert steps == start["samples"] // start["batch"], "every sample is of a study of its own"
    assert [cell["step"] for cell in start["first_batch"].values()] == [0, steps // 2, 3 * steps - 1]
    assert all(cell["seconds"] > 0 for cell in start["first_batch"].values())
    small, large = start["memory_per_worker"]
    assert int(small) < int(large) == start["samples"]
    assert all(value > 1 for value in numbers(start["memory_per_worker"]))
    assert start["plan"]["peak_extra_mb"] >= 0


def test_targets_and_the_machine_are_written_down(records):
    for part, count in {"throughput": 3, "start": 4}.items():
        record = records[part]
        assert len(record["targets"]) == count
        assert all(isinstance(cell["met"], bool) and cell["measured"] >= 0 for cell in record["targets"])
        assert record["machine"]["cores"] <= 2
        assert all(record["versions"].values())


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_torchvision_views_have_every_setting_and_every_form_gives_the_same_shape(peers, preset):
    augment = build_run_config({"name": "x", "preset": preset, "data": {"shards": "x"}}).data.augment
    image = peers.Image.linear_gradient("L")
    for form in peers.FORMS:
        views = peers.torchvision_views(augment, 224, form)(image)
        assert (views.shape, views.dtype) == ((2, 1, 224, 224), uint8)
        assert not views[0].equal(views[1]), f"{form}: one draw for both views"
    names = [type(step).__name__ for step in peers._transforms(peers.v2, augment, 224)]
    assert len(names) == {"paper": 6, "default": 4}[preset]


def test_a_transform_whose_amount_is_zero_is_left_out(peers):
    nothing = AugmentConfig(crop_scale=(1.0, 1.0), rotation=0.0, autocontrast=0.0, brightness=0.0, contrast=0.0)
    image = peers.Image.linear_gradient("L")
    views = peers.torchvision_views(nothing, 256, "v1 on Pillow")(image)
    assert views[0].equal(peers.v2.functional.pil_to_tensor(image))
    assert views[0].equal(views[1])


def test_peers_see_the_radiographs_of_the_shards(peers, phantom_shards, tmp_path):
    index = load_index(phantom_shards)
    files = peers.write_loose_files(index, "train", tmp_path)
    peers.write_array(index, "train", tmp_path / "all.npy")
    samples = sum(shard.samples for shard in index.of_split("train"))
    assert len(files) == samples == len(peers.np.load(tmp_path / "all.npy"))
    plain = AugmentConfig(crop_scale=(1.0, 1.0), rotation=0.0, autocontrast=0.0, brightness=0.0, contrast=0.0)
    views, ours = peers.torchvision_views(plain, 64, "v1 on Pillow"), TrainViews(plain, 64)
    urls = [str(phantom_shards / shard.name) for shard in index.of_split("train")]
    loaders = [
        peers.webdataset(urls, views, 8),
        peers.webdataset_with_ours(urls, ours, 8, at_once=True),
        peers.webdataset_with_ours(urls, ours, 8, at_once=False),
        peers.loose_files(files, views, 8),
        peers.memory_mapped(tmp_path / "all.npy", views, 8),
    ]
    there = {_bytes(views(peers.Image.open(path))) for path in files}
    for loader in loaders:
        batch = next(loader)
        assert (batch.shape, batch.dtype) == ((8, 2, 1, 64, 64), uint8)
        assert {_bytes(pair) for pair in batch} <= there


def _bytes(pair: Tensor) -> bytes:
    return pair.numpy().tobytes()

"""Which checkpoint is believed, which are kept, and what a disk that fails leaves behind."""

import json
import os
import subprocess

import pytest
import torch
from torch import nn

from imitate_ds.training import checkpoint_files
from imitate_ds.training.checkpoint import Checkpoints, find_checkpoint, load_checkpoint, read_state
from imitate_ds.training.checkpoint_files import MANIFEST, Keep, checkpoint_folders, kept, verify_checkpoint

SHARD = "shard-00000-of-00001.safetensors"


class PlainEngine:
    """One process without ZeRO, as DeepSpeed's engine shows itself there (the real one: test_elastic.py, test_engine.py)."""

    torch_autocast_z0_gradscaler = None

    def __init__(self, size=2):
        self.module = nn.Linear(size, 1)
        self.basic_optimizer = self.optimizer = torch.optim.AdamW(self.module.parameters(), fused=True)

    def zero_optimization_stage(self):
        return 0

    def fp16_enabled(self):
        return False


def saved(folder, *steps, keep=Keep(last=2), engine=None, **metrics):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(engine or PlainEngine(), step, {"step": step, "metrics": metrics})


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def test_newest_is_found_and_old_ones_are_pruned(tmp_path):
    saved(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000030"
    assert read_state(tmp_path / "step-00000030")["step"] == 30
    assert (tmp_path / "latest").read_text() == "step-00000030\n"


def test_what_was_saved_comes_back(tmp_path):
    torch.manual_seed(0)
    engine = PlainEngine()
    for _ in range(3):
        engine.module(torch.ones(4, 2)).sum().backward()
        engine.optimizer.step()
    saved(tmp_path, 3, engine=engine)
    again = PlainEngine()
    assert load_checkpoint(again, tmp_path / "step-00000003")["step"] == 3
    for one, other in zip(engine.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, other)
        for name, value in engine.optimizer.state[one].items():
            assert torch.equal(value, again.optimizer.state[other][name]), name


def test_another_model_is_refused(tmp_path):
    saved(tmp_path, 3)
    other = PlainEngine()
    other.module = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"step-00000003: .* is in .* only: the checkpoint is of another model"):
        load_checkpoint(other, tmp_path / "step-00000003")
    with pytest.raises(ValueError, match="weight of weight: elements 2 to 2 are in none of its files"):
        load_checkpoint(PlainEngine(size=3), tmp_path / "step-00000003")


def test_nothing_there(tmp_path):
    assert find_checkpoint(tmp_path / "none") is None


def test_best_and_milestones_stay(tmp_path):
    keep = Keep(last=1, every=100, best=1, metric="R@5")
    for step, score in ((50, 0.1), (100, 0.2), (150, 0.9), (200, 0.3), (250, 0.4)):
        saved(tmp_path, step, keep=keep, **{"R@5": score})
    assert names(tmp_path) == [f"step-{step:08d}" for step in (100, 150, 200, 250)]
    unmeasured = {path: {"step": 7} for path in checkpoint_folders(tmp_path)}
    assert kept(unmeasured, Keep(last=1, best=2, metric="R@5")) == {tmp_path / "step-00000250"}


def test_flipped_bit_is_found_and_the_one_before_is_used(tmp_path):
    saved(tmp_path, 10, 20)
    file = tmp_path / "step-00000020" / SHARD
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    said = []
    assert find_checkpoint(tmp_path, said.append) == tmp_path / "step-00000010"
    assert f"{SHARD} is damaged" in said[0]
    file.write_bytes(content[:-1])
    assert verify_checkpoint(tmp_path / "step-00000020") == f"{SHARD} is cut short"


def test_interrupted_save_is_no_checkpoint_and_costs_none(tmp_path, monkeypatch):
    saved(tmp_path, 10)
    with monkeypatch.context() as patch:  # killed when all files are written, but not yet named
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 20)
    assert (tmp_path / ".step-00000020.partial" / MANIFEST).exists()
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000010"
    saved(tmp_path, 15)
    assert not list(tmp_path.glob(".step-*"))
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_a_torn_checkpoint_of_a_later_step_does_not_count_as_kept(tmp_path):
    saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / MANIFEST).unlink()
    saved(tmp_path, 15, keep=Keep(last=1))
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000015"
    saved(tmp_path, 20, keep=Keep(last=1))  # reached again: written anew
    assert names(tmp_path) == ["step-00000020"]
    assert verify_checkpoint(tmp_path / "step-00000020") is None


def test_missing_file_damaged_manifest_and_other_formats(tmp_path):
    saved(tmp_path, 10)
    target = tmp_path / "step-00000010"
    content = (target / SHARD).read_bytes()
    (target / SHARD).unlink()
    assert f"{SHARD} is missing" in (verify_checkpoint(target) or "")
    (target / SHARD).write_bytes(content)
    assert verify_checkpoint(target) is None
    whole = (target / MANIFEST).read_text()
    for damaged in ("{", "{}", "[]", whole.replace('"step": 10', '"step": 11', 1)):
        (target / MANIFEST).write_text(damaged)
        assert verify_checkpoint(target) == "its manifest is damaged"
    (target / MANIFEST).write_bytes(b"\xff" + whole.encode())
    assert verify_checkpoint(target) == "its manifest is damaged"
    with pytest.raises(ValueError, match="none of the checkpoints"):
        find_checkpoint(tmp_path)
    old = {"step": 10, "world_size": 1, "state": {}, "loss_scale": {}, "files": {}}
    (target / MANIFEST).write_text(json.dumps({**old, "seal": checkpoint_files._seal(old)}))
    assert verify_checkpoint(target) == "is of format 1; this version reads format 2"


def test_the_background_saves_what_was_when_it_was_asked(tmp_path):
    engine = PlainEngine()
    before = engine.module.weight.detach().clone()
    checkpoints = Checkpoints(tmp_path, Keep(last=1), in_background=True)
    checkpoints.save(engine, 1, {"step": 1})
    with torch.no_grad():
        engine.module.weight.add_(1)
    checkpoints.finish()
    load_checkpoint(engine, tmp_path / "step-00000001")
    assert torch.equal(engine.module.weight, before)


def save_and_wait(checkpoints, step):
    checkpoints.save(PlainEngine(size=50_000), step, {"step": step})
    checkpoints.finish()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_one_clear_message_and_the_checkpoint_before_is_whole(small_disk, in_background):
    checkpoints = Checkpoints(small_disk / "checkpoints", Keep(last=2), in_background=in_background)
    checkpoints.save(PlainEngine(size=50_000), 1, {"step": 1})
    with pytest.raises(
        OSError, match=r"checkpoint of step 2 could not be written \(rank 0: .*space.*step-00000001 is as it was"
    ):
        save_and_wait(checkpoints, 2)
    assert find_checkpoint(small_disk / "checkpoints") == small_disk / "checkpoints" / "step-00000001"
    assert not list((small_disk / "checkpoints").glob(".step-*"))


def test_a_read_only_disk_and_a_vanished_folder(small_disk):
    folder = small_disk / "checkpoints"
    saved(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"step 2 could not be written \(.*Read-only.*step-00000001 is as it was"):
        saved(folder, 2)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    checkpoints = Checkpoints(small_disk / "gone" / "x", Keep(last=1))
    (small_disk / "gone").write_text("a file where a folder was")
    with pytest.raises(OSError, match="there is none before it"):
        checkpoints.save(PlainEngine(), 2, {"step": 2})

"""Which checkpoint is believed."""

import json
from pathlib import Path

import pytest

from imitate_ds.training.checkpoint import MANIFEST, find_checkpoint, save_checkpoint, verify_checkpoint


class FileEngine:
    """Stands where DeepSpeed's engine does in a save: writes the files of one rank (the real engine: test_engine.py)."""

    torch_autocast_z0_gradscaler = None

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        assert not save_latest
        (target := Path(folder) / tag).mkdir(parents=True)
        (target / "weights.bin").write_bytes(json.dumps(client_state).encode() * 100)


def saved(folder, *steps, keep_last=2):
    for step in steps:
        save_checkpoint(FileEngine(), folder, step, {"step": step}, keep_last=keep_last)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newest_is_found_and_old_ones_are_pruned(tmp_path):
    saved(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000030"


def test_nothing_there(tmp_path):
    assert find_checkpoint(tmp_path / "none") is None


def test_flipped_bit_is_found_and_the_one_before_is_used(tmp_path):
    saved(tmp_path, 10, 20)
    file = tmp_path / "step-00000020" / "weights.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    said = []
    assert find_checkpoint(tmp_path, said.append) == tmp_path / "step-00000010"
    assert "weights.bin is damaged" in said[0]


def test_interrupted_save_is_passed_over_and_never_costs_a_good_one(tmp_path):
    saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / MANIFEST).unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000010"
    saved(tmp_path, 15, keep_last=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000015"
    saved(tmp_path, 20, keep_last=1)  # reached again: written anew
    assert names(tmp_path) == ["step-00000020"]
    assert verify_checkpoint(tmp_path / "step-00000020") is None


def test_missing_file_and_damaged_manifest(tmp_path):
    saved(tmp_path, 10)
    target = tmp_path / "step-00000010"
    (target / "weights.bin").unlink()
    assert "weights.bin is missing" in (verify_checkpoint(target) or "")
    whole = (target / MANIFEST).read_text()
    for damaged in ("{", "{}", "[]", whole.replace('"step": 10', '"step": 11', 1)):
        (target / MANIFEST).write_text(damaged)
        assert verify_checkpoint(target) == "its manifest is damaged"
    (target / MANIFEST).write_bytes(b"\xff" + whole.encode())
    assert verify_checkpoint(target) == "its manifest is damaged"
    with pytest.raises(ValueError, match="none of the checkpoints"):
        find_checkpoint(tmp_path)

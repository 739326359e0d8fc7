import os

import pytest
import torch

from imitate_ds.training.checkpoint_files import sha256_of
from imitate_ds.training.tensor_files import TensorFiles, piece_name, whole_name, write_tensors


@pytest.fixture
def files(tmp_path):
    """Eleven numbers in three pieces in two files, out of order, and something whole."""
    numbers = torch.arange(11.0)
    first = {piece_name("weight", "a.b", 7): numbers[7:], piece_name("weight", "a.b", 0): numbers[:3]}
    second = {piece_name("weight", "a.b", 3): numbers[3:7], whole_name("mean"): torch.tensor([[1.0, 2.0]])}
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    write_tensors(paths[0], first)
    write_tensors(paths[1], second)
    return paths


@pytest.mark.parametrize(("start", "stop"), [(a, b) for b in (1, 3, 4, 7, 10, 11) for a in range(b)])
def test_any_run_of_elements_comes_back_whatever_file_it_is_in(files, start, stop):
    with TensorFiles(files) as stored:
        assert torch.equal(stored.read("weight", "a.b", start, stop - start), torch.arange(11.0)[start:stop])


def test_names_and_whole_tensors(files):
    with TensorFiles(files) as stored:
        assert stored.names("weight") == {"a.b"}
        assert torch.equal(stored.whole("mean"), torch.tensor([[1.0, 2.0]]))


def test_what_is_missing_is_said(files):
    with (
        TensorFiles(files[:1]) as stored,
        pytest.raises(ValueError, match=r"weight of a\.b: elements 3 to 10 are in none"),
    ):
        stored.read("weight", "a.b", 0, 11)


def test_what_was_written_is_told_and_only_the_owner_reads_it(tmp_path):
    before = os.umask(0o077)
    try:
        told = write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3).expand(2, 3)})
    finally:
        os.umask(before)
    path = tmp_path / told.name
    assert (told.bytes, told.sha256) == (path.stat().st_size, sha256_of(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match=r"y\.safetensors"):
        write_tensors(tmp_path / "none" / "y.safetensors", {"a": torch.ones(3)})

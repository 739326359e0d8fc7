"""The command line: what goes where, and one clear line where something is wrong."""

import shutil
import sys

import pytest

from imitate_ds import cli
from imitate_ds.data.shards import load_index


def _run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["imitate-ds", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shards", "verify", "{folder}/none"], "no such folder; build one with 'imitate-ds shards build'"),
        (["shards", "embed", "{folder}", "--text-encoder", "{folder}", "--dim", "64"], "--dim 64: is for"),
        (["shards", "build", "phantom", "--out", "{folder}/new", "--part", "3/2"], "--part 3/2: must be I/N"),
        (["shards", "order", "d", "--seed", "1", "--global-batch", "8", "--steps", "5:5"], "--steps 5:5: must be A:B"),
        (
            ["shards", "order", "a", "b", "--weight", "1", "--seed", "1", "--global-batch", "8", "--steps", "0:1"],
            "--weight: 1 of them for 2 folders",
        ),
        (
            ["shards", "order", "{folder}", "--apart", "town", "--seed", "1", "--global-batch", "8", "--steps", "0:1"],
            "data.apart = 'town': must be 'study' or 'patient'",
        ),
        (["shards", "check-leak", "{folder}/none", "{folder}"], "no such folder"),
        (["evaluate", "probe", "--model", "m", "--shards", "s", "--out", "{folder}/file"], "is a file; name a folder"),
        (["evaluate", "probe", "--model", "m", "--shards", "s", "--out", "{folder}/file/x"], "Not a directory"),
    ],
)
def test_what_is_wrong_is_one_line_on_standard_error(monkeypatch, capsys, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    status, out, err = _run(monkeypatch, capsys, *(part.format(folder=tmp_path) for part in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("imitate-ds: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_package_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imitate_ds.data.shard_stats", None)  # as if it were not there
    status, _, err = _run(monkeypatch, capsys, "shards", "stats", "anywhere")
    assert status == 2
    assert err.startswith("imitate-ds: import of imitate_ds.data.shard_stats halted")
    assert err.count("\n") == 1


def test_folder_names_with_brackets_are_printed_as_they_are(monkeypatch, capsys, phantom_shards, tmp_path):
    folder = shutil.copytree(phantom_shards, tmp_path / "a[bold]b")
    status, out, _ = _run(monkeypatch, capsys, "shards", "embed", str(folder), "--dim", "8")
    assert status == 0
    assert out.startswith(f"{folder}: embedded, 8 numbers a section, encoder ")
    assert out.count("\n") == 1


def test_order_prints_a_line_of_sorted_keys_for_each_step(monkeypatch, capsys, phantom_shards):
    options = ["--seed", "7", "--global-batch", "16", "--steps", "2:4"]
    status, out, _ = _run(monkeypatch, capsys, "shards", "order", str(phantom_shards), *options)
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["2", "3"]
    keys = {member.key for shard in load_index(phantom_shards).of_split("train") for member in shard.members}
    assert all(line[1:] == sorted(set(line[1:]) & keys) and len(line) == 17 for line in lines)
    by_rank = _run(monkeypatch, capsys, "shards", "order", str(phantom_shards), *options, "--world-size", "2")[1]
    first, second, *_ = (line.split() for line in by_rank.splitlines())
    assert first[:5] == ["2", "rank", "0", "worker", "0"]
    assert sorted(first[5:] + second[5:]) == lines[0][1:]


def test_check_leak_tells_by_its_status(monkeypatch, capsys, phantom_shards, tmp_path):
    folder, pairs = str(phantom_shards), tmp_path / "pairs.csv"
    splits = ["--split-a", "train", "--split-b", "val"]
    status, out, _ = _run(monkeypatch, capsys, "shards", "check-leak", folder, folder, *splits)
    assert status == 0, out
    assert out.endswith("no leak found\n")
    copy = shutil.copytree(phantom_shards, tmp_path / "copy")
    status, out, _ = _run(monkeypatch, capsys, "shards", "check-leak", folder, str(copy), "--out", str(pairs))
    assert status == 1
    assert "samples of B leak" in out
    assert pairs.read_text().startswith("kind,")


def test_data_check_tells_by_its_status(monkeypatch, capsys, tmp_path):
    (tmp_path / "table.csv").write_text("image,patient,class,split\na.png,p1,mass,train\nb.png,p2,normal,val\n")
    arguments = ["data", "check", "table", "--root", str(tmp_path)]
    status, out, _ = _run(monkeypatch, capsys, *arguments)
    assert status == 1
    assert "label mass" in out
    assert "train: 1 files that its tables name are not there, or empty: " in out
    assert "a.png" not in out
    assert str(tmp_path / "a.png") in _run(monkeypatch, capsys, *arguments, "--show-names")[1]
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"pixels")
    status, out, _ = _run(monkeypatch, capsys, *arguments)
    assert (status, out.splitlines()[-1]) == (0, "table: whole")
    status, _, err = _run(monkeypatch, capsys, "data", "check", "chexpert", "--root", str(tmp_path))
    assert status == 2
    assert err.startswith(f"imitate-ds: {tmp_path}: no train.csv; expected")

"""The command line: what goes where, and one clear line where something is wrong."""

import shutil
import sys

import pytest

from imitate_ds import cli


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

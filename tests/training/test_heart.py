"""Signs of life of one rank (of several, and the end of one that hangs: tests/test_pretrain.py)."""

import json
import time

import pytest

from imitate_ds.flight import flight
from imitate_ds.training.heart import Heart, beat_seconds
from imitate_ds.training.run_state import FAILURES, HEARTBEATS, Beat, read_beats


def test_a_beat_says_what_the_process_is_doing(tmp_path):
    (tmp_path / HEARTBEATS).mkdir()
    (tmp_path / HEARTBEATS / "rank-00009.json").write_text("{}")  # of a start with more ranks
    heart = Heart(tmp_path, timeout_s=60)
    try:
        flight.begin("optimizer step", 12)
        deadline = time.monotonic() + 20
        while not (beats := read_beats(tmp_path)) or beats[0].step != 12:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        heart.stop()
    (beat,) = beats
    assert (beat.rank, beat.doing) == (0, "optimizer step")
    assert abs(beat.time - time.time()) < 20


def test_a_failure_leaves_the_last_collectives(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    heart = Heart(tmp_path, timeout_s=60)
    try:
        with flight.collective("gather rows"):
            pass
        heart.report_failure(RuntimeError("Connection closed by peer"))
    finally:
        heart.stop()
    record = json.loads((tmp_path / FAILURES / "rank-00000.json").read_text())
    assert record["error"] == "RuntimeError: Connection closed by peer"
    assert record["collectives"][-1]["name"] == "gather rows"


def test_who_was_silent_is_said(tmp_path, capsys):
    heart = Heart(tmp_path, timeout_s=60)
    heart.stop()
    heart.ranks = 3
    for rank, ago in ((0, 0), (1, 30)):
        beat = Beat(rank, f"n{rank}", 1, 17, "forward and backward: gather rows", 0.0, time.time() - ago)
        (tmp_path / HEARTBEATS / f"rank-{rank:05d}.json").write_text(json.dumps(beat._asdict()))
    silent = heart._say_who_is_silent()
    said = capsys.readouterr().err
    assert [line for line in silent if line not in said] == []
    assert len(silent) == 2
    assert "rank 1 (n1) was last heard of 30 s before the others, in step 17, forward and backward: gather rows" in said
    assert "rank 2 was never heard of" in said
    assert "rank 0 (" not in said


def test_a_folder_that_cannot_be_written_is_said_once_and_is_no_error(tmp_path, capsys):
    heart = Heart(tmp_path, timeout_s=60)
    heart.stop()
    heart.run_dir = tmp_path / "file" / "x"
    (tmp_path / "file").write_text("")
    heart._beat()
    heart._beat()
    assert capsys.readouterr().err.count("cannot be written") == 1


@pytest.mark.parametrize(("ranks", "seconds"), [(1, 2.0), (100, 2.0), (512, 10.24)])
def test_many_ranks_beat_more_slowly(ranks, seconds):
    assert beat_seconds(ranks) == seconds

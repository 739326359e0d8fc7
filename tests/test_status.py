"""How a run stands, read from real files, of processes that live and that were killed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from imitate_ds import cli
from imitate_ds.status import duration, follow, read_status, read_statuses
from imitate_ds.training.checkpoint_files import begin_checkpoint, finish_checkpoint, write_synced

TRAIN = {"step": 40, "split": "train", "time": 1.0, "loss": 3.25, "image_findings": 1.5, "learning_rate": 2e-4}
TRAIN |= {
    "studies_per_second": 80.0,
    "data_wait_share": 0.125,
    "host_memory_mib": 900.0,
    "in_batch_accuracy/findings": 0.5,
}
TRAIN |= {"slowest_rank": 1, "lag_share": 0.25, "temperature": 0.07}
VAL = {"step": 30, "split": "val", "time": 1.0, "impression/image_to_text_R@5": 0.25}


@pytest.fixture
def run(tmp_path):
    """A run of two ranks at step 40 of 100, begun two minutes ago; both ranks are this process, and were just heard of."""
    folder = tmp_path / "run"
    folder.mkdir()
    say(folder)
    for rank in (0, 1):
        beat(folder, rank)
    lines = [json.dumps(record) for record in ({**TRAIN, "step": 30, "loss": 9.0}, VAL, TRAIN)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "split": "train", "lo')  # torn
    return folder


def say(folder, **values):
    record = {"state": "running", "step": 0, "total_steps": 100, "reason": "", "restarts": 1, "ranks": 2, "nodes": 1}
    record |= {"global_batch_size": 16, "job": "", "time": time.time() - 120, **values}
    (folder / "state.json").write_text(json.dumps(record, indent=0))


def beat(folder, rank, *, ago=0.0, **values):
    now = time.time() - ago
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": 42,
        "doing": "forward",
        "since": now,
    }
    (folder / "heartbeats").mkdir(exist_ok=True)
    path = folder / "heartbeats" / f"rank-{rank:05d}.json"
    path.write_text(json.dumps({**record, "time": now, **values}))


def save(folder, step):
    begun = begin_checkpoint(folder / "checkpoints", step)
    written = [write_synced(begun / "weights.bin", os.urandom(1000))]
    return finish_checkpoint(folder / "checkpoints", step, {"step": step, "state": {"step": step}}, written)


def test_a_run_that_goes_on(run):
    status = read_status(run)
    assert (status.state, status.step, status.total_steps, status.restarts) == ("running", 42, 100, 1)
    assert status.studies_per_second == 80
    assert status.seconds_left == pytest.approx((100 - 42) * 16 / 80)
    assert status.train == {"loss": 3.25, "image_findings": 1.5}  # the torn line is passed over, rates are no losses
    assert status.val == {"impression/image_to_text_R@5": 0.25}
    assert (status.learning_rate, status.data_wait_share, status.host_memory_mib) == (2e-4, 0.125, 900)
    assert (status.checkpoint, status.troubles, status.failures) == (None, (), ())


def test_killed_is_told_from_silent_by_the_processes_of_this_machine(run):
    ended = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    for rank in (0, 1):
        beat(run, rank, pid=ended.pid)
    assert read_status(run).state == "running"
    ended.kill()
    time.sleep(0.2)
    assert read_status(run).state == "killed"  # a zombie: nobody has waited for it
    ended.wait()
    assert read_status(run).state == "killed"
    for rank in (0, 1):
        beat(run, rank, pid=ended.pid, host="another", ago=100)
    assert read_status(run).state == "running"
    for rank in (0, 1):
        beat(run, rank, host="another", ago=200)
    status = read_status(run)
    assert (status.state, status.remark) == ("silent", "says it goes on, but not heard of for 3 min")
    assert status.seconds_left is None


def test_a_process_that_took_the_number_of_a_dead_rank_is_not_it(run):
    for rank in (0, 1):
        beat(run, rank, ago=3600)  # before this process, whose number they bear, was there
    assert read_status(run).state == "killed"


def test_ranks_to_look_at(run):
    say(run, ranks=5)
    beat(run, 0, step=50)
    beat(run, 1, step=50, since=time.time() - 90)
    beat(run, 2, step=47)
    beat(run, 3, step=50, host="n2", ago=30)
    whys = {trouble.rank: trouble.why for trouble in read_status(run).troubles}
    assert whys == {1: "long at it", 2: "behind, others are in step 50", 3: "silent", 4: "never heard of"}


def test_the_newest_checkpoint_that_verifies(run):
    for step in (10, 20, 30):
        save(run, step)
    assert read_status(run).checkpoint[0::3] == ("step-00000030", "step-00000030")
    newest = run / "checkpoints" / "step-00000030" / "weights.bin"
    flipped = bytearray(newest.read_bytes())
    flipped[500] ^= 1
    time.sleep(0.01)
    save(run, 40)
    newest = run / "checkpoints" / "step-00000040" / "weights.bin"
    newest.write_bytes(flipped)
    found = read_status(run).checkpoint
    assert (found.newest, found.good, found.verified) == ("step-00000040", "step-00000030", True)
    assert "SHA-256 differs" in found.problem
    unread = read_status(run, verify=False).checkpoint
    assert (unread.newest, unread.good, unread.verified) == ("step-00000040", None, False)


def test_a_failed_run_says_who_and_why(run):
    say(run, state="failed", step=42, reason="data.shards: gone", time=time.time())
    (run / "failures").mkdir()
    record = {"rank": 1, "host": "n2", "error": "OSError: disk quota exceeded\n  at line 3", "collectives": []}
    (run / "failures" / "rank-00001.json").write_text(json.dumps(record))
    (run / "bad_steps").mkdir()
    (run / "bad_steps" / "step-00000017.json").write_text("{}")
    status = read_status(run)
    assert (status.state, status.remark, status.bad_steps) == ("failed", "data.shards: gone", (17,))
    assert status.failures == ((1, "n2", "OSError: disk quota exceeded"),)
    assert status.troubles == ()  # what has ended is not silent


def test_half_written_files_count_as_not_yet_there(run):
    (run / "state.json").write_text('{"state": "runn')
    (run / "heartbeats" / "rank-00001.json").write_text("")
    (run / "metrics.jsonl").unlink()
    status = read_status(run)
    assert (status.state, status.step, status.train) == ("starting", 42, {})


def test_a_run_that_is_started_again_is_not_what_it_was(run):
    say(run, state="drained", step=42, time=time.time() - 1)
    assert read_status(run).state == "drained"  # its last sign of life may come after its last word
    say(run, state="drained", step=42, reason="SIGUSR1 on rank 1", time=time.time() - 300)
    assert (read_status(run).state, read_status(run).remark) == ("starting", "again; it was drained")
    for rank in (0, 1):
        beat(run, rank, ago=300)
    assert (read_status(run).state, read_status(run).remark) == ("drained", "SIGUSR1 on rank 1")
    (run / "state.json").unlink()
    shutil.rmtree(run / "heartbeats")
    assert read_status(run).state == "unknown"


def test_what_is_no_run_is_told_so(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_status(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no run; for the runs in it: imitate-ds status .*/\*"):
        read_status(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is no run; it holds no state\.json"):
        read_status(tmp_path / "empty")
    assert [status.state for status in read_statuses([run, tmp_path / "empty"])] == ["running", "no run"]


def test_watching_ends_with_the_run(run):
    looks = []
    for statuses in follow([run], verify=None, every_s=0.01):
        looks.append(statuses[0].state)
        say(run, state="drained" if len(looks) == 2 else "running", time=time.time())
        assert len(looks) < 10
    assert looks == ["running", "running", "drained"]


def test_the_command_prints_a_table_lines_or_json(run, tmp_path, monkeypatch, capsys):
    save(run, 40)
    whole = command(monkeypatch, capsys, str(run))
    for text in (
        "running",
        "42 of 100",
        "80.0 studies/s",
        "step-00000040 verifies",
        "12.5% of the time",
        "loss 3.25",
        "1, waited for 25.0%",
    ):
        assert text in whole
    other = tmp_path / "other"
    other.mkdir()
    say(other, state="finished", step=100)
    lines = command(monkeypatch, capsys, str(run), str(other))
    assert "running" in lines
    assert "finished" in lines
    values = [json.loads(line) for line in command(monkeypatch, capsys, "--json", str(run), str(other)).splitlines()]
    assert [value["state"] for value in values] == ["running", "finished"]
    assert values[0]["checkpoint"]["newest"] == "step-00000040"


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["imitate-ds", "status", *arguments])
    monkeypatch.setattr(cli.console, "width", 200)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return capsys.readouterr().out


def test_it_starts_without_torch(run):
    """On the login node of a cluster, on a shared disk, torch takes a minute."""
    program = (
        "import sys; from imitate_ds.cli import main; sys.argv = ['imitate-ds', 'status', sys.argv[1]]\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    began = time.monotonic()
    output = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 5  # 0.3 s, on a machine with nothing else to do


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (119, "119 s"), (125, "2 min"), (2 * 3600 + 300, "2 h 05 min"), (90 * 3600, "3 d 18 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text

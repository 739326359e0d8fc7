import json
import re

from imitate_ds.training.run_state import RUN_STATE, read_run_state, write_run_state


def test_what_is_not_given_stays_and_a_reason_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    write_run_state(tmp_path, "running", step=0, total_steps=100, restarts=2)
    write_run_state(tmp_path, "drained", step=40, reason="SIGTERM on rank 0")
    state = read_run_state(tmp_path)
    assert (state["state"], state["step"], state["total_steps"], state["restarts"], state["job"]) == (
        "drained",
        40,
        100,
        2,
        "17",
    )
    write_run_state(tmp_path, "running", step=40)
    assert read_run_state(tmp_path)["reason"] == ""


def test_a_shell_script_can_read_it(tmp_path):
    write_run_state(tmp_path, "finished", step=9)
    lines = (tmp_path / RUN_STATE).read_text().splitlines()
    assert re.fullmatch(r'\s*"state": "finished",?', next(line for line in lines if '"state"' in line))


def test_none_or_a_torn_one_says_nothing(tmp_path):
    assert read_run_state(tmp_path) == {}
    (tmp_path / RUN_STATE).write_text(json.dumps({"state": "running"})[:-3])
    assert read_run_state(tmp_path) == {}

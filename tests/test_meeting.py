"""Where ranks meet, and what they tell each other apart from tensors."""

import json
import os

import pytest

from imitate_ds.distributed import _describe_world, _listen
from tests.launching import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("meeting")
    run("tests.meeting_worker", str(out), ranks=3)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(3)]


def test_rank_0_listens_on_the_address_it_was_given_and_on_no_other(ranks):
    assert ranks[0]["addresses"] == ["127.0.0.1"]


def test_a_pulse_brings_what_all_said_one_exchange_before(ranks):
    for rank in ranks:
        assert rank["pulses"] == [None, *([[r, 10 * step] for r in range(3)] for step in range(3)), None]


def test_what_rank_0_finds_or_raises_is_everyones(ranks):
    assert {rank["from_main"] for rank in ranks} == {"rank 0 says"}
    assert {rank["raised"] for rank in ranks} == {"the disk of rank 0"}


def test_a_loopback_address_cannot_be_the_meeting_place_of_several_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"MASTER_ADDR = 'localhost': is 127\.0\.0\.1 on its own machine"):
        _listen("localhost", 0, 4)
    _listen("localhost", 0, 2).close()


def test_an_address_that_is_not_ours_or_not_known_is_said():
    with pytest.raises(OSError, match=r"MASTER_ADDR = '192\.0\.2\.1', MASTER_PORT = 29500: rank 0 cannot listen there"):
        _listen("192.0.2.1", 29500, 2)
    with pytest.raises(ValueError, match=r"MASTER_ADDR = 'no-such-host\.invalid': no such machine"):
        _listen("no-such-host.invalid", 29500, 2)


@pytest.fixture
def bare(monkeypatch):
    """An environment without a launcher; what a test adds to it is gone afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_batch_script_is_one_process_though_its_job_has_tasks(bare):
    """sbatch sets these without any srun (seen on Slurm 22.05)."""
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}.items():
        bare.setenv(name, value)
    _describe_world()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert "MASTER_ADDR" not in os.environ


def test_a_task_of_srun_is_a_rank(bare):
    slurm = {"PROCID": "3", "STEP_NUM_TASKS": "4", "NTASKS": "9", "LOCALID": "1", "JOB_ID": "20007"}
    for name, value in slurm.items():
        bare.setenv(f"SLURM_{name}", value)
    bare.setenv("MASTER_ADDR", "n1")
    bare.setenv("MASTER_PORT", "4")
    _describe_world()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]

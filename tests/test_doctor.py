"""The doctor on this machine, between real ranks, and before what hangs, dies or is damaged."""

import json
import os
import resource
import socket
import subprocess
import sys
import time

import pytest

from imitate_ds.data.shards import load_index
from imitate_ds.diagnosis import machine, software, storage
from imitate_ds.diagnosis.checks import CHECKS
from imitate_ds.diagnosis.finding import Finding, Options
from imitate_ds.diagnosis.helper import Helper
from imitate_ds.diagnosis.ranks import hear, under_launcher
from imitate_ds.doctor import examine, findings_table, is_broken, merge

pytestmark = pytest.mark.slow

DOCTOR = "from imitate_ds.cli import main; main()"


def test_two_ranks_examine_their_machine_and_the_line_between_them(phantom_shards, tmp_path):
    """As a launcher would start it; rank 0 speaks. The kernels of the loss run in Triton's interpreter."""
    arguments = ["doctor", "--json", "--shards", str(phantom_shards), "--run-dir", str(tmp_path / "runs" / "new")]
    processes = []
    for rank, environment in enumerate(worlds(2)):
        command = [sys.executable, "-c", DOCTOR, *arguments]
        env = {**os.environ, **environment, "TRITON_INTERPRET": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE if rank else None}
        processes.append(subprocess.Popen(command, env=env, text=True, **pipes))
    (output, _), (silence, _) = (process.communicate(timeout=120) for process in processes)
    findings = {row["name"]: row for row in json.loads(output)}
    assert silence == ""
    assert [process.returncode for process in processes] == [int(is_broken(map(finding_of, findings.values()))), 0]
    assert list(findings) == [*CHECKS, "collectives", "clocks"]
    assert "2 ranks on 1 machine(s), gloo over" in findings["collectives"]["finding"]
    assert findings["collectives"]["verdict"] in ("ok", "slow")  # another process may have the cores
    assert findings["clocks"]["finding"] == "one machine"
    assert findings["torch"]["verdict"] == "ok"
    assert findings["Triton kernels"]["finding"].startswith("interpreted and run in")
    assert "math" in findings["attention"]["finding"]
    assert "radiographs of 20 KB/s" in findings["shards, at random"]["finding"]
    assert findings["run folder, locks"]["verdict"] == "ok"
    assert os.listdir(tmp_path) == []  # it leaves nothing behind
    keys = {member.key for shard in load_index(phantom_shards).shards for member in shard.members}
    assert not [key for key in keys if key in output]


def test_alone_it_starts_two_ranks_itself():
    (finding,) = examine(["gloo ranks"], Options(timeout_s=60))
    assert finding.name == "gloo ranks"
    assert "2 ranks on 1 machine(s), gloo over" in finding.finding
    assert finding.verdict in ("ok", "slow")


def test_a_rank_that_nobody_meets_ends_with_what_it_waited_for():
    with Helper("ranks", "60", environment={**os.environ, **worlds(2)[0]}) as helper:
        *_, last = hear(helper, 4, who="rank 0", advice="look at rank 1")
    assert (last.finding, last.verdict) == ("rank 0: meeting the other ranks: no answer after 4 s", "broken")


def test_what_hangs_is_left_behind_and_the_rest_goes_on(tmp_path):
    os.mkfifo(tmp_path / "train-000000.tar")  # whoever opens it waits for ever, as on a dead file system
    (tmp_path / "index.json").write_text("{}")
    began = time.monotonic()
    hung, limits = examine(["shards, in sequence", "open files"], Options(shards=tmp_path, timeout_s=2))
    assert time.monotonic() - began < 10
    assert (hung.name, hung.finding, hung.verdict) == ("shards, in sequence", "no answer after 2 s", "broken")
    assert (limits.name, limits.verdict) == ("open files", CHECKS["open files"](Options()).verdict)


def test_what_dies_is_a_finding_with_its_last_words():
    died, limits = examine(["no check of ours", "processes"], Options(timeout_s=30))
    assert died == Finding("ended with status 1: KeyError: 'no check of ours'", "broken", "", "no check of ours")
    assert limits.name == "processes"


def test_what_is_not_there_is_broken_with_its_message(tmp_path):
    missing, empty = (examine(["shards, at random"], Options(shards=tmp_path / name))[0] for name in ("none", ""))
    assert (missing.verdict, empty.verdict) == ("broken", "broken")
    assert "none: no such folder; build one with 'imitate-ds shards build'" in missing.finding
    assert "no tars with an index.json" in empty.finding
    assert storage.random_read(Options()).verdict == "absent"  # nobody asked


def test_a_run_folder_that_anybody_may_write_to_is_broken(tmp_path):
    tmp_path.chmod(0o777)
    assert storage.run_dir_access(Options(run_dir=tmp_path)).verdict == "broken"
    tmp_path.chmod(0o755)
    readable = storage.run_dir_access(Options(run_dir=tmp_path))
    assert (readable.verdict, "chmod o-rx" in readable.advice) == ("ok", True)
    tmp_path.chmod(0o700)
    assert storage.run_dir_access(Options(run_dir=tmp_path)).advice == ""


def test_an_old_lock_of_a_compilation_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.write_text("")
    assert software.stale_locks(Options()).finding == "none stale"
    os.utime(lock, (time.time() - 3600,) * 2)
    stale = software.stale_locks(Options())
    assert (stale.verdict, stale.advice) == ("broken", f"rm -r {lock.parent}")


def test_few_open_files_are_slow():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        assert machine.open_files(Options()).verdict == "slow"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_versions_are_held_to_the_ranges_of_our_distribution():
    ranges = software._our_ranges()
    assert not ranges["torch"].contains("2.13.0+cpu")  # pyproject.toml says why
    assert software._against("2.13.0+cpu", ranges["torch"], "another").verdict == "broken"
    assert software._against("2.14.1+cu130", ranges["torch"], "another").verdict == "ok"
    assert software.package_version("imitate-no-such-package")(Options()).verdict == "broken"


def test_loopback_is_broken_only_between_machines(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert machine.host_name(Options()).verdict == "ok"
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert machine.host_name(Options()).verdict == "broken"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    assert "no such interface" in machine.host_name(Options()).finding


def test_the_network_in_use_is_read_from_the_sockets():
    before = machine.connected_interfaces()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert set(machine.connected_interfaces()) == {*before, "lo"}


def test_several_machines_are_one_table():
    ok, full = Finding("23 GiB", "ok", "", "shared memory"), Finding("64 MiB", "broken", "--shm-size", "shared memory")
    rows = merge([("n1", [ok]), ("n2", [full]), ("n3", [ok._replace(finding="22 GiB")])])
    assert [row.finding for row in rows] == ["n1: 23 GiB; as on n3", "n2: 64 MiB"]
    new, old = Finding("2.14.1", "ok", "", "torch"), Finding("2.11.0", "ok", "", "torch")
    assert not is_broken(merge([("n1", [new]), ("n2", [new])]))
    assert [row.verdict for row in merge([("n1", [new]), ("n2", [old])])] == ["broken", "broken"]
    assert findings_table(rows).row_count == 2


def test_a_batch_script_is_no_rank():
    assert under_launcher({"RANK": "0", "WORLD_SIZE": "2"})
    assert not under_launcher({"RANK": "0", "WORLD_SIZE": "1"})
    assert under_launcher({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"})
    assert not under_launcher({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})  # as sbatch leaves it, tried on 22.05
    assert not under_launcher({})


def worlds(ranks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)
    ]


def finding_of(row):
    return Finding(row["finding"], row["verdict"], row["advice"], row["name"])

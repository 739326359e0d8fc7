"""Launching without a cluster: what is said is what the scripts run, and what they decide by what a run says of itself."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from imitate_ds.config import load_run_config
from imitate_ds.launch import Plan, describe, launch, step_line

# Stand-ins for Slurm. srun keeps its command line, writes the state a run would leave, and ends as told.
FAKES = {
    "scontrol": """[[ $1 == show ]] && printf '%s\\n' a1 a2 || { echo "$@" >>"$SEEN/scontrol"; kill -KILL $PPID; }""",
    "srun": """printf '%s\\0' "$@" >"$SEEN/srun"; env -0 >"$SEEN/environment"
[[ -n ${LEAVES:-} ]] && echo "$LEAVES" >"$SEEN/run/state.json"
exit "${STATUS:-0}" """,
    "sbatch": """printf '%s\\0' "$@" >"$SEEN/sbatch"; env -0 >"$SEEN/environment" """,
    "ssh": """echo "$2" >>"$SEEN/ssh"; exec env -i SEEN="$SEEN" bash -c "${@:3}" """,
}


@pytest.fixture
def seen(tmp_path, monkeypatch) -> Path:
    """Stand-ins on the path, and the folder they write to."""
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path))
    for name in ("LAUNCHER", "RANKS_PER_NODE", "IMITATE_DS_CONTAINER", "IMITATE_DS_VENV", "IMITATE_DS_INTERFACE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run_file(tmp_path) -> Path:
    path = tmp_path / "file with blanks.yaml"
    path.write_text(f"name: other\noutput_dir: {tmp_path}\ndata: {{shards: none}}\n")
    return path


JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_CPUS_ON_NODE": "16", "SLURM_GPUS_ON_NODE": "4"}


def run_script(
    repository, seen, *arguments, script="launch/pretrain.sbatch", **environment
) -> subprocess.CompletedProcess:
    """A script of launch/, as if by Slurm."""
    command = ["bash", str(script), *arguments]
    given = {**os.environ, **JOB, "PYTHONPATH": str(repository), **environment}
    return subprocess.run(command, env=given, cwd=repository, capture_output=True, text=True)


def words(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]


def environment(seen: Path) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in words(seen / "environment"))


@pytest.mark.parametrize("entrance", ["pretrain", "finetune"])
@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_what_is_said_is_what_the_script_runs(repository, seen, run_file, launcher, entrance):
    if entrance == "finetune":
        run_file.write_text(run_file.read_text() + "task: {kind: detection}\nencoder: {init: none}\n")
    plan = Plan(run_file, ("name=run", "train.epochs=3"), launcher, "2", gpus_per_node=4, entrance=entrance)
    run_script(repository, seen, *plan.arguments, script=plan.script, LAUNCHER=launcher)
    line = step_line(plan, seen / "run").partition("srun ")[2]
    values = environment(seen)
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], env={**values, **JOB}, capture_output=True, text=True
    )
    assert said.stdout.split("\0")[:-1] == words(seen / "srun")
    assert (values["MASTER_ADDR"], values["IMITATE_DS_CACHE"][:5]) == ("a1", "/tmp/")
    assert 10000 <= int(values["MASTER_PORT"]) < 30000
    if launcher == "deepspeed":
        assert (seen / "run" / "hostfile").read_text() == "a1 slots=4\na2 slots=4\n"
    assert (seen / "run").stat().st_mode & 0o777 == 0o700


def test_in_a_container_with_an_interface_after_a_requeue(repository, seen, run_file):
    given = {"IMITATE_DS_CONTAINER": "env IN=image.sif", "IMITATE_DS_INTERFACE": "ib0", "SLURM_RESTART_COUNT": "2"}
    run_script(repository, seen, "--config", str(run_file), "--set", "name=run", RANKS_PER_NODE="1", **given)
    step = words(seen / "srun")
    assert step[step.index("--cpus-per-task=16") + 1 :][:5] == [
        "env",
        "IN=image.sif",
        "python",
        "-m",
        "imitate_ds.pretrain",
    ]
    assert step[-2:] == ["--set", "train.resume=true"]
    assert (environment(seen)["NCCL_SOCKET_IFNAME"], environment(seen)["GLOO_SOCKET_IFNAME"]) == ("ib0", "ib0")


def test_an_array_takes_its_run_from_a_list(repository, seen, run_file):
    (seen / "runs.txt").write_text(f"first.yaml\n{run_file}\n")
    given = {"RUNS": str(seen / "runs.txt"), "SLURM_ARRAY_TASK_ID": "1"}
    run_script(repository, seen, "--set", "name=run", **given)
    step = words(seen / "srun")
    assert step[step.index("--config") :] == ["--config", str(run_file), "--set", "name=run"]
    beyond = run_script(repository, seen, **{**given, "SLURM_ARRAY_TASK_ID": "2"})
    assert (beyond.returncode, "has no line for task 2" in beyond.stderr) == (2, True)
    (seen / "srun").unlink()
    (seen / "run" / "state.json").write_text('{\n"state": "finished",\n"job": "70"\n}\n')
    again = run_script(repository, seen, "--set", "name=run", **given)
    assert (again.returncode, "has finished already; nothing to do" in again.stdout) == (0, True)
    assert not (seen / "srun").exists()


def state(name: str, job: str = "71", **values) -> str:
    return json.dumps({"reason": "", **values, "state": name, "job": job}, indent=0)


@pytest.mark.parametrize(
    ("leaves", "status", "again"),
    [
        (state("finished"), "0", False),
        (state("drained"), "0", True),
        (state("drained"), "143", True),  # another rank did not end in time
        (state("running"), "137", True),
        (state("failed", status=1), "1", True),
        (state("failed", status=3), "137", True),
        (state("failed", status=2), "143", False),  # the others were killed
        (state("running"), "2", False),
        ("", "2", False),  # refused at the door
        ("", "143", True),
        (state("finished", job="70"), "137", True),  # an earlier job's word
    ],
)
def test_whether_it_goes_on(repository, seen, run_file, leaves, status, again):
    (seen / "run").mkdir()
    done = run_script(repository, seen, "--config", str(run_file), "--set", "name=run", LEAVES=leaves, STATUS=status)
    assert (seen / "scontrol").exists() == again, done.stdout + done.stderr
    if again:
        assert (seen / "scontrol").read_text() == "requeue 71\n"
    elif status == "2" or "failed" in leaves:
        assert done.returncode == 2


def test_starts_without_a_new_checkpoint_are_counted(repository, seen, run_file):
    latest = seen / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    went_on = []
    for checkpoint in ("", "step-1", "step-1", "step-2", "step-2", "step-2", "step-2"):
        if checkpoint:
            latest.write_text(checkpoint + "\n")
        (seen / "scontrol").unlink(missing_ok=True)
        run_script(repository, seen, "--config", str(run_file), "--set", "name=run", STATUS="1", MAX_RESTARTS="3")
        went_on.append((seen / "scontrol").exists())
    assert went_on == [True, True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"SLURM_GPUS_ON_NODE": ""}, "no GPUs on this node"),
        ({"SLURM_CPUS_ON_NODE": "2"}, "2 CPU(s) for 4 ranks; ask for more with sbatch --exclusive"),
        ({"LAUNCHER": "mpi"}, "LAUNCHER = mpi: must be srun or deepspeed"),
        ({"IMITATE_DS_VENV": "/nowhere"}, "IMITATE_DS_VENV = /nowhere: no bin/python"),
    ],
)
def test_what_the_script_refuses(repository, seen, run_file, given, message):
    done = run_script(repository, seen, "--config", str(run_file), **given)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (seen / "srun").exists()


def test_a_wrong_run_file_is_refused_before_anything_is_started(repository, seen, run_file):
    done = run_script(repository, seen, "--config", str(run_file), "--set", "optim.lrr=1")
    assert (done.returncode, "did you mean lr?" in done.stderr, (seen / "srun").exists()) == (2, True, False)


def test_it_submits_what_it_said(repository, seen, run_file, monkeypatch, capfd):
    monkeypatch.chdir(repository)
    plan = Plan(run_file, ("seed=1",), "deepspeed", "2-4", gpus_per_node=8, options=("--time=1-0",))
    assert launch(plan, dry_run=True) == 0
    assert not (seen / "sbatch").exists()
    assert launch(plan, dry_run=False) == 0
    sent = ["--nodes=2-4", "--gpus-per-node=8", "--exclusive", "--time=1-0", "launch/pretrain.sbatch", *plan.arguments]
    assert words(seen / "sbatch") == sent
    assert {"LAUNCHER": "deepspeed", "RANKS_PER_NODE": "8"}.items() <= environment(seen).items()
    assert "4 node(s) x 8 = 32; global batch 4096" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nodes": "4-2"}, "--nodes 4-2: must be a number from 1, or a range"),
        ({"nodes": "all"}, "--nodes all: must be"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0: no ranks"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1: must not be negative"),
        ({"ranks_per_node": 9}, "--ranks-per-node 9: must be at most --gpus-per-node 8"),
        ({"cpus_per_node": 4}, "--cpus-per-node 4: must be at least one for each of 8 ranks"),
        ({"launcher": "mpi"}, "--launcher mpi: must be srun, deepspeed or local"),
        ({"launcher": "local", "nodes": "2"}, "--launcher local: is one machine"),
        ({"overrides": ("optim.lrr=1",)}, "did you mean lr?"),
    ],
)
def test_refusals_name_option_value_and_what_to_do(run_file, plan, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        launch(Plan(**{"config": run_file, "gpus_per_node": 8, **plan}), dry_run=True)


def test_outside_the_repository_and_without_slurm(run_file, tmp_path, repository, monkeypatch):
    plan = Plan(run_file, gpus_per_node=8)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="start runs in the folder that holds launch/"):
        launch(plan, dry_run=False)
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="sbatch is not here; submit on a login node"):
        launch(plan, dry_run=False)


def test_locally(run_file):
    said = describe(Plan(run_file, launcher="local", gpus_per_node=2), load_run_config(run_file))
    assert f"RANKS=2 launch/pretrain.sh --config '{run_file}'" in said
    assert f"deepspeed --num_gpus=2 --master_port=29500 --module imitate_ds.pretrain --config '{run_file}'" in said


def test_the_run_file_says_which_entrance(run_file, capsys):
    run_file.write_text(run_file.read_text() + "task: {kind: detection}\nencoder: {init: none}\n")
    assert launch(Plan(run_file, launcher="local", gpus_per_node=2), dry_run=True) == 0
    said = capsys.readouterr().out
    assert f"RANKS=2 ENTRANCE=imitate_ds.finetune launch/pretrain.sh --config '{run_file}'" in said
    assert "--module imitate_ds.finetune" in said
    assert launch(Plan(run_file, gpus_per_node=2), dry_run=True) == 0
    assert "launch/finetune.sbatch" in capsys.readouterr().out


def test_hosts_of_a_file_over_ssh(repository, seen, run_file):
    """Two hosts, which are this machine twice; ranks that only say who they are."""
    (seen / "hosts").write_text("# the cluster\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    (seen / "who.py").write_text(
        "import os, sys\nrank = os.environ['RANK']\nnames = ('WORLD_SIZE', 'MASTER_ADDR', 'DS_ACCELERATOR', 'AWS_SECRET')\n"
        "open(os.environ['SEEN'] + '/rank' + rank, 'w').write(repr([sys.argv[2:], *map(os.environ.get, names)]))\n"
    )
    given = {
        "HOSTFILE": str(seen / "hosts"),
        "ENTRANCE": "who",
        "PYTHONPATH": str(seen),
        "DS_ACCELERATOR": "cpu",
        "AWS_SECRET": "x",
    }
    given |= {"PATH": f"{seen / 'bin'}:{repository / '.venv/bin'}:/usr/bin:/bin", "MASTER_PORT": "29511"}
    command = ["launch/pretrain.sh", "--config", str(run_file), "--set", "name=a b"]
    done = subprocess.run(command, env={**os.environ, **given}, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted((seen / "ssh").read_text().split()) == ["127.0.0.1", "localhost"]
    expected = repr([["--config", str(run_file), "--set", "name=a b"], "2", "localhost", "cpu", None])
    assert [(seen / f"rank{rank}").read_text() for rank in (0, 1)] == [expected, expected]

"""Training on a real Slurm whose nodes fail: no study is lost or seen twice, and no loss differs from the undisturbed run's.

Steps are made longer (STEP_SECONDS) where a fault has to hit one.
"""

import json
import time

import pytest
import yaml

from imitate_ds.data.shards import verify_shards
from imitate_ds.scale import scale
from imitate_ds.training.run_state import read_run_state
from tests.cluster.conftest import STEPS
from tests.cluster.runs import BATCH, Run
from tests.cluster.slurm import REPOSITORY, wait_for
from tests.cluster.testimony import losses

pytestmark = pytest.mark.cluster
SLOWLY = {"STEP_SECONDS": "0.25"}


def clean(verdict, tolerance: float = 0.0) -> None:
    assert (verdict.steps, verdict.studies) == (STEPS, STEPS * BATCH)
    assert (verdict.lost, verdict.foreign, verdict.losses_missing) == (0, 0, 0)
    assert verdict.loss_difference <= tolerance


def test_both_launchers_train_alike(start, undisturbed):
    run = start("launcher", LAUNCHER="deepspeed")
    run.wait_for_end()
    assert run.state["ranks"] == undisturbed.state["ranks"] == 2
    clean(run.verdict(undisturbed))
    clean(undisturbed.verdict(undisturbed))


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_asked_to_end_it_saves_and_goes_on(cluster, start, undisturbed, launcher):
    """By the signal before the time limit, and by a more urgent job that needs the nodes."""
    run = start(f"asked-{launcher}", LAUNCHER=launcher, **SLOWLY)
    run.wait_for_step(13)
    cluster.run("scancel", "--batch", "--signal=USR1", str(run.job))
    cluster.wait_start(run.job, restarts=1)
    run.wait_for_step(37)
    options = ("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null")
    urgent = cluster.submit("tests/cluster/sleep.sbatch", options=options, environment={})
    cluster.wait(urgent)
    run.wait_for_end(restarts=2)
    verdict = run.verdict(undisturbed)
    clean(verdict)
    assert verdict.repeated <= 2  # the step that was next when the others agreed to end; none that was done


def test_a_node_loses_power(cluster, start, undisturbed):
    """First a node with a rank only, then the one that runs the batch script too."""
    run = start("power", options=("--nodes=2", "--nodelist=n1,n2"), **SLOWLY)
    for node, step in ((2, 14), (1, 36)):
        run.wait_for_step(step)
        cluster.crash(node)
        cluster.wait_down(node)
        cluster.boot(node)
    run.wait_for_end(restarts=2)
    clean(run.verdict(undisturbed))


def test_a_cable_is_pulled_for_twenty_seconds(cluster, start, undisturbed):
    run = start("cable", options=("--nodes=2", "--nodelist=n1,n2"), **SLOWLY)
    run.wait_for_step(15)
    cluster.cut(2)
    time.sleep(20)
    cluster.heal(2)
    run.wait_for_end()
    clean(run.verdict(undisturbed))


def test_a_cable_stays_out(cluster, start, undisturbed):
    """It goes on with the third node, and the rank that nobody can reach ends itself."""
    run = start("unplugged", "train.timeout_s=20", options=("--nodes=2",), **SLOWLY)
    run.wait_for_step(15)
    lost = int(cluster.hosts(run.job)[1].removeprefix("n"))
    is_there = "pgrep -f '^[^ ]*python[0-9.]* -m tests' || true"
    assert cluster.node(lost, "sh", "-c", is_there)
    cluster.cut(lost)
    cluster.wait_start(run.job, restarts=1)
    run.wait_for_step(30)
    wait_for(lambda: not cluster.node(lost, "sh", "-c", is_there), 60, what="the end of the rank that is cut off")
    cluster.heal(lost)
    run.wait_for_end(restarts=1)
    cluster.wait_idle(3)
    clean(run.verdict(undisturbed))


def test_it_goes_on_with_the_nodes_that_are_left(cluster, start, undisturbed):
    """On one node of two, and on both when it is back. Other sums of the same numbers: equal up to rounding."""
    run = start("fewer", options=("--nodes=1-2", "--exclude=n3"), **SLOWLY)
    run.wait_for_step(14)
    cluster.crash(2)
    cluster.wait_start(run.job, restarts=1)
    run.wait_for_step(24)
    assert run.state["ranks"] == 1
    cluster.boot(2)
    cluster.wait_idle(2)  # n2, n3
    cluster.run("scancel", "--signal=USR1", str(run.job))
    run.wait_for_end(restarts=2)
    assert run.state["ranks"] == 2
    clean(run.verdict(undisturbed), tolerance=1e-5)


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_what_is_over_and_what_goes_on(cluster, start, launcher):
    """Runs that only pretend: killed, drained, failed for reasons that may pass, and for one that will not."""
    run = start(
        f"pretend-{launcher}", entrance="pretend", BEHAVIOUR="killed,drained,failed1,failed2", LAUNCHER=launcher
    )
    record = cluster.wait(run.job)
    assert (record["JobState"], record["Restarts"], record["ExitCode"]) == ("FAILED", "3", "2:0")
    seen = json.loads((run.folder / "start-3.rank-1.json").read_text())
    assert seen["argv"][-2:] == ["--set", "train.resume=true"]
    assert (seen["MASTER_ADDR"], seen["IMITATE_DS_CACHE"][:5]) == ("n1", "/tmp/")


def test_the_gpus_of_a_node_are_its_ranks(cluster, start):
    run = start(
        "gpus", entrance="pretend", BEHAVIOUR="finished", RANKS_PER_NODE="", options=("--nodes=2", "--gpus-per-node=2")
    )
    run.wait_for_end()
    assert len(list(run.folder.glob("start-0.rank-*.json"))) == 4


def test_before_the_time_limit_it_saves_and_queues_again(cluster, start):
    run = start(
        "limit", entrance="pretend", BEHAVIOUR="wait,finished", options=("--nodes=2", "--time=1", "--signal=B:USR1@45")
    )
    run.wait_for_end(restarts=1)
    assert "the run is drained" in run.output.read_text()


def test_cancelled_it_saves_and_stays_away(cluster, start):
    run = start("cancelled", entrance="pretend", BEHAVIOUR="wait,finished")
    wait_for(lambda: (run.folder / "state.json").exists(), 30, what="the run")
    cluster.run("scancel", str(run.job))
    record = cluster.wait(run.job)
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")
    wait_for(lambda: run.state["state"] == "drained", 10, what="the end of the run")


def test_an_array_builds_shards_in_parts(cluster, tmp_path):
    options = ("--array=0-2", "--cpus-per-task=1", f"--output={tmp_path}/%a.out")
    arguments = ("phantom", "--out", str(tmp_path / "shards"), "--option", "studies=40", "--image-size", "32")
    job = cluster.submit(
        "launch/array_build.sbatch", *arguments, options=options, environment={"PYTHONPATH": str(REPOSITORY)}
    )
    cluster.wait(job)
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", str(job)), 60, what="all parts")
    assert verify_shards(tmp_path / "shards") == [], (tmp_path / "2.out").read_text()


def test_a_sweep_is_an_array_whose_runs_are_trained_once(cluster, phantom_shards, tmp_path):
    """What `imitate-ds scale --slurm` says is submitted; again while a run goes on; and again when all have finished."""
    path, said = tmp_path / "sweep.yaml", []
    train = {"epochs": 100, "max_steps": 150, "log_every": 10, "eval_every": 0, "images_every": 0}
    model = {"joint_dim": 16, "text_hidden": 16, "aggregation": {"pool": 2, "heads": 2}}
    run = {"data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0}, "model": model, "train": train}
    axes = {"encoders": ["test_resnet"], "batch_sizes": [16], "shares": [0.5, 1.0], "seeds": [3]}
    path.write_text(yaml.safe_dump({"name": "sweep", "output_dir": str(tmp_path), "axes": axes, "run": run}))
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANKS_PER_NODE": "1", "SLURM_WAIT": "10"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "RUNS": str(tmp_path / "sweep/runs.txt")}

    def submit(array: str, output: str) -> int:
        script, *arguments = said[1].partition(" ... ")[2].split()
        options = (f"--array={array}", "--nodes=1", "--cpus-per-task=1", f"--output={tmp_path}/{output}-%a.out")
        return cluster.submit(script, *arguments, options=options, environment=environment)

    def wait(job: int) -> None:
        wait_for(lambda: not cluster.run("squeue", "-h", "-j", str(job)), 120, what=f"the end of job {job}")

    scale(path, slurm=True, say=said.append)
    assert "sbatch --array=0-1 ... " in said[1]
    first, folder = submit("0-1", "first"), tmp_path / "sweep/runs/test_resnet-b16-global-d0.5-s3"
    wait_for(lambda: read_run_state(folder).get("state") == "running", 60, what="the first run")
    wait(submit("0", "meanwhile"))
    assert "being trained by job" in (tmp_path / "meanwhile-0.out").read_text()
    wait(first)
    wait(submit("0-1", "again"))
    for number in range(2):
        assert "status 0; the run is finished, step 150" in (tmp_path / f"first-{number}.out").read_text()
        assert "has finished already; nothing to do" in (tmp_path / f"again-{number}.out").read_text()
    scale(path, slurm=True, say=said.append)
    assert said[-2].endswith("none is left to submit")
    assert "2 of 2 runs have finished" in (tmp_path / "sweep/scaling.html").read_text()


def test_fine_tuning_asked_to_end_goes_on(cluster, phantom_shards, tmp_path):
    """launch/finetune.sbatch on two nodes: one job that is asked to end, one that is left alone, and the same figures."""
    values = {
        "output_dir": str(tmp_path),
        "encoder": {"model": {"image_encoder": "resnet10t"}, "train": "full"},
        "data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0},
        "task": {"kind": "classification", "targets": ["cardiomegaly", "nodule"]},
        "train": {"global_batch_size": 36, "batch_norm": "freeze", "epochs": 12, "log_every": 1, "patience": 0},
    }
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANKS_PER_NODE": "1", "SLURM_WAIT": "10"}
    environment["PYTHONPATH"] = str(REPOSITORY)

    def submit(name: str) -> Run:
        path, output = tmp_path / f"{name}.yaml", tmp_path / f"{name}.out"
        path.write_text(yaml.safe_dump({"name": name, **values}))
        options = ("--nodes=2", "--cpus-per-task=2", f"--output={output}")
        job = cluster.submit("launch/finetune.sbatch", "--config", str(path), options=options, environment=environment)
        return Run(cluster, job, tmp_path / name, tmp_path, output)

    disturbed = submit("asked")
    disturbed.wait_for_step(13)
    cluster.run("scancel", "--batch", "--signal=USR1", str(disturbed.job))
    disturbed.wait_for_end(restarts=1)
    alone = submit("alone")
    alone.wait_for_end()
    assert losses(disturbed.folder) == losses(alone.folder)
    one, other = (json.loads((run.folder / "results.json").read_text()) for run in (disturbed, alone))
    assert one["results"][0]["metrics"] == other["results"][0]["metrics"]

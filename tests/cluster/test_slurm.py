"""Training on a real Slurm whose nodes fail: no study is lost or seen twice, and no loss differs from the undisturbed run's.

Steps are made longer (STEP_SECONDS) where a fault has to hit one.
"""

import time

import pytest

from tests.cluster.conftest import BATCH, STEPS

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

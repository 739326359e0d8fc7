"""A run on a real Slurm of three nodes through thirty random faults: is a study lost or seen twice, and what does each cost?

    PYTHONPATH=. python benchmarks/soak.py [--faults 30]

The cluster is the throw-away one of tests/cluster: real daemons, and nodes with network, processes and power of their own, on
this machine; needs root. launch/pretrain.sbatch runs on two nodes or three, as many as there are, one rank each. Again and again,
a random number of steps after the run has recovered (now and then while it starts again after a requeue), one fault of a random
kind strikes at a random node. A node without power is booted when the run has gone on without it, and used from the next start.
The time to recover goes from the fault to the tenth step that had not been made before it (fewer are also made by a run that is
on its way out): noticing, saving where there is somebody left to save, SLURM_WAIT (10 s here), the queue, starting again,
repeating what was not saved, ten steps. Slurm's own wait before a requeued job may begin (two minutes) is cut short.

Then the run is left alone to its end. The studies of every step that counts are compared with the plan, and every loss with that
of a run that nothing happened to; the rate is so low that training does not amplify the rounding of sums over two nodes or three.
Writes benchmarks/results/soak.json; stops with status 1 where anything was lost, seen twice or left running.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import REPOSITORY, machine, provenance

from imitate_ds.data.shard_index import load_index
from imitate_ds.data.text_cache import text_info
from tests.cluster.runs import Run, submit
from tests.cluster.slurm import Cluster, wait_for, why_not_here

NODES, FEWEST = 3, 2
STEP_SECONDS = 0.2  # added to every step, so that a fault hits one
QUIET_STEPS = (8, 22)  # between recovery and the next fault
RECOVERED_STEPS = 10
SETTINGS = ("optim.lr=2e-6",)
RANK = "^[^ ]*python[0-9.]* -m tests[.]cluster[.]witness"  # and the workers forked from it, which are younger


class Site:
    """Where a fault strikes: the cluster, the run, and the node that was drawn."""

    def __init__(self, run: Run, chance: random.Random):
        self.cluster, self.run, self.chance = run.cluster, run, chance
        self.node = 0
        self.dark = 0  # the node without power, if there is one

    def draw_node(self) -> None:
        self.node = int(self.chance.choice(self.cluster.hosts(self.run.job)).removeprefix("n"))

    def signal_rank(self, name: str) -> None:
        script = f"pkill -{name} -o -f '{RANK}' && echo sent; true"
        wait_for(lambda: self.cluster.node(self.node, "sh", "-c", script), 60, what=f"a rank on n{self.node}")

    def lose_power(self) -> None:
        self.cluster.crash(self.node)
        self.dark = self.node

    def give_power(self) -> None:
        if self.dark:
            self.cluster.wait_down(self.dark)
            self.cluster.boot(self.dark)
            self.cluster.wait_up(self.dark)
            self.dark = 0

    def pull_cable(self) -> None:
        self.cluster.cut(self.node)
        time.sleep(self.chance.uniform(5, 20))
        self.cluster.heal(self.node)

    def be_preempted(self) -> None:
        options = ("--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null")
        urgent = self.cluster.submit("tests/cluster/sleep.sbatch", options=options, environment={})
        self.cluster.wait(urgent)

    def be_requeued(self) -> None:
        self.cluster.run("scontrol", "requeue", str(self.run.job))

    def near_time_limit(self) -> None:
        self.cluster.run("scancel", "--batch", "--signal=USR1", str(self.run.job))


FAULTS: dict[str, Callable[[Site], None]] = {
    "a rank is killed (SIGKILL)": lambda site: site.signal_rank("KILL"),
    "a rank is asked to end (SIGTERM)": lambda site: site.signal_rank("TERM"),
    "a node loses power": Site.lose_power,
    "a cable is pulled for 5 to 20 s": Site.pull_cable,
    "a more urgent job takes the nodes": Site.be_preempted,
    "an administrator requeues the job": Site.be_requeued,
    "the time limit comes near (USR1)": Site.near_time_limit,
}


def soak(run: Run, faults: int, chance: random.Random) -> list[dict]:
    """All faults, one after the other; what each was, and what it cost."""
    kinds = [*FAULTS] * (faults // len(FAULTS)) + chance.sample([*FAULTS], faults % len(FAULTS))
    chance.shuffle(kinds)
    site, events, began = Site(run, chance), [], time.monotonic()
    run.wait_for_step(5, limit=240)
    for number, kind in enumerate(kinds, 1):
        while_starting = number > 1 and chance.random() < 0.2
        if not while_starting:
            run.wait_for_step(run.step + chance.randint(*QUIET_STEPS), limit=240)
        event = strike(site, kind, while_starting)
        events.append(event)
        print(
            f"{number:2d}  {time.monotonic() - began:5.0f} s  step {event['step']:4d}  {json.dumps(event)}", flush=True
        )
    return events


def strike(site: Site, kind: str, while_starting: bool) -> dict:
    run, chance = site.run, site.chance
    if while_starting:
        before = restarts(run)
        run.cluster.run("scontrol", "requeue", str(run.job))
        run.cluster.wait_start(run.job, restarts=before + 1)
        time.sleep(chance.uniform(0, 8))
    site.draw_node()
    step, before, struck = run.step, restarts(run), time.monotonic()
    FAULTS[kind](site)
    released = wait_for_recovery(run, step)
    seconds = round(time.monotonic() - struck, 1)
    site.give_power()
    now, before_now = processes_of_ranks(run)
    return {
        "fault": kind,
        "when": "starting" if while_starting else "training",
        "node": site.node,
        "step": step,
        "seconds_to_recover": seconds,
        "ranks": run.state["ranks"],
        "restarts": restarts(run) - before,
        "released_by_hand": released,
        "running": now,
        "left_running": before_now,
    }


def restarts(run: Run) -> int:
    return int(run.cluster.job(run.job)["Restarts"])


def wait_for_recovery(run: Run, step: int) -> bool:
    """Until new steps are made. True where Slurm held the job, and it had to be released."""
    released = False

    def recovered() -> bool:
        nonlocal released
        run.cluster.kick(run.job)
        if run.step >= step + RECOVERED_STEPS:
            return True
        record = run.cluster.job(run.job)
        if record["JobState"] == "PENDING" and record["Reason"] in (
            "JobHeldAdmin",
            "JobHeldUser",
            "launch_failed_requeued_held",
        ):
            run.cluster.run("scontrol", "release", str(run.job))
            released = True
        if record["JobState"] in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT", "NODE_FAIL"):
            raise SystemExit(f"the job has ended: {record['JobState']}\n{run.output.read_text()[-4000:]}")
        return False

    wait_for(recovered, 300, what="recovery")
    return released


def processes_of_ranks(run: Run) -> tuple[int, int]:
    """How many there are on all nodes, workers included: of the start that runs now, and of those before it."""
    count = "tr '\\0' '\\n' </proc/$p/environ | grep ^SLURM_RESTART_COUNT= || echo =0"  # the first start has none
    script = f"for p in $(pgrep -f '{RANK}'); do {count}; done"
    starts: list[int] = []
    for node in range(1, NODES + 1):
        starts += [int(line.partition("=")[2]) for line in run.cluster.node(node, "sh", "-c", script).split()]
    now = restarts(run)
    return starts.count(now), len(starts) - starts.count(now)


def summary(events: list[dict]) -> list[dict]:
    """Of each kind: how often, what it cost."""
    rows = []
    for kind in FAULTS:
        times = sorted(event["seconds_to_recover"] for event in events if event["fault"] == kind)
        if times:
            row = {
                "fault": kind,
                "times": len(times),
                "median_seconds": round(median(times), 1),
                "most_seconds": times[-1],
            }
            rows.append(row | {"restarts": sum(event["restarts"] for event in events if event["fault"] == kind)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=Path, default=REPOSITORY / "shards" / "phantom")
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs and the logs of the cluster; a temporary one without"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "soak.json")
    given = parser.parse_args()
    if lacking := why_not_here():
        raise SystemExit(lacking)
    try:
        text_info(load_index(given.shards))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--shards: {error}; 'make shards/phantom/text.json' makes phantoms") from None
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        (folder / "runs").mkdir(parents=True)
        record = measure(given, folder)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "events"}, indent=1))
    wrong = ("lost", "seen_twice_or_foreign", "losses_missing", "left_running")
    if any(record[name] for name in wrong) or not record["fewest_processes_seen"]:
        raise SystemExit(1)


def measure(given: argparse.Namespace, folder: Path) -> dict:
    steps = (QUIET_STEPS[1] + RECOVERED_STEPS + 2) * (given.faults + 1)
    began = time.monotonic()
    with Cluster(folder / "cluster", NODES) as cluster:
        settings = (*SETTINGS, f"train.max_steps={steps}")

        def start(name: str, nodes: str, **environment: str) -> Run:
            options = (f"--nodes={nodes}",)
            return submit(
                cluster, folder / "runs", given.shards, name, *settings, options=options, environment=environment
            )

        run = start("soak", f"{FEWEST}-{NODES}", STEP_SECONDS=str(STEP_SECONDS))
        events = soak(run, given.faults, random.Random(given.seed))
        run.wait_for_end(limit=900)
        minutes = (time.monotonic() - began) / 60
        all_restarts = restarts(run)
        undisturbed = start("undisturbed", str(NODES))
        undisturbed.wait_for_end(limit=900)
        verdict = run.verdict(undisturbed)
    return {
        **provenance(),
        "machine": machine(torch.device("cpu")),
        "faults": len(events),
        "minutes": round(minutes, 1),
        "restarts": all_restarts,
        "steps": verdict.steps,
        "studies": verdict.studies,
        "lost": verdict.lost,
        "seen_twice_or_foreign": verdict.foreign,
        "steps_done_again": verdict.repeated,
        "losses_missing": verdict.losses_missing,
        "largest_difference_of_a_loss": verdict.loss_difference,
        "left_running": sum(event["left_running"] for event in events),
        "fewest_processes_seen": min(event["running"] for event in events),
        "ranks": sorted({event["ranks"] for event in events}),
        "by_fault": summary(events),
        "events": events,
    }


if __name__ == "__main__":
    main()

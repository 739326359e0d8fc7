"""A throw-away Slurm for tests, and what can happen to its nodes. The work is cluster.sh's."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
WAITING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED", "STOPPED", "SUSPENDED"}


def why_not_here() -> str:
    """What this machine lacks for a cluster of its own; empty where nothing is missing."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := [name for name in programs if not shutil.which(name, path=path)]:
        return f"not installed: {', '.join(missing)} (make test-slurm installs them on Debian)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    trial = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True)
    return "this machine lets nobody make namespaces" if trial.returncode else ""


class Cluster:
    """Nodes n1, n2, ... with two CPUs and two pretended GPUs each."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "CLUSTER_DIR": str(folder), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def __enter__(self) -> "Cluster":
        try:
            self._do("up", str(self.nodes))
        except RuntimeError:
            self._do("down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._do("down")

    def run(self, *command: str, **environment: str) -> str:
        """What a command prints where the controller lives."""
        return self._do("exec", *command, **environment)

    def node(self, node: int, *command: str) -> str:
        """What a command prints on a node."""
        return self._do("node", str(node), *command)

    def crash(self, node: int) -> None:
        """Power off."""
        self._do("crash", str(node))

    def wait_down(self, node: int, limit: float = 60) -> None:
        """Until Slurm has given a node up."""
        wait_for(
            lambda: "down" in self.run("sinfo", "-h", "-n", f"n{node}", "-o", "%T"),
            limit,
            what=f"n{node} to be given up",
        )
        # No machine boots faster, and what Slurm still wants to tell the dead one must not reach the new one.
        time.sleep(5)

    def wait_up(self, node: int, limit: float = 60) -> None:
        """Until Slurm would use a node again."""
        wait_for(
            lambda: "idle" in self.run("sinfo", "-h", "-n", f"n{node}", "-o", "%T"), limit, what=f"n{node} to be back"
        )

    def boot(self, node: int) -> None:
        self._do("boot", str(node))

    def cut(self, node: int) -> None:
        """Pull the network cable."""
        self._do("cut", str(node))

    def heal(self, node: int) -> None:
        self._do("heal", str(node))

    def submit(self, script: str, *arguments: str, options: tuple[str, ...], environment: Mapping[str, str]) -> int:
        """sbatch; the number of the job."""
        printed = self.run("sbatch", "--parsable", *options, script, *arguments, **environment)
        return int(printed.strip())

    def job(self, job: int) -> dict[str, str]:
        """Slurm's record of a job: JobState, Reason, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", str(job))))

    def hosts(self, job: int) -> list[str]:
        """The nodes that a job runs on; the first has its script."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def wait(self, job: int, limit: float = 240) -> dict[str, str]:
        """Until a job has left the queue; what a requeue puts off is brought forward. Its last record."""

        def left() -> bool:
            self.kick(job)
            return self.job(job)["JobState"] not in WAITING

        wait_for(left, limit, what=f"end of job {job}")
        return self.job(job)

    def wait_start(self, job: int, restarts: int, limit: float = 120) -> None:
        """Until a job runs for the so-many-th time again."""

        def started() -> bool:
            self.kick(job)
            record = self.job(job)
            return record["JobState"] == "RUNNING" and int(record["Restarts"]) >= restarts

        wait_for(started, limit, what=f"restart {restarts} of job {job}")

    def kick(self, job: int) -> None:
        """A job that was put back may not begin for two minutes; tests bring that forward.

        Not below two seconds: slurmd refuses a job that it has just ended ("already killed, do not launch").
        """
        record = self.job(job)
        if record["JobState"] == "PENDING" and record["Reason"] == "BeginTime":
            time.sleep(3)
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_idle(self, nodes: int, limit: float = 60) -> None:
        """Until so many nodes are there and free."""

        def idle() -> bool:
            return len(self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "train", "-o", "%N").split()) >= nodes

        wait_for(idle, limit, what=f"{nodes} idle nodes")

    def _do(self, *words: str, **environment: str) -> str:
        command = [str(HERE / "cluster.sh"), *words]
        # A daemon keeps the pipe of what started it open, so what starts daemons gets none.
        done = subprocess.run(
            command, env={**self.environment, **environment}, cwd=REPOSITORY, stdin=subprocess.DEVNULL,
            capture_output=words[0] not in ("up", "boot"), text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"cluster.sh {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout or ""


def wait_for(condition: Callable[[], object], limit: float, *, what: str) -> None:
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {limit:.0f} s")
        time.sleep(0.25)

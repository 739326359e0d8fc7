"""A run on the throw-away cluster: what is submitted, and what it leaves behind."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from imitate_ds.config import load_run_config
from tests.cluster.slurm import REPOSITORY, Cluster, wait_for
from tests.cluster.testimony import Verdict, judge, losses
from tests.tiny_model import TINY_MODEL

BATCH = 36
# A step of this run depends neither on the number of ranks nor on how they share the batch, up to rounding.
SETTINGS = {
    "optim": {"lr": 2e-5},  # at higher rates training amplifies any rounding
    "data": {"input_size": 32, "workers": 1},
    "model": {**TINY_MODEL, "projection_norm": "layer"},
    "train": {
        "global_batch_size": BATCH,
        "batch_norm": "freeze",
        "precision": "fp32",
        "epochs": 100,
        "save_every": 10,
        "log_every": 1,
        "eval_every": 0,
        "images_every": 0,
    },
}


class Run(NamedTuple):
    """A job, and what it leaves behind."""

    cluster: Cluster
    job: int
    folder: Path
    consumed: Path
    output: Path

    @property
    def step(self) -> int:
        """The last that was made, 0 before the first."""
        return max(losses(self.folder), default=0)

    def wait_for_step(self, step: int, limit: float = 120) -> None:
        def reached() -> bool:
            self.cluster.kick(self.job)
            return self.step >= step

        wait_for(reached, limit, what=f"step {step} of {self.folder.name}")

    def wait_for_end(self, restarts: int = 0, limit: float = 240) -> None:
        """Which must be a good one."""
        record = self.cluster.wait(self.job, limit)
        assert record["JobState"] == "COMPLETED", self.output.read_text()[-4000:]
        assert int(record["Restarts"]) >= restarts, record
        assert self.state["state"] == "finished"

    @property
    def state(self) -> dict:
        return json.loads((self.folder / "state.json").read_text())

    def verdict(self, undisturbed: "Run") -> Verdict:
        config = load_run_config(self.folder / "config.yaml")
        return judge(self.folder, undisturbed.folder, self.consumed, config, BATCH)


def submit(
    cluster: Cluster,
    runs: Path,
    shards: Path,
    name: str,
    *settings: str,
    options: Sequence[str] = ("--nodes=2",),
    entrance: str = "witness",
    environment: Mapping[str, str] | None = None,
) -> Run:
    """launch/pretrain.sbatch on two nodes, one rank each, unless options say otherwise; the run's folder is runs / name."""
    consumed, output, path = runs / f"{name}.consumed", runs / f"{name}.out", runs / f"{name}.yaml"
    consumed.mkdir()
    data = {**SETTINGS["data"], "shards": str(shards)}
    path.write_text(yaml.safe_dump({**SETTINGS, "name": name, "output_dir": str(runs), "data": data}))
    given = {
        "ENTRANCE": f"tests.cluster.{entrance}",
        "CONSUMED": str(consumed),
        "DS_ACCELERATOR": "cpu",
        "RANKS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "SLURM_WAIT": "10",
        "PYTHONPATH": str(REPOSITORY),
        **(environment or {}),
    }
    arguments = ["--config", str(path), *(part for item in settings for part in ("--set", item))]
    # All CPUs of a node and not --exclusive, which takes its GPUs too: Slurm 22.05 loses count of those ("gres/gpu: job dealloc
    # of node bad node_offset") where a job is requeued from a node that is back at once, and never starts it again.
    options = ("--cpus-per-task=2", f"--output={output}", *options)
    job = cluster.submit("launch/pretrain.sbatch", *arguments, options=options, environment=given)
    return Run(cluster, job, runs / name, consumed, output)

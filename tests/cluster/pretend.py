"""A run that lasts seconds and trains nothing, for what launch/*.sbatch decide: `ENTRANCE=tests.cluster.pretend`.

It takes the settings of a real one, and writes the state.json of one. `behave` in BEHAVIOUR says how the first start ends
(finished, drained, failed1, failed2, killed) and, after commas, each start that follows; `wait` runs until it is asked to end.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from imitate_ds.config import load_run_config


def main() -> None:
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: asked.set())
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    config = load_run_config(Path(arguments[1]), arguments[3::2])
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    assert config.train.resume == (start > 0)
    plans = os.environ["BEHAVIOUR"].split(",")
    plan = plans[min(start, len(plans) - 1)]
    rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
    names = (
        "SLURM_NTASKS",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_RANK",
        "SLURM_LOCALID",
        "IMITATE_DS_CACHE",
    )
    seen = {name: os.environ[name] for name in names if name in os.environ}
    (config.run_dir / f"start-{start}.rank-{rank}.json").write_text(json.dumps({"argv": sys.argv, **seen}))
    say(config.run_dir, "running", start)
    if plan == "wait":
        plan = "drained" if asked.wait(120) else "failed1"
    if plan == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "drained":
        latest = config.run_dir / "checkpoints" / "latest"
        latest.parent.mkdir(exist_ok=True)
        latest.write_text(f"step-{start:08d}\n")
    say(config.run_dir, plan.rstrip("12"), start)
    sys.exit(int(plan[-1]) if plan[-1].isdigit() else 0)


def say(run_dir: Path, state: str, step: int) -> None:
    record = {"state": state, "step": step, "total_steps": 9, "job": os.environ["SLURM_JOB_ID"]}
    beside = run_dir / f".state.{os.getpid()}.{os.environ.get('SLURM_NODEID')}"
    beside.write_text(json.dumps(record, indent=0))
    beside.replace(run_dir / "state.json")


if __name__ == "__main__":
    main()

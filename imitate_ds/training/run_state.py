"""What a run says of itself in files, for launch scripts and `imitate-ds status`: where it stands, and its ranks' signs of life.

A launch script cannot tell from an exit status whether to start a run again: Slurm calls a drained task COMPLETED, and one of
a step that was killed 143 (tried on a real Slurm). What was killed leaves `running` behind.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

RUN_STATE = "state.json"
HEARTBEATS, FAILURES = "heartbeats", "failures"
State = Literal["running", "drained", "finished", "failed"]


class Beat(NamedTuple):
    """One rank's last sign of life; times in seconds since 1970, of that rank's clock."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    since: float
    time: float


def write_run_state(run_dir: Path, state: State, **values: Any) -> None:
    """Replace the file; what is not given stays as it was. One key a line, so that a shell script can read it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {
        **read_run_state(run_dir),
        "reason": "",
        **values,
        "state": state,
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "time": round(time.time(), 3),
    }
    unfinished = run_dir / f".{RUN_STATE}"
    unfinished.write_text(json.dumps(record, indent=0) + "\n", encoding="utf-8")
    unfinished.replace(run_dir / RUN_STATE)


def read_run_state(run_dir: Path) -> dict[str, Any]:
    """What the run last said of itself; empty where it said nothing."""
    try:
        return json.loads((run_dir / RUN_STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def read_beats(run_dir: Path) -> list[Beat]:
    """The last sign of life of every rank that gave one, by rank."""
    beats = []
    for path in sorted((run_dir / HEARTBEATS).glob("rank-*.json")):
        try:
            beats.append(Beat(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # it is being replaced, or of another version
    return beats

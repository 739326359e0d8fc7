"""Many runs that were planned together, of a benchmark or of a scaling sweep: each a folder, its run file and log beside it.

A plan that was stopped goes on where it was: a run that has finished is not run again, and one that has not resumes. A run that
fails is named, with its reason, and does not stop the others. For an array of jobs there is a list of run files, whose lines stay
where they are: a task that waits in the queue, or is put back into it, finds its run by the number of the line.
"""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from imitate_ds.config import RunConfig
from imitate_ds.data.shard_index import write_atomic
from imitate_ds.finetune_config import FinetuneConfig
from imitate_ds.run_file import dump_settings
from imitate_ds.training.run_state import read_run_state

Say = Callable[[str], None]
Config = RunConfig | FinetuneConfig
Entrance = Literal["pretrain", "finetune"]

LIST = "runs.txt"
TRACEBACK_HINT = "(IMITATE_DS_TRACEBACK=1 shows where)"  # the last line of what a refused run says


def run_file(config: Config) -> Path:
    return _beside(config, ".yaml")


def log_file(config: Config) -> Path:
    return _beside(config, ".log")


def has_finished(config: Config) -> bool:
    return read_run_state(config.run_dir).get("state") == "finished"


def first_twin(configs: Sequence[Config]) -> str | None:
    """A name that two of the runs would have."""
    return next((name for name, count in Counter(config.name for config in configs).items() if count > 1), None)


def write_run_files(configs: Sequence[Config], *, plan: str) -> None:
    """plan: what the message calls that which the runs are of.

    Raises ValueError where a run was done, or begun, with other settings: its figures would stand in the wrong place.
    """
    for config in configs:
        text, path = dump_settings(config), run_file(config)
        if config.run_dir.is_dir() and path.is_file() and path.read_text() != text:
            raise ValueError(
                f"{config.run_dir}: was run with other settings, those in {path}; choose another name for the {plan}, "
                "or delete the folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_list(configs: Sequence[Config], left: Sequence[Config], path: Path, script: str, *arguments: str) -> str:
    """All run files, one a line, for an array of jobs; and the line that submits those that are left.

    What the list held before keeps its line, also where the plan has changed.
    """
    files = [str(run_file(config)) for config in configs]
    lines = list(dict.fromkeys([*(path.read_text().splitlines() if path.is_file() else []), *files]))
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    listed = f"{len(files)} run files, listed in {path}"
    if not left:
        return f"{listed}; none is left to submit"
    tasks = _ranges({lines.index(str(run_file(config))) for config in left})
    return f"{listed}: RUNS={path} sbatch --array={tasks} ... {' '.join([script, *arguments])}"


def _ranges(numbers: set[int]) -> str:
    """As sbatch has them: 0-3,7."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


def run_planned(configs: Sequence[Config], entrance: Entrance, *, jobs: int, say: Say) -> dict[str, str]:
    """Run what has not finished, so many at once, each a process of its own: those that failed, and why."""
    with ThreadPoolExecutor(jobs) as pool:
        places = (f"{number}/{len(configs)}" for number in range(1, len(configs) + 1))
        reasons = list(pool.map(lambda config, place: _run(config, entrance, place, say), configs, places))
    return {config.name: reason for config, reason in zip(configs, reasons, strict=True) if reason}


def _run(config: Config, entrance: Entrance, place: str, say: Say) -> str:
    """Why a run has not come to a good end, now or before; empty where it has."""
    if has_finished(config):
        return ""
    say(f"{place}  {config.name}")
    log = log_file(config)
    command = [sys.executable, "-m", f"imitate_ds.{entrance}", "--config", str(run_file(config))]
    with log.open("a") as file:
        status = subprocess.run(
            [*command, "--set", "train.resume=true"], stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if status == 0 and has_finished(config):
        return ""
    reason = _reason(config, status)
    say(f"{place}  {config.name}: failed with status {status}; see {log}: {reason}")
    return reason


def _reason(config: Config, status: int) -> str:
    """The last line of the log, which is the message of what was refused or the end of a traceback, where there is no better."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status == 0:  # drained
        return read_run_state(config.run_dir).get("reason") or "ended before its last step"
    text = log_file(config).read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and line != TRACEBACK_HINT]
    return lines[-1] if lines else f"status {status}"


def _beside(config: Config, ending: str) -> Path:
    return config.run_dir.with_name(config.name + ending)

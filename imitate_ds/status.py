"""`imitate-ds status RUN`: how a run stands, read from the files in its folder. Needs neither torch nor the run's help.

Other processes write these files while they are read: one that is torn, or gone since it was listed, counts as not yet there.
"""

import functools
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from imitate_ds.config import TermWeights
from imitate_ds.training.checkpoint_files import MANIFEST, checkpoint_folders, verify_checkpoint
from imitate_ds.training.run_state import FAILURES, HEARTBEATS, RUN_STATE, Beat, read_beats, read_run_state

SILENT_S = 180.0  # a run of which no rank was heard of for so long is not said to be running
REVIVED_S = 30.0  # heard of so long after its end, a run has been started again
LATE_S = 20.0  # a rank beats every few seconds
LONG_S = 60.0  # that long at one thing is worth a line
GOES_ON = ("running", "starting")
LOSSES = ("loss", *TermWeights.model_fields)  # of the numbers of a logged step


class RankTrouble(NamedTuple):
    """A rank to look at, and why; seconds are None where it was never heard of."""

    rank: int
    host: str
    step: int | None
    doing: str
    doing_s: float | None
    heard_s: float | None  # since its last sign of life
    why: str


class Failure(NamedTuple):
    rank: int
    host: str
    error: str  # its first line


class Checkpoint(NamedTuple):
    """The newest checkpoint, and the one that a resumed run would begin from."""

    newest: str
    age_s: float | None
    problem: str  # of the newest; "" where it verifies, or was not looked at
    good: str | None  # the newest that verifies; None where none does, or nobody looked
    verified: bool  # whether anybody looked


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. What its files do not tell is None, or empty.

    state: running, drained, finished, failed as the run says; silent (says running, no rank heard of for three minutes),
    killed (says running, its processes on this machine are gone), starting (has not said running yet), unknown.
    """

    run: str
    state: str
    remark: str = ""
    step: int | None = None
    total_steps: int | None = None
    studies_per_second: float | None = None
    seconds_left: float | None = None
    restarts: int = 0
    ranks: int | None = None
    nodes: int | None = None
    job: str = ""
    doing: str = ""
    train: dict[str, float] = field(default_factory=dict)  # losses of the last logged step
    val: dict[str, float] = field(default_factory=dict)  # the last validation
    learning_rate: float | None = None
    data_wait_share: float | None = None
    host_memory_mib: float | None = None
    device_memory_mib: float | None = None
    slowest_rank: int | None = None  # the one that the others wait for
    lag_share: float | None = None  # of the time, how much longer another one waits in collectives
    bad_steps: tuple[int, ...] = ()
    checkpoint: Checkpoint | None = None
    troubles: tuple[RankTrouble, ...] = ()
    failures: tuple[Failure, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON values, nested records as objects."""
        values = asdict(self)
        values["checkpoint"] = self.checkpoint and self.checkpoint._asdict()
        values["troubles"] = [trouble._asdict() for trouble in self.troubles]
        values["failures"] = [failure._asdict() for failure in self.failures]
        return values


def read_status(run: Path, *, verify: bool = True) -> RunStatus:
    """How the run in this folder stands now. verify reads every byte of its newest checkpoint.

    Raises FileNotFoundError or ValueError for what is no run.
    """
    _check_is_run(run)
    now, said = time.time(), read_run_state(run)
    beats = read_beats(run)
    state, remark = _judge(said, beats, now)
    train, val = _latest_metrics(run / "metrics.jsonl")
    steps = [said.get("step"), train.get("step"), *(beat.step for beat in beats)]
    step = max((step for step in steps if step is not None), default=None)
    rate = train.get("studies_per_second")
    return RunStatus(
        run=str(run),
        state=state,
        remark=remark,
        step=step,
        total_steps=said.get("total_steps"),
        studies_per_second=rate,
        seconds_left=_seconds_left(step, said, rate) if state == "running" else None,
        restarts=said.get("restarts", 0),
        ranks=said.get("ranks"),
        nodes=said.get("nodes"),
        job=said.get("job", ""),
        doing=f"{beats[0].doing}, for {duration(now - beats[0].since)}" if beats and state in GOES_ON else "",
        train={name: train[name] for name in LOSSES if name in train},
        val={name: value for name, value in val.items() if name not in ("step", "split", "time")},
        learning_rate=train.get("learning_rate"),
        data_wait_share=train.get("data_wait_share"),
        host_memory_mib=train.get("host_memory_mib"),
        device_memory_mib=train.get("device_memory_mib"),
        slowest_rank=train.get("slowest_rank"),
        lag_share=train.get("lag_share"),
        bad_steps=tuple(
            sorted(int(path.stem.removeprefix("step-")) for path in _listed(run / "bad_steps", "step-*.json"))
        ),
        checkpoint=_read_checkpoint(run / "checkpoints", now, verify=verify),
        troubles=tuple(_troubles(beats, said, now)) if state in (*GOES_ON, "silent", "killed") else (),
        failures=tuple(_failures(run)),
    )


def read_statuses(runs: Iterable[Path], *, verify: bool = False) -> list[RunStatus]:
    """Several runs; what is none among them gets the state `no run`."""
    statuses = []
    for run in runs:
        try:
            statuses.append(read_status(run, verify=verify))
        except (FileNotFoundError, ValueError):
            statuses.append(RunStatus(str(run), "no run"))
    return statuses


def follow(runs: list[Path], *, verify: bool | None, every_s: float = 0) -> Iterator[list[RunStatus]]:
    """How the runs stand: once, or every so many seconds until none of them is running.

    verify: None looks at the checkpoint of one run, and not at those of several. Raises ValueError for no run.
    """
    while True:
        if len(runs) == 1:
            statuses = [read_status(runs[0], verify=verify is not False)]
        else:
            statuses = read_statuses(runs, verify=bool(verify))
        yield statuses
        if not every_s or not any(status.state in (*GOES_ON, "silent") for status in statuses):
            return
        time.sleep(every_s)


def _check_is_run(run: Path) -> None:
    if not run.exists():
        raise FileNotFoundError(
            f"{run}: no such folder; a run lies in output_dir/name of its run file, as runs/phantom_demo"
        )
    if any((run / name).exists() for name in (RUN_STATE, HEARTBEATS, "config.yaml", "metrics.jsonl", "checkpoints")):
        return
    inside = any(path.is_file() for name in (RUN_STATE, "config.yaml") for path in run.glob(f"*/{name}"))
    hint = (
        f"for the runs in it: imitate-ds status {run}/*"
        if inside
        else "it holds no state.json, config.yaml or metrics.jsonl"
    )
    raise ValueError(f"{run}: is no run; {hint}")


def _judge(said: Mapping[str, Any], beats: list[Beat], now: float) -> tuple[str, str]:
    """The state, and what to say about it. A process that was killed leaves `running` behind."""
    state, heard = said.get("state", ""), max((beat.time for beat in beats), default=said.get("time", now))
    again = state not in ("", "running") and heard > said["time"] + REVIVED_S
    if not said and not beats:
        return "unknown", "it has no state.json: begun by an older version, or just now"
    if state not in ("", "running") and not again:
        return state, said.get("reason", "")
    here = [beat for beat in beats if beat.host == socket.gethostname()]
    if here and not any(_lives(beat) for beat in here):
        return "killed", f"its {len(here)} process(es) on this machine are gone"
    if now - heard > SILENT_S:
        return "silent", f"says it goes on, but not heard of for {duration(now - heard)}"
    if again:
        return "starting", f"again; it was {state}"
    return ("running" if state and beats else "starting"), ""


def _lives(beat: Beat) -> bool:
    """Whether the process of a beat of this machine is still there: not dead, not a zombie, not another of that number."""
    try:
        after_name = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()
        booted = next(float(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
    except (OSError, StopIteration):
        return False
    started = booted + int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return after_name[0] not in "ZX" and started < beat.time + 2


def _seconds_left(step: int | None, said: Mapping[str, Any], rate: float | None) -> float | None:
    total, batch = said.get("total_steps"), said.get("global_batch_size")
    if step is None or total is None or not batch or not rate:
        return None
    return max(0, total - step) * batch / rate


def _troubles(beats: list[Beat], said: Mapping[str, Any], now: float) -> Iterator[RankTrouble]:
    """Ranks that are silent, behind, gone, or at one thing for long; times are by their clocks and ours."""
    ranks = said.get("ranks") or 0
    furthest, late = (
        max((beat.step for beat in beats), default=0),
        max(LATE_S, ranks / 10),
    )  # many ranks beat less often
    for beat in beats:
        heard, doing = max(0.0, now - beat.time), max(0.0, now - beat.since)
        gone = beat.host == socket.gethostname() and not _lives(beat)
        why = _first_true(
            {
                "its process is gone": gone,
                "silent": heard > late,
                f"behind, others are in step {furthest}": beat.step < furthest - 1,
                "long at it": doing > LONG_S,
            }
        )
        if why:
            yield RankTrouble(beat.rank, beat.host, beat.step, beat.doing, doing, heard, why)
    if beats and now - said.get("time", now) > late:
        for rank in sorted(set(range(ranks)) - {beat.rank for beat in beats}):
            yield RankTrouble(rank, "", None, "", None, None, "never heard of")


def _first_true(reasons: Mapping[str, bool]) -> str:
    return next((reason for reason, holds in reasons.items() if holds), "")


def _failures(run: Path) -> Iterator[Failure]:
    for record in map(_record, _listed(run / FAILURES, "rank-*.json")):
        if record:
            lines = str(record.get("error", "")).strip().splitlines()
            yield Failure(record.get("rank", -1), record.get("host", ""), lines[0] if lines else "no message")


def _latest_metrics(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest whole record of training, and of validation."""
    lines = _text(path).splitlines()
    return _latest(lines, "train"), _latest(lines, "val")


def _latest(lines: list[str], split: str) -> dict[str, Any]:
    mark = f'"split": "{split}"'  # saves parsing a hundred thousand records
    return next((record for line in reversed(lines) if mark in line and (record := _parsed(line))), {})


def _read_checkpoint(folder: Path, now: float, *, verify: bool) -> Checkpoint | None:
    paths = checkpoint_folders(folder)
    if not paths:
        return None
    saved = _modified(paths[-1] / MANIFEST)
    age = now - saved / 1e9 if saved else None
    if not verify:
        return Checkpoint(paths[-1].name, age, "", None, False)
    problem = _wrong(paths[-1], saved)
    good = next((path.name for path in reversed(paths) if not _wrong(path, _modified(path / MANIFEST))), None)
    return Checkpoint(paths[-1].name, age, problem, good, True)


@functools.lru_cache(maxsize=1024)
def _wrong(path: Path, saved: int) -> str:
    """What is wrong with a checkpoint saved at that time; read once, however often one looks (`--watch`)."""
    return verify_checkpoint(path) or ""


def _modified(path: Path) -> int:
    """Nanoseconds since 1970; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _listed(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def _record(path: Path) -> dict[str, Any]:
    return _parsed(_text(path))


def _parsed(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"

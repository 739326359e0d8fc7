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

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from imitate_ds.config import TermWeights
from imitate_ds.training.checkpoint_files import MANIFEST, checkpoint_folders, verify_checkpoint
from imitate_ds.training.run_state import FAILURES, HEARTBEATS, RUN_STATE, Beat, read_beats, read_run_state

SILENT_S = 180.0  # a run of which no rank was heard of for so long is not said to be running
REVIVED_S = 30.0  # heard of so long after its end, a run has been started again
LATE_S = 20.0  # a rank beats every few seconds
LONG_S = 60.0  # that long at one thing is worth a line
SHOWN = 16  # ranks, and failures
GOES_ON = ("running", "starting")
LOSSES = ("loss", *TermWeights.model_fields)  # of the numbers of a logged step
COLOURS = {"running": "green", "finished": "green", "drained": "yellow", "starting": "yellow", "unknown": "yellow"}


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


def status_view(statuses: list[RunStatus]) -> Group | Table:
    """For a terminal: all of one run, or a line of each."""
    return _whole_view(statuses[0]) if len(statuses) == 1 else _lines_view(statuses)


def _whole_view(status: RunStatus) -> Group:
    table = Table(title=escape(status.run), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(status):
        if text:
            table.add_row(name, text)
    views = [table]
    if status.troubles:
        views.append(_troubles_view(status.troubles))
    if status.failures:
        views.append(_failures_view(status.failures))
    return Group(*views)


def _rows(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield "state", _state(status)
    yield "step", _progress(status)
    yield "now", escape(status.doing)
    yield "ranks", "" if status.ranks is None else f"{status.ranks} on {status.nodes} node(s)"
    yield "restarts", f"{status.restarts}" if status.restarts else ""
    yield "job", escape(status.job)
    yield "losses", _numbers(status.train)
    yield "validation", _numbers(status.val)
    yield "learning rate", "" if status.learning_rate is None else f"{status.learning_rate:.3g}"
    yield "waiting for data", "" if status.data_wait_share is None else f"{status.data_wait_share:.1%} of the time"
    yield (
        "slowest rank",
        "" if status.lag_share is None else f"{status.slowest_rank}, waited for {status.lag_share:.1%} of the time",
    )
    yield "memory", _memory(status)
    yield "bad steps", f"{len(status.bad_steps)}, the last is {status.bad_steps[-1]}" if status.bad_steps else ""
    yield "checkpoint", escape(_checkpoint(status.checkpoint))


def _lines_view(statuses: list[RunStatus]) -> Table:
    table = Table(box=None)
    table.add_column("run", no_wrap=True)
    for column in ("state", "step", "studies/s", "left", "loss", "checkpoint", "look at"):
        table.add_column(column)
    for status in statuses:
        rate, left = status.studies_per_second, status.seconds_left
        table.add_row(
            escape(status.run),
            f"[{COLOURS.get(status.state, 'red')}]{status.state}[/]",
            _steps(status),
            "" if rate is None else f"{rate:,.0f}",
            "" if left is None else duration(left),
            f"{status.train['loss']:.4g}" if "loss" in status.train else "",
            _checkpoint_word(status.checkpoint),
            escape(_worries(status)),
        )
    return table


def _troubles_view(troubles: tuple[RankTrouble, ...]) -> Table:
    table = Table(title="ranks to look at", title_justify="left")
    for column in ("rank", "host", "step", "doing", "for", "heard of", "why"):
        table.add_column(column)
    for it in troubles[:SHOWN]:
        step = "" if it.step is None else str(it.step)
        doing_s = "" if it.doing_s is None else duration(it.doing_s)
        heard = "" if it.heard_s is None else f"{duration(it.heard_s)} ago"
        table.add_row(str(it.rank), escape(it.host), step, escape(it.doing), doing_s, heard, it.why)
    if len(troubles) > SHOWN:
        table.caption = f"and {len(troubles) - SHOWN} more"
    return table


def _failures_view(failures: tuple[Failure, ...]) -> Table:
    table = Table(title="failures", title_justify="left")
    for column in ("rank", "host", "error"):
        table.add_column(column, overflow="fold")
    for failure in failures[:SHOWN]:
        table.add_row(str(failure.rank), escape(failure.host), escape(failure.error))
    if len(failures) > SHOWN:
        table.caption = f"and {len(failures) - SHOWN} more"
    return table


def _state(status: RunStatus) -> str:
    colour = COLOURS.get(status.state, "red")
    return f"[{colour}]{status.state}[/]" + (f": {escape(status.remark)}" if status.remark else "")


def _steps(status: RunStatus) -> str:
    if status.step is None:
        return ""
    return f"{status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps is not None else "")


def _progress(status: RunStatus) -> str:
    rate, left = status.studies_per_second, status.seconds_left
    parts = [
        _steps(status),
        "" if rate is None else f"{rate:,.1f} studies/s",
        "" if left is None else f"{duration(left)} left",
    ]
    return ", ".join(filter(None, parts))


def _numbers(values: Mapping[str, float]) -> str:
    return "\n".join(f"{escape(name)} {value:.4g}" for name, value in values.items())


def _memory(status: RunStatus) -> str:
    sizes = {"of the host": status.host_memory_mib, "of the device": status.device_memory_mib}
    return ", ".join(f"{size:,.0f} MiB {whose}" for whose, size in sizes.items() if size is not None)


def _checkpoint(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "none"
    age = "" if checkpoint.age_s is None else f", {duration(checkpoint.age_s)} old"
    if not checkpoint.verified:
        return f"{checkpoint.newest}{age}"
    if checkpoint.good == checkpoint.newest:
        return f"{checkpoint.newest} verifies{age}"
    then = f"{checkpoint.good} verifies" if checkpoint.good else "none verifies"
    return f"{checkpoint.newest} {checkpoint.problem}; {then}"


def _checkpoint_word(checkpoint: Checkpoint | None) -> str:
    """Its step; of one that was looked at and does not verify, that too."""
    if checkpoint is None:
        return ""
    step = f"{int(checkpoint.newest.removeprefix('step-')):,}"
    return f"{step} damaged" if checkpoint.verified and checkpoint.good != checkpoint.newest else step


def _worries(status: RunStatus) -> str:
    """What a line has no room for: why a run failed, and how many things its own page tells."""
    counts = {"rank(s)": len(status.troubles), "failure(s)": len(status.failures), "bad step(s)": len(status.bad_steps)}
    reason = status.remark if status.state == "failed" else ""
    return ", ".join(filter(None, [reason, *(f"{count} {what}" for what, count in counts.items() if count)]))


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

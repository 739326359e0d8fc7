"""What `imitate-ds status` shows in a terminal: all of one run, or a line of each of several."""

from collections.abc import Iterator, Mapping

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from imitate_ds.status import Checkpoint, Failure, RankTrouble, RunStatus, duration

SHOWN = 16  # ranks, and failures
COLOURS = {"running": "green", "finished": "green", "drained": "yellow", "starting": "yellow", "unknown": "yellow"}


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

"""A plan for a terminal, and as JSON."""

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from imitate_ds.planning.assumptions import ASSUMED, GIB
from imitate_ds.planning.memory import KINDS
from imitate_ds.planning.planner import ENDS, Option, Plan, outlook

CAUTION = (
    "No figure of ours stands behind the times: shares of the peaks, of bandwidth and links are assumptions from published "
    "figures, and the range is theirs. Validation, checkpoints and waiting for data come on top. --json lists every constant."
)


def plan_view(plan: Plan) -> Group:
    return Group(
        _memory_view(plan),
        _time_view(plan),
        _run_view(plan),
        Text(f"\n{plan.why}\n"),
        Text(CAUTION, style="yellow"),
    )


def settings_line(plan: Plan) -> str:
    """To be copied, so never to be wrapped."""
    return " ".join(f"--set {setting}" for setting in plan.settings)


def plan_values(plan: Plan) -> dict[str, Any]:
    """All of it, as JSON values: bytes and seconds."""
    machine, subject, data = plan.machine, plan.subject, plan.subject.data
    return {
        "run": plan.config.name,
        "machine": {
            "gpu": machine.name,
            "nodes": machine.nodes,
            "gpus_per_node": machine.per_node,
            "memory": machine.memory,
            "rates": {end: rates._asdict() for end, rates in machine.rates.items()},
        },
        "model": {name: value for name, value in subject.size._asdict().items() if name != "each"}
        | subject.precision._asdict(),
        "data": data._asdict(),
        "studies_per_rank": subject.studies,
        "loss": plan.loss._asdict(),
        "stages": [_option_values(option) for option in plan.options],
        "choice": plan.choice.stage.name,
        "set": plan.settings,
        "why": plan.why,
        "outlook": {end: outlook(plan, end)._asdict() for end in ENDS},
        "constants": {name: span._asdict() for name, span in ASSUMED.items()},
    }


def _option_values(option: Option) -> dict[str, Any]:
    return {
        "name": option.stage.name,
        "stage": option.stage.stage,
        "refused": option.refused,
        "largest_micro_batch": option.largest,
        "grad_cache_chunk": option.chunk,
        "memory": {"moment": option.placed.moment, "total": option.placed.total, "host": option.placed.host}
        | option.placed.kinds,
        "seconds": {end: {"total": time.total} | time._asdict() for end, time in option.times.items()},
    }


def _memory_view(plan: Plan) -> Table:
    machine, subject = plan.machine, plan.subject
    where = f"{machine.nodes} x {machine.per_node} {machine.name}"
    table = Table(
        title=f"{escape(plan.config.name)} on {where}: GiB of one device at its worst moment, {subject.studies:,} studies a rank",
        title_justify="left",
    )
    table.add_column("")
    for option in plan.options:
        table.add_column(option.stage.label, justify="right", style="bold" if option is plan.choice else "")
    for kind in KINDS:
        table.add_row(kind, *(f"{option.placed.kinds[kind] / GIB:.2f}" for option in plan.options))
    table.add_section()
    table.add_row("total", *(f"{option.placed.total / GIB:.2f}" for option in plan.options))
    table.add_row("worst moment", *(option.placed.moment for option in plan.options))
    table.add_row("host memory", *(f"{option.placed.host * machine.per_node / GIB:.1f}" for option in plan.options))
    table.add_row(
        "largest micro batch", *(f"{option.largest:,}" if option.largest else "none" for option in plan.options)
    )
    table.add_row("GradCache chunk", *(_chunk_word(option) for option in plan.options))
    return table


def _chunk_word(option: Option) -> str:
    if option.refused:
        return "refused"
    return "does not fit" if option.chunk < 0 else str(option.chunk) if option.chunk else "not needed"


def _time_view(plan: Plan) -> Table:
    table = Table(title="milliseconds of a step", title_justify="left")
    table.add_column("")
    for option in plan.options:
        table.add_column(option.stage.label, justify="right", style="bold" if option is plan.choice else "")
    steps = [option.times["likely"] for option in plan.options]
    for name in steps[0]._fields:
        table.add_row(name.replace("_", " "), *(f"{1000 * getattr(step, name):.1f}" for step in steps))
    table.add_section()
    table.add_row("total", *(f"{1000 * step.total:.0f}" for step in steps))
    spans = ((option.times["high"].total, option.times["low"].total) for option in plan.options)
    table.add_row("range", *(f"{1000 * fast:.0f} to {1000 * slow:.0f}" for fast, slow in spans))
    return table


def _run_view(plan: Plan) -> Table:
    slow, likely, fast = (outlook(plan, end) for end in ENDS)
    table = Table(title=f"with {plan.choice.stage.label}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "studies/s",
        f"{likely.studies_per_second:,.0f} ({slow.studies_per_second:,.0f} to {fast.studies_per_second:,.0f})",
    )
    rate = likely.studies_per_second / plan.machine.ranks
    workers = max(1, plan.config.data.workers)
    table.add_row(
        "to be read",
        f"{rate:,.0f} studies/s by every rank, {rate / workers:,.0f} by each of {workers} worker(s); else it waits for data",
    )
    steps = plan.subject.data.total_steps
    if steps is None or likely.days is None or slow.days is None or fast.days is None:
        table.add_row("the run", "unknown: give --studies, how many an epoch has")
    else:
        span = f"{_duration(likely.days)} ({_duration(fast.days)} to {_duration(slow.days)})"
        table.add_row("the run", f"{span}, {steps:,} steps; studies from {escape(plan.subject.data.source)}")
    if likely.kwh is not None and slow.kwh is not None and fast.kwh is not None:
        factor = ASSUMED["watts of all over watts of devices"].likely
        table.add_row(
            "energy", f"{likely.kwh:,.3g} kWh ({fast.kwh:,.3g} to {slow.kwh:,.3g}), {factor} x that of the devices"
        )
    return table


def _duration(days: float) -> str:
    if days >= 2:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} h" if days * 24 >= 2 else f"{days * 1440:.1f} min"

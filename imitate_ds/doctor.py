"""`imitate-ds doctor`: what this machine, its storage and the lines between ranks are fit for, before a run finds out.

Every check has a time limit, and runs in a process that can be left behind: a dead file system or a collective that waits
for ever ends as a row of the table. Names and numbers of the machine only; no file names of patients, no keys.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from imitate_ds.diagnosis.checks import ALONE, CHECKS
from imitate_ds.diagnosis.finding import Finding, Options, broken
from imitate_ds.diagnosis.helper import Helper
from imitate_ds.diagnosis.ranks import hear_own_rank, local_rank_here, rank_here, under_launcher
from imitate_ds.diagnosis.software import PACKAGES

COLOURS = {"ok": "green", "slow": "yellow", "broken": "red", "absent": "dim"}
VERSIONS = {"python", *PACKAGES}
HANGS = "it hangs: the file system, driver or network behind it does not answer"


def diagnose(options: Options) -> list[Finding]:
    """Look at everything. Alone, at this machine; as one of several ranks, rank 0 brings the findings of all machines.

    The other ranks bring only what keeps rank 0 from hearing of them. A collective under a launcher.
    """
    if not under_launcher():
        return examine([*CHECKS, *ALONE], options)
    patience_s = options.timeout_s * (len(CHECKS) + 2)  # for the slowest machine
    with Helper("ranks", str(patience_s)) as helper:
        between = hear_own_rank(helper, options.timeout_s)
        met = all(finding.verdict != "broken" or finding.name == "clocks" for finding in between)
        mine = examine(CHECKS, options) if local_rank_here() == 0 and (met or rank_here() == 0) else []
        if not met:
            return [*mine, *between]
        helper.tell([finding._asdict() for finding in mine])
        machines = _machines(helper, patience_s)
    if isinstance(machines, Finding):
        return [*mine, *between, machines]
    return [*merge(machines), *between] if rank_here() == 0 else []


def examine(names: Iterable[str], options: Options) -> list[Finding]:
    """Run checks by name on this machine, each within options.timeout_s; one that hangs or crashes does not stop the others."""
    left, findings = list(names), []
    while left:
        wanted = {"names": left, "shards": _text(options.shards), "run_dir": _text(options.run_dir)}
        with Helper("checks", json.dumps({**wanted, "timeout_s": options.timeout_s})) as helper:
            while left and (finding := _next(helper, options.timeout_s)):
                findings.append(finding._replace(name=left.pop(0)))
                if finding.name == "":  # it is of the helper's end: the next helper goes on behind it
                    break
    return findings


def merge(machines: Sequence[tuple[str, list[Finding]]]) -> list[Finding]:
    """One row for each check and verdict: what the first machine found, and which others came to the same verdict.

    Versions that differ between machines are broken, each of them fit as it may be.
    """
    if len(machines) == 1:
        return machines[0][1]
    rows: dict[tuple[str, ...], list[tuple[str, Finding]]] = {}
    for host, findings in machines:
        for it in findings:
            rows.setdefault((it.name, it.verdict, it.finding if it.name in VERSIONS else ""), []).append((host, it))
    order = list(dict.fromkeys(it.name for _, findings in machines for it in findings))
    merged = [_with_hosts(rows[key]) for key in sorted(rows, key=lambda key: order.index(key[0]))]
    several = {it.name for it in merged if sum(other.name == it.name for other in merged) > 1} & VERSIONS
    differs = "machines differ: give all of them one environment"
    return [it._replace(verdict="broken", advice=differs) if it.name in several else it for it in merged]


def findings_table(findings: Iterable[Finding]) -> Table:
    table = Table()
    for column in ("check", "finding", "verdict", "what to do"):
        table.add_column(column, overflow="fold")
    for it in findings:
        table.add_row(it.name, escape(it.finding), f"[{COLOURS[it.verdict]}]{it.verdict}[/]", escape(it.advice))
    return table


def findings_json(findings: Iterable[Finding]) -> str:
    keys = ("name", "finding", "verdict", "advice")
    return json.dumps([{key: getattr(finding, key) for key in keys} for finding in findings], indent=1)


def is_broken(findings: Iterable[Finding]) -> bool:
    return any(finding.verdict == "broken" for finding in findings)


def _next(helper: Helper, timeout_s: float) -> Finding:
    """The next finding; one without a name where the helper hangs or has died instead."""
    try:
        answer = helper.answer(timeout_s)
    except TimeoutError as error:
        return broken(str(error), HANGS)
    if answer is None:
        return broken(helper.last_words(), "")
    return Finding(**answer)


def _machines(helper: Helper, patience_s: float) -> list[tuple[str, list[Finding]]] | Finding:
    """Of each machine its name and findings; or why they did not come."""
    try:
        answer: dict[str, Any] | None = helper.answer(patience_s)
        why = "" if answer else helper.last_words()
        if answer:
            helper.answer(
                patience_s
            )  # until it has left: killed before, it might take the answer of a slower rank with it
    except TimeoutError as error:
        answer, why = None, str(error)
    if answer is None:
        return broken(f"the findings of the other ranks did not come: {why}", "what do the other ranks say?")._replace(
            name="ranks"
        )
    return [(host, [Finding(**finding) for finding in findings]) for host, findings in answer["machines"] if findings]


def _with_hosts(found: list[tuple[str, Finding]]) -> Finding:
    (host, first), *others = found
    others_named = ", ".join(name for name, _ in others[:8]) + (", ..." if len(others) > 8 else "")
    return first._replace(finding=f"{host}: {first.finding}" + (f"; as on {others_named}" if others else ""))


def _text(folder: object) -> str:
    return "" if folder is None else str(folder)

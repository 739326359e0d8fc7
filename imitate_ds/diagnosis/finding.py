"""What a check answers: what it found, a verdict, and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

Verdict = Literal["ok", "slow", "broken", "absent"]


class Finding(NamedTuple):
    """One row of the doctor's table. absent: is not here, and need not be."""

    finding: str
    verdict: Verdict
    advice: str = ""
    name: str = ""


class Options(NamedTuple):
    """What the doctor was asked to look at. timeout_s: how long any one answer may take."""

    shards: Path | None = None
    run_dir: Path | None = None
    timeout_s: float = 60.0


Check = Callable[[Options], Finding]


def ok(finding: str, advice: str = "") -> Finding:
    return Finding(finding, "ok", advice)


def slow(finding: str, advice: str) -> Finding:
    return Finding(finding, "slow", advice)


def broken(finding: str, advice: str) -> Finding:
    return Finding(finding, "broken", advice)


def absent(finding: str, advice: str = "") -> Finding:
    return Finding(finding, "absent", advice)


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"

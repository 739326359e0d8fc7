"""The text of a report -> its findings and its impression, and which rule found them."""

from typing import NamedTuple


class ParsedReport(NamedTuple):
    findings: str
    impression: str
    rule: str


def parse_report(text: str, style: str = "tolerant") -> ParsedReport:
    raise ValueError(f"style = {style!r}")

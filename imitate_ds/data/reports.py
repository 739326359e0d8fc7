"""The text of a radiology report -> its findings and its impression, and the name of the rule that found them.

Two styles. "tolerant" reads what hospitals write: any case, one line or many, preliminary reads and addenda. "mit-lcp"
behaves like the parser behind most papers on MIMIC-CXR (github.com/MIT-LCP/mimic-cxr), lost sections included.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from imitate_ds.batch import is_missing


class ParsedReport(NamedTuple):
    """Sections with white space collapsed, "" where absent. Blanks left by de-identification (___, XXXX) stay.

    rule: "findings and impression", "findings", "impression" (headers of their own), "joint header" (one for both),
    "view header" (findings under the name of the projection), "last paragraph" (mit-lcp only), or "no section".
    """

    findings: str
    impression: str
    rule: str


def parse_report(text: str, style: str = "tolerant") -> ParsedReport:
    """Find the sections of a report; a report without any gives two empty strings."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if style == "tolerant":
        return _parse_tolerant(text)
    if style == "mit-lcp":
        return _parse_mit_lcp(text)
    raise ValueError(f"style = {style!r}: must be 'tolerant' or 'mit-lcp'")


_KINDS = ("joint", "findings", "impression", "other", "signature", "view", "rule_line")
_AND = r"\s*(?:&|\band\b|[/,+])\s*"
_OTHER = (
    r"end of impression|(?:final )?addendum|wet read|preliminary (?:report|read)|final report"
    r"|clinical (?:history|information|indications?|impression|findings?|data|details|statement)"
    r"|(?:type of )?exam(?:ination)?|study|procedure|technique|history|indications?(?: for [a-z]+)?"
    r"|reason for (?:the )?(?:exam(?:ination)?|study|visit)|comparisons?(?: (?:exam(?:ination)?|study|studies|films?))?"
    r"|notifications?|recommendations?(?:\(s\))?|narrative|summary|accession number"
).replace(" ", "[ ]")
_SIGNATURE = (
    r"(?:report )?(?:(?:electronically|digitally) signed|signed (?:electronically|digitally))"
    r"|(?:(?:[a-z]+ and )?(?:signed|dictated|interpreted|transcribed|approved|verified) by"
    r"|(?:[a-z]+ )?(?:attending|radiologist|physician|resident)(?: (?:physician|radiologist))?(?:\(s\))?)(?=[^\S\n]*:)"
).replace(" ", "[ ]")
# Words that make a line in capitals the name of a projection, as in "CHEST 2 VIEWS:" or "PORTABLE AP FILM:"
_PROJECTION = r"CHEST|VIEWS?|RADIOGRAPHS?|X-?RAYS?|PORTABLE|FILMS?|LATERAL|FRONTAL"
_HEADER = re.compile(
    rf"""
    (?<![\w-]) (?:
        (?P<joint> findings?{_AND}impressions? | impressions?{_AND}findings? )
      | (?P<findings> findings? )
      | (?P<impression> (?:final[ ])?impressions? (?:{_AND}(?:recommendations?|plan))? | conclusions? )
      | (?P<signature> {_SIGNATURE} )
      | (?P<other> {_OTHER} )
    ) (?(signature) | [ \t]* (?:\([^()\n]{{1,40}}\)[ \t]*)? (?P<colon> : | $ ) )
    | ^[ \t]*+ (?P<view> (?-i:
        (?!COMPARISON|HISTORY|INDICATION|TECHNIQUE|REASON) (?=[^:\n]{{0,80}}\b(?:{_PROJECTION})\b)
        [A-Z][A-Z0-9 ,()/&.'_-]{{2,79}} ) ) : (?!\d)
    | (?P<rule_line> ^[ \t]*+[_=-]{{8,}}+[ \t]*$ )
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_BOLD = re.compile(r"(?<!\*)\*\*(?!\*)")  # Markdown; three and more asterisks may be a blank of de-identification
_FINAL_REPORT = re.compile(r"^[ \t]*FINAL REPORT[ \t]*:?[ \t]*$", re.MULTILINE)


def _parse_tolerant(text: str) -> ParsedReport:
    # Before FINAL REPORT stand preliminary reads and addenda: they count only where nothing follows.
    text = _BOLD.sub("", text)
    last = _FINAL_REPORT.split(text)[-1]
    final = _read_sections(last)
    if final.rule != "no section" or any(kind != "signature" and _is_prose(body) for kind, body in _sections(last)):
        return final
    return _read_sections(text)


def _read_sections(text: str) -> ParsedReport:
    """Of two sections with one name the last that is not empty wins."""
    found: dict[str, str] = {}
    for before, (kind, body) in pairwise([("", ""), *_sections(text)]):
        if kind == "view" and before == ("impression", "") and _is_prose(body):
            kind = "impression"
        if kind == "joint" and body:
            found |= {"findings": body, "impression": body, "joint header": body}
        elif body and (kind != "view" or _is_prose(body)):
            found[kind] = body
    findings, impression = found.get("findings", ""), found.get("impression", "")
    if "joint header" in found:
        return ParsedReport(findings, impression, "joint header")
    if not findings and "view" in found:
        return ParsedReport(found["view"], impression, "view header")
    rule = " and ".join(name for name in ("findings", "impression") if name in found)
    return ParsedReport(findings, impression, rule or "no section")


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(kind, body) of each section, in the order of the text."""
    opened, start = None, 0
    for match in _HEADER.finditer(text):
        body = _clean(text[start : match.start()])
        if _is_header(text, match, opened, body):
            yield _kind(opened), body
            opened, start = match, match.end()
    yield _kind(opened), _clean(text[start:])


def _kind(header: re.Match[str] | None) -> str:
    return next(name for name in _KINDS if header[name] is not None) if header else ""


def _is_header(text: str, match: re.Match[str], opened: re.Match[str] | None, body: str) -> bool:
    """Tell "IMPRESSION:" from "clinical impression: pneumonia" in a sentence, by where it stands and its capitals.

    opened is the header of the section in which it stands, body the text between the two.
    """
    kind, within = _kind(match), _kind(opened)
    if kind == "view":
        # "CHEST 2 VIEWS:" in the midst of the findings heads a paragraph of theirs, as "HEART:" does.
        return not (within in ("findings", "joint") and body)
    if kind == "rule_line":
        return True
    before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].rstrip()
    if kind == "signature":
        return not before or before[-1] in ".:;?!)" or "signed" in match[kind].lower()
    if not match["colon"]:
        return not before and match[kind][0].isupper()
    if not before or match[kind].isupper():
        return True
    if kind == "findings" and within == "impression" and not body:  # "IMPRESSION: Findings: stable."
        return False
    if kind == "impression" and opened and within == "findings" and not opened[within].isupper():
        return True  # "findings: clear impression: normal"
    return kind != "other" and before[-1] in ".:;?!)"


def _is_prose(body: str) -> bool:
    """A sentence, not the date that often follows the name of a projection."""
    return len(re.findall(r"[A-Za-z]{2,}", body)) >= 3


def _clean(body: str) -> str:
    body = " ".join(body.split())
    return "" if is_missing(body) else body


def _parse_mit_lcp(text: str) -> ParsedReport:
    """Headers are capitals without digits at the start of a line; where none is known, the last paragraph is taken."""
    parts = re.split(r"\n ?([A-Z ()/,-]+):\s", "\n" + text)
    found: dict[str, str] = {}
    for header, body in zip(parts[1::2], parts[2::2], strict=True):
        kind = next((name for name in ("impression", "findings") if name in header.lower()), "other")
        found[kind] = _clean(body)
    findings, impression = found.get("findings", ""), found.get("impression", "")
    if "findings" in found or "impression" in found:
        rule = " and ".join(name for name in ("findings", "impression") if found.get(name))
        return ParsedReport(findings, impression, rule or "no section")
    paragraph = _clean(re.split(r"\n[ \t]*\n", parts[-1].rstrip())[-1])
    return ParsedReport("", paragraph, "last paragraph" if paragraph else "no section")


def plain_words(text: str) -> str:
    """A text without what two copies of a report may differ in: case, punctuation and blanks."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()

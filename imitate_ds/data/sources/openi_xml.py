"""Reports of Open-i in XML, one file each, as the National Library of Medicine serves them (NLMCXR_reports)."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

MAX_REPORT_BYTES = 2**20  # a report has ten thousand
_FRONTAL = re.compile(r"\b(pa|ap|frontal|postero-?anterior|antero-?posterior)\b", re.IGNORECASE)
_LATERAL = re.compile(r"\b(lat|lateral)\b", re.IGNORECASE)


class XmlReport(NamedTuple):
    """Sections as written ("" where absent); images: (id, caption), ids as in indiana_projections.csv."""

    uid: str  # "1", as in indiana_reports.csv, of the file's "CXR1"
    findings: str
    impression: str
    images: tuple[tuple[str, str], ...]


def find_xml_reports(root: Path) -> Path | None:
    """The folder with the reports: ecgen-radiology/, also within NLMCXR_reports/, or root itself."""
    folders = (root / "ecgen-radiology", root / "NLMCXR_reports" / "ecgen-radiology", root)
    return next((folder for folder in folders if next(folder.glob("*.xml"), None)), None)


def read_xml_reports(folder: Path) -> list[XmlReport]:
    """All reports, by number. Raises ValueError that counts those which are none: the name of a file is a study's id."""
    reports, faults = [], Counter()
    for path in sorted(folder.glob("*.xml")):
        try:
            reports.append(_read_report(path))
        except UnicodeDecodeError:
            faults["not UTF-8 text"] += 1
        except ElementTree.ParseError:
            faults["not well-formed XML"] += 1
        except ValueError as error:
            faults[str(error)] += 1
    if repeated := len(reports) - len({report.uid for report in reports}):
        faults["with the uId of another"] = repeated
    if faults:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items()))
        count = len(reports) - repeated
        raise ValueError(
            f"{folder}: {sum(faults.values())} of {sum(faults.values()) + count} reports cannot be read ({reasons}); "
            "unpack NLMCXR_reports.tgz again, or take them away"
        )
    return sorted(reports, key=lambda report: (len(report.uid), report.uid))


def _read_report(path: Path) -> XmlReport:
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise ValueError(f"of more than {MAX_REPORT_BYTES:,} bytes")
    text = path.read_text(encoding="utf-8-sig")
    # Without a DOCTYPE there is no entity to expand, and none that is read from elsewhere; no report has one.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("with a DOCTYPE or an entity")
    tree = ElementTree.fromstring(text)
    name = tree.find("uId")
    uid = plain_id(name.get("id", "")) if name is not None else ""
    if not uid:
        raise ValueError("without a uId")
    return XmlReport(uid, _section(tree, "FINDINGS"), _section(tree, "IMPRESSION"), tuple(_images(tree)))


def plain_id(name: str) -> str:
    """The name of a report or an image without the CXR1_ or CXR that the XML form puts before it."""
    return re.sub(r"^CXR(\d+_(?=\d))?", "", name.strip())


def _section(tree: ElementTree.Element, label: str) -> str:
    texts = (e for e in tree.iter("AbstractText") if e.get("Label", "").strip().upper() == label)
    return "\n".join(filter(None, (_text(element) for element in texts)))


def _images(tree: ElementTree.Element):
    for image in tree.iter("parentImage"):
        yield plain_id(image.get("id", "")), _text(image.find("caption"))


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else "".join(element.itertext()).strip()


def views_by_caption(images: Sequence[tuple[str, str]]) -> dict[str, str]:
    """image id -> "frontal" or "lateral" where its caption says so, else "unknown".

    Most captions name the examination ("Xray Chest PA and Lateral") and stand under each of its images: such a one tells
    nothing. So a caption counts where it names one projection, and no other image of the report has the same.
    """
    shared = Counter(caption for _, caption in images)
    return {image: _view(caption) if shared[caption] == 1 else "unknown" for image, caption in images}


def _view(caption: str) -> str:
    frontal, lateral = bool(_FRONTAL.search(caption)), bool(_LATERAL.search(caption))
    return "unknown" if frontal == lateral else "frontal" if frontal else "lateral"

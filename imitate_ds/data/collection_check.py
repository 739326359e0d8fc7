"""What a collection on disk holds, beside what was published of it, before hours go into shards of half a download."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from imitate_ds.batch import is_missing
from imitate_ds.data.progress import shown
from imitate_ds.data.shard_index import sample_key
from imitate_ds.data.sources.base import Published, Source, Study, reader_files

SHOWN = 5  # missing files that are named
SPLITS = ("train", "val", "test")
LABEL_VALUES = (1, 0, -1)
CAPTION = "labels: studies that have it / have it not / are uncertain"


class MissingFile(NamedTuple):
    """A file that a table names and that is not there, or is empty, as a download that broke off leaves it."""

    split: str
    key: str  # of the first radiograph of its study: what a log may say
    path: Path


@dataclass
class SplitCounts:
    studies: int = 0
    radiographs: int = 0
    frontal: int = 0
    with_text: int = 0
    boxed: int = 0  # studies that were annotated with boxes, be it with none
    patients: set[str] = field(default_factory=set)
    labels: Counter[tuple[str, int]] = field(default_factory=Counter)
    boxes: Counter[str] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)

    def add(self, study: Study) -> None:
        self.studies += 1
        self.patients.add(study.patient_id)
        self.radiographs += len(study.radiographs)
        self.frontal += sum(image.view_position == "frontal" for image in study.radiographs)
        self.with_text += not (is_missing(study.findings) and is_missing(study.impression))
        self.labels.update(study.labels.items())
        self.masks.update(study.masks.keys())
        if isinstance(boxes := study.extra.get("boxes"), list):
            self.boxes.update(box["label"] for box in boxes)
            self.boxed += 1

    def rows(self) -> dict[str, str]:
        """What a table shows; numbers alone, no ids."""
        rows = {"studies": self.studies, "patients": len(self.patients), "radiographs": self.radiographs}
        rows |= {"frontal radiographs": self.frontal, "studies with text": self.with_text}
        rows |= {f"boxes of {name}": self.boxes[name] for name in sorted(self.boxes)}
        rows |= {"studies annotated with boxes": self.boxed} if self.boxed else {}
        rows |= {f"studies with mask {name}": self.masks[name] for name in sorted(self.masks)}
        labels = {f"label {name}": name for name in sorted({name for name, _ in self.labels})}
        return {row: f"{count:,}" for row, count in rows.items()} | {
            row: " / ".join(f"{self.labels[name, value]:,}" for value in LABEL_VALUES) for row, name in labels.items()
        }


@dataclass(frozen=True)
class CollectionCheck:
    source: str
    splits: dict[str, SplitCounts]
    published: Published
    missing: list[MissingFile]

    @property
    def torn_patients(self) -> int:
        """Patients in more than one split."""
        splits = Counter(patient for counts in self.splits.values() for patient in counts.patients)
        return sum(count > 1 for count in splits.values())

    def of_scope(self, scope: str, what: str) -> int:
        """radiographs, patients or boxes of a split, of several (train + val), or of all."""
        chosen = [counts for name, counts in self.splits.items() if scope == "all" or name in scope.split(" + ")]
        if what == "patients":
            return len(set().union(*(counts.patients for counts in chosen)))
        if what == "boxes":
            return sum(counts.boxes.total() for counts in chosen)
        return sum(counts.radiographs for counts in chosen)

    def compared(self) -> Iterator[tuple[str, str, int, int]]:
        """(scope, what, how many are here, how many were published), of the scopes of which anything is here."""
        for scope, figures in self.published.items():
            if self.of_scope(scope, "radiographs"):
                # Files of annotations are often left out; where no box is there, none is missing.
                yield from (
                    (scope, what, here, count)
                    for what, count in figures.items()
                    if (here := self.of_scope(scope, what)) or what != "boxes"
                )

    @property
    def is_whole(self) -> bool:
        """No file is missing, no patient in two splits, nothing less than was published."""
        fewer = any(here < count for _, _, here, count in self.compared())
        return not (self.missing or self.torn_patients or fewer)


def check_collection(source: Source) -> CollectionCheck:
    """Count what a source yields, and look for every file that it would read; none is opened."""
    found: defaultdict[str, SplitCounts] = defaultdict(SplitCounts)
    missing: list[MissingFile] = []
    for study in shown(source, len(source), "checking", progress=sys.stderr.isatty()):
        found[study.split].add(study)
        missing += _missing_files(source.name, study)
    order = [*(name for name in SPLITS if name in found), *sorted(found.keys() - set(SPLITS))]
    published: Published = getattr(source, "published", {})
    return CollectionCheck(source.name, {name: found[name] for name in order}, published, missing)


def _missing_files(source: str, study: Study) -> Iterator[MissingFile]:
    """Of a study, each once: its masks may lie in one file, or be drawn from the radiograph's."""
    keys = {}
    for image in study.radiographs:
        keys |= dict.fromkeys(reader_files(image.read), sample_key(source, study.study_id, image.image_id))
    first = next(iter(keys.values()), "")
    for read in study.masks.values():
        keys = {**dict.fromkeys(reader_files(read), first), **keys}
    return (MissingFile(study.split, key, path) for path, key in keys.items() if not _has_content(path))


def _has_content(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False


def check_table(check: CollectionCheck) -> Table:
    """The counts, to print: one column per split."""
    table = Table("", *check.splits, title=f"{check.source}: what is here", caption=CAPTION)
    rows = {split: counts.rows() for split, counts in check.splits.items()}
    for name in dict.fromkeys(name for values in rows.values() for name in values):
        table.add_row(name, *(values.get(name, "0") for values in rows.values()))
    return table


def check_lines(check: CollectionCheck, *, show_names: bool = False) -> list[str]:
    """What agrees with what was published and what does not, and what is missing, to print below the table.

    A missing file is named by the key of its radiograph, or with show_names by its path, which may hold the id of a patient.
    """
    lines = [
        f"{scope}: {here:,} {what}, {count:,} published: {_verdict(here, count)}"
        for scope, what, here, count in check.compared()
    ]
    lines += [
        f"{scope}: not here; {figures['radiographs']:,} radiographs published"
        for scope, figures in check.published.items()
        if not check.of_scope(scope, "radiographs")
    ]
    if check.torn_patients:
        lines.append(f"{check.torn_patients:,} patients are in more than one split")
    for split, files in _by_split(check.missing).items():
        names = ", ".join(str(file.path) if show_names else file.key for file in files[:SHOWN])
        more = f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else ""
        lines.append(f"{split}: {len(files):,} files that its tables name are not there, or empty: {names}{more}")
    if check.missing and not show_names:
        lines.append("these are keys of radiographs; --show-names prints paths, which can hold ids of patients")
    return [*lines, f"{check.source}: {'whole' if check.is_whole else 'something is missing or wrong'}"]


def _by_split(files: list[MissingFile]) -> dict[str, list[MissingFile]]:
    by_split: dict[str, list[MissingFile]] = defaultdict(list)
    for file in files:
        by_split[file.split].append(file)
    return by_split


def _verdict(here: int, published: int) -> str:
    if here == published:
        return "the same"
    return f"{published - here:,} fewer" if here < published else f"{here - published:,} more"

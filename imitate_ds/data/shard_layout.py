"""Which study goes into which shard, decided before the first radiograph is read.

The layout is a function of the source alone: not of the number of workers, and not of the part of the build that this
machine does. So parts built on many machines fit together, and give the same bytes as one machine would.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imitate_ds.batch import is_missing
from imitate_ds.data.shard_index import group_hash, sample_key
from imitate_ds.data.sources.base import RadiographRef, Source, Study

NO_TEXT = "neither findings nor impression"
NO_FRONTAL = "no frontal radiograph"


@dataclass(frozen=True)
class ShardTask:
    """One tar to write."""

    name: str
    split: str
    source: str
    synthetic: bool
    image_size: int
    studies: tuple[Study, ...]


@dataclass(frozen=True)
class Layout:
    tasks: tuple[ShardTask, ...]
    fingerprint: str  # of everything the tars are made from, except the pixels
    report: dict  # counts of what was dropped so far, and the sections of all studies


def plan_layout(source: Source, *, image_size: int, samples_per_shard: int) -> Layout:
    """Cut the usable studies of a source into shards of about samples_per_shard frontal radiographs.

    Raises ValueError where a patient is in two splits, two samples have one id, or no study is usable.
    """
    studies = list(source)
    _check_splits(source.name, studies)
    _check_keys(source.name, studies)
    usable, report = _select(studies, text_needed=source.has_reports)
    if not usable:
        raise ValueError(f"source {source.name}: none of {len(studies)} studies is usable: {_counts(report)}")
    tasks: list[ShardTask] = []
    for split in sorted({study.split for study in usable}, key=_split_order):
        ordered = _ordered(source.name, split, usable)
        for number, group in enumerate(_groups(ordered, samples_per_shard)):
            tasks.append(
                ShardTask(f"{split}-{number:06d}.tar", split, source.name, source.synthetic, image_size, group)
            )
    return Layout(tuple(tasks), _fingerprint(tasks), report)


def frontal(study: Study) -> tuple[RadiographRef, ...]:
    return tuple(image for image in study.radiographs if image.view_position == "frontal")


def frontal_pairs(studies: Iterable[Study]) -> Iterator[tuple[Study, RadiographRef]]:
    """Every frontal radiograph with its study: the samples to be."""
    return ((study, image) for study in studies for image in frontal(study))


def _check_splits(source: str, studies: list[Study]) -> None:
    seen: dict[str, str] = {}
    torn = {s.patient_id for s in studies if seen.setdefault(s.patient_id, s.split) != s.split}
    if torn:
        example = group_hash(source, min(torn))
        raise ValueError(
            f"source {source}: {len(torn)} patients are in two splits (one has the hash {example}); "
            "a patient must be in one split: mend the split file, or leave it out to split by a hash of the patient"
        )


def _check_keys(source: str, studies: list[Study]) -> None:
    ids = Counter(study.study_id for study in studies)
    repeated = sum(count > 1 for count in ids.values())
    keys = [sample_key(source, study.study_id, image.image_id) for study in studies for image in study.radiographs]
    if repeated or len(set(keys)) < len(keys):
        raise ValueError(
            f"source {source}: {repeated} study ids are given to more than one study, and {len(keys) - len(set(keys))} "
            "images repeat an id within their study; remove the repeated rows"
        )


def _select(studies: list[Study], *, text_needed: bool) -> tuple[list[Study], dict]:
    usable: list[Study] = []
    dropped_studies: Counter[str] = Counter()
    dropped_images: Counter[str] = Counter()
    for study in studies:
        if text_needed and _sections(study) == "none":
            dropped_studies[NO_TEXT] += 1
            continue
        dropped_images.update(i.view_position for i in study.radiographs if i.view_position != "frontal")
        if frontal(study):
            usable.append(study)
        else:
            dropped_studies[NO_FRONTAL] += 1
    sections = Counter(_sections(study) for study in studies)
    report = {
        "studies": len(studies),
        "sections": {name: sections[name] for name in ("both", "findings only", "impression only", "none")},
        "dropped_studies": dict(dropped_studies),
        "dropped_images": {f"view position: {name}": count for name, count in sorted(dropped_images.items())},
    }
    return usable, report


def _sections(study: Study) -> str:
    findings, impression = not is_missing(study.findings), not is_missing(study.impression)
    if findings and impression:
        return "both"
    return "findings only" if findings else "impression only" if impression else "none"


def _counts(report: dict) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in report["dropped_studies"].items()) or "it is empty"


def _split_order(split: str) -> tuple[int, str]:
    known = ("train", "val", "test")
    return (known.index(split) if split in known else len(known), split)


def _ordered(source: str, split: str, studies: list[Study]) -> list[Study]:
    """Training studies in an order that has nothing to do with site or date, so that a shard is a fair sample."""
    members = [study for study in studies if study.split == split]
    return sorted(members, key=lambda s: sample_key(source, s.study_id, "")) if split == "train" else members


def _groups(studies: Iterable[Study], samples: int) -> list[tuple[Study, ...]]:
    groups: list[tuple[Study, ...]] = []
    group: list[Study] = []
    filled = 0
    for study in studies:
        group.append(study)
        filled += len(frontal(study))
        if filled >= samples:
            groups.append(tuple(group))
            group, filled = [], 0
    return [*groups, tuple(group)] if group else groups


def _fingerprint(tasks: list[ShardTask]) -> str:
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps([task.name, task.source, task.image_size]).encode())
        for study in task.studies:
            images = [[i.image_id, i.view_position, _describe(i.read)] for i in study.radiographs]
            masks = {name: _describe(read) for name, read in study.masks.items()}
            text = [study.patient_id, study.study_id, study.findings, study.impression, study.labels, study.extra]
            digest.update(json.dumps([text, images, masks], sort_keys=True).encode())
    return digest.hexdigest()


def _describe(read) -> str:
    """What a reader will read: its function and arguments, without addresses that differ between processes."""
    if isinstance(read, functools.partial):
        return f"{_describe(read.func)} {_without_addresses(repr((read.args, read.keywords)))}"
    return getattr(read, "__qualname__", "") or _without_addresses(repr(read))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)

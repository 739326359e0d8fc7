"""Does B hold what a model has seen in A? Patients, studies, radiographs and reports that two shard folders share.

Patients and studies are compared by their group hashes where both sides are of one collection, and else by their ids as
the tars have them. Radiographs are compared as stored bytes, and by what they show: a 64-bit perceptual hash finds
candidates, and a thumbnail of each, moved and scaled a little, confirms them. That holds through another JPEG quality,
size, brightness or gamma, through padding, and through a crop of 2 %; a mirrored, turned or inverted radiograph, and
one cropped by 5 %, is not found. Reports are compared without case, punctuation and blanks.

The figures below were measured on Open-i (3,224 frontal radiographs of 3,120 patients) and on 2,000 phantoms.
"""

import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import scipy.fft
from PIL import Image
from rich.table import Table

from imitate_ds.batch import is_missing
from imitate_ds.data.member_table import Member
from imitate_ds.data.progress import shown
from imitate_ds.data.radiographs import decode_radiograph
from imitate_ds.data.reports import plain_words
from imitate_ds.data.shard_index import ShardEntry, ShardIndex, read_shard, write_atomic
from imitate_ds.data.shard_sample import error_rule
from imitate_ds.data.square import content_box

log = logging.getLogger(__name__)

KINDS = ("patient", "study", "image", "near image", "report")
# One source for many collections: its name says nothing about whose ids these are.
MIXED_SOURCES = ("table",)
# Shorter ids are running numbers, which two collections have in common by accident.
MIN_ID_DIGITS = 6
# Of the reports with 25 words or more, 17 % are also the report of another patient; with 50 or more 1.7 %; with 60 none of 381.
MIN_REPORT_WORDS = 60
# Bits of 64. Of copies cropped by 2 % 99.8 % are no further apart, and of pairs of two patients 0.6 %: candidates only.
MAX_DISTANCE = 10
MAX_MAX_DISTANCE = 20  # from here on every third pair is a candidate
# Correlation of two thumbnails. For 99 % of the copies cropped by 2 % it is 0.98 or more, and at most 0.88 in 10 million
# comparisons of two patients of Open-i. Phantoms are built alike: two of them reach 0.96 in 4 million comparisons.
MIN_CORRELATION = 0.93
MIN_CORRELATION_PHANTOM = 0.965
THUMB = 48  # pixels of a side
MARGIN = 4  # pixels of the thumbnail that are not compared: what the crop and the borders change
SCALES = (0.96, 0.98, 1.0, 1.02, 1.04)
SHIFTS = (-0.01, 0.0, 0.01)  # of the side
MAX_CANDIDATES = 8192  # the nearest ones, for one radiograph: in a folder of blank images all would be

_FACTS = np.dtype(
    [
        *((name, np.uint64) for name in ("key", "patient", "study", "patient_id", "study_id")),
        *((name, np.bool_) for name in ("patient_tells", "study_tells", "seen")),
        *((name, np.uint64) for name in ("image", "perceptual", "report")),
        ("words", np.uint32),
    ]
)


class _Side(NamedTuple):
    """What is kept of n samples: hashes, and no ids or text. 2.4 KB a sample."""

    facts: np.ndarray  # _FACTS [n]
    thumbs: np.ndarray  # uint8 [n, THUMB, THUMB]; zeros where the radiograph is damaged


@dataclass(frozen=True, slots=True)
class Leak:
    """A sample of B, and the first one of A with the same patient, study, image or report (of near images the nearest)."""

    kind: str  # one of KINDS
    a: str  # keys of the samples
    b: str
    distance: int = 0  # bits of 64 in which the perceptual hashes differ; 0 for all but near images


@dataclass(frozen=True)
class LeakReport:
    """At most one leak of each kind for every sample of B. A radiograph whose bytes are in A is no near image besides."""

    samples_a: int
    samples_b: int
    leaks: tuple[Leak, ...]
    same_source: bool  # ids were compared as those of one collection
    short_ids: int  # samples of B with an id of A that is too short to mean the same person in another collection
    common_wording: int  # samples of B with a report of A that is too short to be anybody's own
    damaged_a: int  # samples whose radiograph could not be compared
    damaged_b: int

    @property
    def counts(self) -> dict[str, int]:
        """Samples of B that leak, by kind."""
        found = Counter(leak.kind for leak in self.leaks)
        return {kind: found[kind] for kind in KINDS}

    @property
    def leaking(self) -> int:
        """Samples of B that leak by any kind."""
        return len({leak.b for leak in self.leaks})


def check_leak(
    a: ShardIndex,
    b: ShardIndex,
    *,
    split_a: str = "",
    split_b: str = "",
    max_distance: int = MAX_DISTANCE,
    progress: bool = True,
) -> LeakReport:
    """Which samples of B (all splits, unless one is named) have a patient, study, image or report that is in A.

    max_distance: bits of 64 in which the perceptual hashes of two radiographs may differ for them to be compared closer.
    Raises ValueError for a folder compared with itself unless two splits are named, for a split that is not there, and
    for a tar that cannot be read; a damaged radiograph is logged by its key and counted.
    """
    _check_arguments(a, b, split_a, split_b, max_distance)
    seen, held = _read_side(a, split_a, "A", progress), _read_side(b, split_b, "B", progress)
    same = _same_ids(a, b)
    partners = {kind: _partners(seen, held, kind, same) for kind in ("patient", "study", "image")}
    unseen = held.facts["seen"] & (partners["image"] < 0)
    least = MIN_CORRELATION_PHANTOM if a.synthetic or b.synthetic else MIN_CORRELATION
    partners["near image"], distances = _near_images(seen, held, unseen, max_distance, least, progress)
    reports = _first_partners(seen.facts["report"], held.facts["report"], held.facts["words"] > 0)
    own = held.facts["words"] >= MIN_REPORT_WORDS
    partners["report"] = np.where(own, reports, -1)
    return LeakReport(
        samples_a=len(seen.facts),
        samples_b=len(held.facts),
        leaks=tuple(leak for kind in KINDS for leak in _leaks(kind, seen, held, partners[kind], distances)),
        same_source=same,
        short_ids=0 if same else _short_ids(seen, held),
        common_wording=int(((reports >= 0) & ~own).sum()),
        damaged_a=int((~seen.facts["seen"]).sum()),
        damaged_b=int((~held.facts["seen"]).sum()),
    )


def leak_table(report: LeakReport) -> Table:
    """The report, to print: counts, and the keys of one pair of each kind. Fits into 80 columns."""
    table = Table("samples of B", title="B against A", caption=_caption(report))
    for column in ("count", "share"):
        table.add_column(column, justify="right")
    for column in ("one of A", "and of B"):
        table.add_column(column, no_wrap=True, min_width=16)
    first = {leak.kind: leak for leak in reversed(report.leaks)}
    for kind, count in report.counts.items():
        keys = (first[kind].a, first[kind].b) if kind in first else ()
        table.add_row(kind if " " in kind else f"same {kind}", f"{count:,}", _share(count, report.samples_b), *keys)
    table.add_section()
    table.add_row("any of these", f"{report.leaking:,}", _share(report.leaking, report.samples_b))
    table.add_row("all", f"{report.samples_b:,}", _share(report.samples_b, report.samples_b))
    table.add_section()
    for name, count in (("common wording", report.common_wording), ("short ids", report.short_ids)):
        table.add_row(name, f"{count:,}", _share(count, report.samples_b))
    table.add_row("damaged", f"{report.damaged_b:,}", _share(report.damaged_b, report.samples_b))
    return table


def _caption(report: LeakReport) -> str:
    ids = "equal ids are the same person for certain" if report.same_source else "long equal ids are the same person"
    return (
        f"A has {report.samples_a:,} samples, {report.damaged_a:,} of them damaged; {ids}. No leak: reports of less than "
        f"{MIN_REPORT_WORDS} words (common wording), short ids of another source. Damaged images are not compared."
    )


def save_leaks(report: LeakReport, path: Path) -> None:
    """Write the pairs of keys as CSV: kind, key_a, key_b, distance. Keys are pseudonyms: the file belongs with the data."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("kind", "key_a", "key_b", "distance"))
    rows.writerows((leak.kind, leak.a, leak.b, leak.distance) for leak in report.leaks)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def comparable_id(identifier: str) -> tuple[str, bool]:
    """An id as another source of the same collection may have it, and whether it can be told from a running number.

    p10000032 and 10000032 are one id. It tells something with MIN_ID_DIGITS digits, leading zeros not counted: 17,
    patient00017 and 000017 are somebody else in another collection.
    """
    plain = re.sub(r"[\W_]+", "", identifier.lower())
    digits = sum(len(number.lstrip("0")) for number in re.findall(r"\d+", identifier))
    return re.sub(r"^[a-z](?=\d+$)", "", plain), digits >= MIN_ID_DIGITS


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """A radiograph, uint8 [H, W], without its borders, as a square uint8 [THUMB, THUMB]; one pixel value is a ValueError.

    Its aspect is not kept: copies of a collection differ in whether they are padded or squashed to a square.
    """
    box = content_box(pixels)
    edges = (box.left, box.top, box.right, box.bottom)
    return np.asarray(Image.fromarray(pixels).resize((THUMB, THUMB), Image.Resampling.BILINEAR, box=edges))


def perceptual_hash(thumb: np.ndarray) -> int:
    """64 bits of a thumbnail [THUMB, THUMB]: which of its 8 x 8 slowest cosine waves are above their median."""
    waves = np.asarray(scipy.fft.dctn(thumb.astype(np.float32), norm="ortho"))[:8, :8].ravel()
    return int.from_bytes(np.packbits(waves > np.median(waves[1:])).tobytes(), "big")


def alike(thumb: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How well a thumbnail [THUMB, THUMB], moved and scaled as it fits best, correlates with others [n, ...]: float32 [n].

    It is the slopes that are compared, not the grey values: any two chests correlate in those.
    """
    poses = _slopes(_poses(thumb))
    slices = (others[start : start + 512] for start in range(0, len(others), 512))
    return np.concatenate([(poses @ _slopes(part).T).max(axis=0) for part in slices])


def _check_arguments(a: ShardIndex, b: ShardIndex, split_a: str, split_b: str, max_distance: int) -> None:
    if not 0 <= max_distance <= MAX_MAX_DISTANCE:
        raise ValueError(
            f"max_distance = {max_distance}: must be 0 to {MAX_MAX_DISTANCE} of 64 bits; unrelated images are about 30 apart"
        )
    if a.root.resolve() == b.root.resolve() and (not split_a or not split_b or split_a == split_b):
        raise ValueError(
            f"split_a = {split_a!r}, split_b = {split_b!r}: A and B are one folder, {a.root}; name two different splits "
            f"of it; it has: {', '.join(a.splits)}"
        )
    for index, split in ((a, split_a), (b, split_b)):
        _shards(index, split)


def _shards(index: ShardIndex, split: str) -> tuple[ShardEntry, ...]:
    return index.of_split(split) if split else index.shards


def _same_ids(a: ShardIndex, b: ShardIndex) -> bool:
    """Whether equal ids are the same person for certain: of one collection, or of one build."""
    return a.build_id == b.build_id or (a.source == b.source and a.source not in MIXED_SOURCES)


def _read_side(index: ShardIndex, split: str, name: str, progress: bool) -> _Side:
    shards = _shards(index, split)
    count = sum(shard.samples for shard in shards)
    side = _Side(np.zeros(count, _FACTS), np.zeros((count, THUMB, THUMB), np.uint8))
    row = 0
    for shard in shown(shards, len(shards), f"reading {name}", progress):
        for member, image, meta in _samples(index, shard):
            _keep_texts(side.facts[row], member, meta)
            try:
                _keep_image(side, row, member, image)
            except ValueError as error:
                log.warning("sample %s: its radiograph cannot be compared: %s", member.key, error_rule(error))
            row += 1
    return side


def _samples(index: ShardIndex, shard: ShardEntry) -> Iterator[tuple[Member, bytes, dict]]:
    try:
        yield from read_shard(index.fetch(shard.file).parent, shard)
    except (json.JSONDecodeError, UnicodeDecodeError):  # their messages are about the text
        raise ValueError(f"{shard.name}: the JSON of a sample is damaged; see 'imitate-ds shards verify'") from None


def _keep_texts(facts: np.void, member: Member, meta: dict) -> None:
    facts["key"], facts["patient"], facts["study"] = (int(v, 16) for v in (member.key, member.patient, member.study))
    for name in ("patient", "study"):
        text, facts[f"{name}_tells"] = comparable_id(meta[f"{name}_id"])
        facts[f"{name}_id"] = _hash64(text.encode())
    sections = (meta[name] for name in ("findings", "impression"))
    report = plain_words(" ".join(text for text in sections if not is_missing(text)))
    facts["report"], facts["words"] = _hash64(report.encode()), len(report.split())


def _keep_image(side: _Side, row: int, member: Member, image: bytes) -> None:
    """Raises ValueError where the image is damaged; its bytes are compared even so."""
    facts = side.facts[row]
    facts["image"] = _hash64(image)
    if crc32(image) != member.image_crc:
        raise ValueError("checksum differs from the index")
    side.thumbs[row] = thumbnail(decode_radiograph(image))
    facts["perceptual"] = perceptual_hash(side.thumbs[row])
    facts["seen"] = True


def _hash64(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def _partners(seen: _Side, held: _Side, kind: str, same: bool) -> np.ndarray:
    """For each sample of B the first of A with the same patient, study or image: rows int64 [n], -1 where there is none."""
    if kind == "image" or same:
        return _first_partners(seen.facts[kind], held.facts[kind])
    return _first_partners(seen.facts[f"{kind}_id"], held.facts[f"{kind}_id"], held.facts[f"{kind}_tells"])


def _first_partners(seen: np.ndarray, held: np.ndarray, asked: np.ndarray | None = None) -> np.ndarray:
    """For each hash of held the first row of seen with the same one, -1 where there is none or where it is not asked."""
    values, rows = np.unique(seen, return_index=True)
    place = np.searchsorted(values, held).clip(max=len(values) - 1)
    found = values[place] == held
    return np.where(found if asked is None else found & asked, rows[place], -1)


def _short_ids(seen: _Side, held: _Side) -> int:
    short = np.zeros(len(held.facts), bool)
    for kind in ("patient", "study"):
        ids = f"{kind}_id"
        short |= _first_partners(seen.facts[ids], held.facts[ids], ~held.facts[f"{kind}_tells"]) >= 0
    return int(short.sum())


def _near_images(
    seen: _Side, held: _Side, asked: np.ndarray, max_distance: int, least: float, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """For each sample of B that is asked for the most alike of A, if it is alike enough, and the distance of the hashes.

    A row of B against all of A at a time, so that it takes no memory: 200,000 x 5,000 hashes in seconds.
    """
    whole = np.flatnonzero(seen.facts["seen"])
    hashes = np.ascontiguousarray(seen.facts["perceptual"][whole])
    partners, distances = np.full(len(held.facts), -1), np.zeros(len(held.facts), np.uint8)
    parts = [part for part in np.array_split(np.flatnonzero(asked), 20) if len(part)]
    for part in shown(parts, len(parts), "comparing images", progress):
        for row in part:
            away = np.bitwise_count(hashes ^ held.facts["perceptual"][row])
            candidates = np.flatnonzero(away <= max_distance)
            nearest = candidates[np.argsort(away[candidates], kind="stable")[:MAX_CANDIDATES]]
            if len(nearest):
                scores = alike(held.thumbs[row], seen.thumbs[whole[nearest]])
                best = int(scores.argmax())
                if scores[best] >= least:
                    partners[row], distances[row] = whole[nearest[best]], away[nearest[best]]
    return partners, distances


def _poses(thumb: np.ndarray) -> np.ndarray:
    """A thumbnail, scaled and moved by as much as a crop of 2 % on any side would: [poses, THUMB, THUMB]."""
    image = Image.fromarray(thumb)
    poses: list[np.ndarray] = []
    for scale in SCALES:
        for down in SHIFTS:
            for right in SHIFTS:
                left, top = (THUMB * ((1 - scale) / 2 + shift) for shift in (right, down))
                moved = image.transform(
                    image.size, Image.Transform.AFFINE, (scale, 0, left, 0, scale, top), Image.Resampling.BILINEAR
                )
                poses.append(np.asarray(moved))
    return np.stack(poses)


def _slopes(thumbs: np.ndarray) -> np.ndarray:
    """Differences of the grey values to both sides and up and down, inside the margin: unit rows, mean 0."""
    grey = thumbs.astype(np.float32)
    inside = slice(MARGIN, -MARGIN)
    down = grey[:, MARGIN + 1 : 1 - MARGIN, inside] - grey[:, MARGIN - 1 : -MARGIN - 1, inside]
    right = grey[:, inside, MARGIN + 1 : 1 - MARGIN] - grey[:, inside, MARGIN - 1 : -MARGIN - 1]
    rows = np.concatenate([down, right], axis=1).reshape(len(grey), -1)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-6))


def _leaks(kind: str, seen: _Side, held: _Side, partners: np.ndarray, distances: np.ndarray) -> Iterator[Leak]:
    for row in np.flatnonzero(partners >= 0):
        a, b = seen.facts["key"][partners[row]], held.facts["key"][row]
        yield Leak(kind, f"{a:016x}", f"{b:016x}", int(distances[row]) if kind == "near image" else 0)


def _share(count: int, samples: int) -> str:
    return f"{count / max(1, samples):.2%}"

"""What is in a shard folder: counts that may be shown to anybody, and a picture of a few samples on request."""

import math
from collections import Counter
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from imitate_ds.batch import is_missing
from imitate_ds.data.radiographs import decode_radiograph
from imitate_ds.data.shard_index import ShardIndex, load_index, read_samples

SECTIONS = ("findings", "impression")


def shard_stats(root: Path) -> dict:
    """Per split: samples, studies, patients, sections, words, repeated texts, views, labels. No text, no ids."""
    index = load_index(root)
    return {
        "source": index.source,
        "synthetic": index.synthetic,
        "image_size": index.image_size,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "splits": {split: _split_stats(index, split) for split in index.splits},
    }


def samples_picture(root: Path, out_png: Path, count: int = 16) -> None:
    """Write a contact sheet of the first samples of every split in turn: radiographs only, no text, no ids."""
    index = load_index(root)
    streams = [(image for _, image, _ in read_samples(index, split)) for split in index.splits]
    in_turn = (data for row in zip_longest(*streams) for data in row if data is not None)
    images = [decode_radiograph(data) for data in islice(in_turn, count)]
    columns = math.ceil(math.sqrt(len(images)))
    images += [np.zeros_like(images[0])] * (-len(images) % columns)
    rows = [np.hstack(images[start : start + columns]) for start in range(0, len(images), columns)]
    Image.fromarray(np.vstack(rows)).save(out_png)


def report_table(report: dict) -> Table:
    """The report of a build, to print: what was kept, what was dropped and why."""
    table = Table("", "studies", "samples", title="shards build")
    for split, kept in report["kept"].items():
        table.add_row(f"kept: {split}", f"{kept['studies']:,}", f"{kept['samples']:,}")
    for reason, count in report["dropped_studies"].items():
        table.add_row(f"dropped study: {reason}", f"{count:,}", "")
    for reason, count in report["dropped_images"].items():
        table.add_row(f"dropped image: {reason}", "", f"{count:,}")
    table.add_section()
    for name, count in report["sections"].items():
        table.add_row(f"report sections: {name}", f"{count:,}", "")
    table.add_row("all studies of the source", f"{report['studies']:,}", "")
    return table


def stats_table(stats: dict) -> Table:
    """shard_stats, to print: one column per split."""
    splits = stats["splits"]
    kind = ", synthetic" if stats["synthetic"] else ""
    size = f"{stats['shards']} shards, {stats['bytes'] / 2**20:,.1f} MiB, {stats['image_size']} px"
    table = Table("", *splits, title=f"{stats['source']}{kind}: {size}")
    rows = {split: dict(_flat(values)) for split, values in splits.items()}
    for name in dict.fromkeys(name for values in rows.values() for name in values):
        table.add_row(name, *(f"{values.get(name, 0):,.6g}" for values in rows.values()))
    return table


def _split_stats(index: ShardIndex, split: str) -> dict:
    """Texts and labels are counted once per study, radiographs once per sample."""
    metas: dict[str, dict] = {}
    views: Counter[str] = Counter()
    for member, _, meta in read_samples(index, split):
        metas[member.study] = meta
        views[meta["view_position"]] += 1
    studies = list(metas.values())
    members = [member for shard in index.of_split(split) for member in shard.members]
    return {
        "samples": len(members),
        "studies": len(studies),
        "patients": len({member.patient for member in members}),
        "both sections": sum(all(not is_missing(meta[name]) for name in SECTIONS) for meta in studies),
        **{name: _text_stats([meta[name] for meta in studies if not is_missing(meta[name])]) for name in SECTIONS},
        "report": _text_stats([" ".join(meta[name] for name in SECTIONS) for meta in studies]),
        "views": dict(views),
        "labels": _label_stats(index.labels, studies),
    }


def _text_stats(texts: list[str]) -> dict[str, float]:
    """Presence, words, and how much the texts repeat: two are the same if they differ in case or blanks only."""
    words = [len(text.split()) for text in texts]
    counts = Counter(" ".join(text.lower().split()) for text in texts)
    repeated = sum(count for count in counts.values() if count > 1)
    return {
        "present": len(texts),
        "words (mean)": round(float(np.mean(words)), 1) if words else 0.0,
        "words (longest)": max(words, default=0),
        "different": len(counts),
        "repeated (share)": round(repeated / max(1, len(texts)), 4),
        "commonest (count)": max(counts.values(), default=0),
    }


def _label_stats(labels: tuple[str, ...], studies: list[dict]) -> dict[str, dict[str, float]]:
    """How many studies know a label, and the share of those that have it."""
    found: dict[str, dict[str, float]] = {}
    for label in labels:
        known = [meta["labels"][label] for meta in studies if label in meta["labels"]]
        share = sum(value == 1 for value in known) / max(1, len(known))
        found[label] = {"known": len(known), "positive (share)": round(share, 4)}
    return found


def _flat(values: dict, prefix: str = "") -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}: ") if isinstance(value, dict) else [(prefix + name, value)]
    return rows

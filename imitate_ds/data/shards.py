"""Study records -> tar shards + index.json. The format is written down in shards/README.md.

A build goes through a folder of notes, DIR/.building: one JSON per finished tar. A build that was killed leaves no
index, and its notes tell the next one which tars are done; with `part` several machines share one folder of notes, and
whoever finishes last writes the index. Every tar is the same bytes whoever writes it.
"""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import secrets
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from zlib import crc32

from PIL import UnidentifiedImageError
from webdataset.writer import TarWriter

from imitate_ds.data.member_table import MEMBERS, Member, table_bytes, table_of
from imitate_ds.data.progress import shown
from imitate_ds.data.shard_index import (
    BUILDING,
    FORMAT,
    INDEX,
    ShardEntry,
    ShardIndex,
    build_id,
    file_sha256,
    group_hash,
    load_index,
    load_report,
    read_samples,
    sample_key,
    write_atomic,
)
from imitate_ds.data.shard_layout import Layout, ShardTask, frontal_pairs, plan_layout
from imitate_ds.data.shard_sample import MASK, encode_sample, error_rule
from imitate_ds.data.shard_stats import shard_stats
from imitate_ds.data.shard_verify import verify_shards
from imitate_ds.data.sources.base import Source

__all__ = [
    "Member",
    "ShardEntry",
    "ShardIndex",
    "build_shards",
    "group_hash",
    "load_index",
    "load_report",
    "merge_parts",
    "read_samples",
    "sample_key",
    "shard_stats",
    "verify_shards",
]

log = logging.getLogger(__name__)

PLAN = "plan.json"
UNREADABLE = "no readable frontal radiograph"
NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # as where the image's name is blank


def build_shards(
    source: Source,
    out: Path,
    *,
    image_size: int = 256,
    workers: int = 2,
    part: tuple[int, int] = (0, 1),
    samples_per_shard: int = 512,
    progress: bool = True,
) -> dict:
    """Write a source as tar shards into out, and return the report of what was kept and dropped.

    part = (I, N) writes every N-th shard, counted from I in 0..N-1; run all parts with equal arguments into one folder.
    workers = 0 writes in this process. Where out holds the finished build of the same data, nothing is written. Raises
    ValueError for a source that cannot be split cleanly, or an out that holds something else, and OSError where the
    disk fails.
    """
    _check_arguments(image_size, workers, part, samples_per_shard)
    layout = plan_layout(source, image_size=image_size, samples_per_shard=samples_per_shard)
    if (out / INDEX).is_file():
        return _finished_report(out, layout)
    try:
        _open_notes(out, source, layout, image_size)
        return _build_part(out, layout, part, workers, progress)
    except FileNotFoundError:
        # A job that was queued again meets the other parts as they finish the build and clear the notes away.
        if (out / INDEX).is_file():
            return _finished_report(out, layout)
        raise


def _finished_report(out: Path, layout: Layout) -> dict:
    if load_index(out).fingerprint != layout.fingerprint:
        raise ValueError(f"out = {out}: holds finished shards of other data or options; choose another folder")
    return load_report(out)


def _build_part(out: Path, layout: Layout, part: tuple[int, int], workers: int, progress: bool) -> dict:
    todo = [task for task in layout.tasks[part[0] :: part[1]] if not _is_done(out, task.name)]
    for note in shown(_run(todo, out, workers), len(todo), "building shards", progress):
        for key, rule in note["unreadable"].items():
            log.warning("sample %s dropped: unreadable image: %s", key, rule)
    if all(_note(out, task.name).is_file() for task in layout.tasks) or (out / INDEX).is_file():
        return merge_parts(out)
    return _report(layout.report, [_read(_note(out, t.name)) for t in layout.tasks if _note(out, t.name).is_file()])


def merge_parts(out: Path) -> dict:
    """Write the index once every part of a build is done, and return the report of the whole.

    Raises FileNotFoundError where nothing was built, ValueError where shards are missing.
    """
    if (out / INDEX).is_file():
        return load_report(out)
    try:
        plan = _read(out / BUILDING / PLAN)
        notes = [_read(_note(out, name)) for name in plan["shards"] if _note(out, name).is_file()]
    except FileNotFoundError:
        if (out / INDEX).is_file():  # another part came first just now
            return load_report(out)
        raise FileNotFoundError(f"{out}: no unfinished build here; start one with 'imitate-ds shards build'") from None
    if len(notes) < len(plan["shards"]):
        if (out / INDEX).is_file():
            return load_report(out)
        rest = len(plan["shards"]) - len(notes)
        raise ValueError(f"{out}: {rest} of {len(plan['shards'])} shards are not built; run the parts that are missing")
    report = _report(plan["report"], notes)
    if not report["kept"]:
        shutil.rmtree(out / BUILDING, ignore_errors=True)
        raise ValueError(
            f"source {plan['header']['source']}: not one radiograph was usable: {report['dropped_images']}"
        )
    _write_index(out, plan, notes, report)
    shutil.rmtree(out / BUILDING, ignore_errors=True)  # another part may be doing the same
    return report


def _write_index(out: Path, plan: dict, notes: list[dict], report: dict) -> None:
    shards = [note["shard"] for note in notes if note["shard"]]
    tables = [table_of([Member(*member) for member in shard.pop("members")]) for shard in shards]
    members = table_bytes(tables)
    named = {kind: sorted({name for note in notes for name in note[kind]}) for kind in ("labels", "masks", "boxes")}
    entries = (ShardEntry(**shard, members=table) for shard, table in zip(shards, tables, strict=True))
    values = {"format": FORMAT, **plan["header"], "build_id": build_id(tuple(entries))}
    values |= {"fingerprint": plan["fingerprint"], **named, "shards": shards, "report": report}
    values |= {"members": {"bytes": len(members), "sha256": hashlib.sha256(members).hexdigest()}}
    write_atomic(out / MEMBERS, members)
    write_atomic(out / INDEX, json.dumps(values).encode())


def _check_arguments(image_size: int, workers: int, part: tuple[int, int], samples_per_shard: int) -> None:
    if image_size < 16 or samples_per_shard < 1 or workers < 0:
        raise ValueError(
            f"image_size = {image_size}, samples_per_shard = {samples_per_shard}, workers = {workers}: "
            "must be at least 16, 1 and 0"
        )
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part = {part[0]}/{part[1]}: must be I/N with 0 <= I < N")


def _open_notes(out: Path, source: Source, layout: Layout, image_size: int) -> None:
    """Start the notes of a build, or go on with those of the same build."""
    notes = out / BUILDING
    tars = list(out.glob("*.tar"))  # before the plan is looked for: another part may be starting right now
    if (notes / PLAN).is_file():
        if _read(notes / PLAN)["fingerprint"] != layout.fingerprint:
            raise ValueError(
                f"out = {out}: holds an unfinished build of other data or options; delete it, or finish that"
            )
        return
    if (out / INDEX).is_file():
        raise FileNotFoundError(f"{notes}: another part finished the build just now and cleared its notes away")
    if tars:
        raise ValueError(f"out = {out}: holds {len(tars)} tars without an index; choose an empty folder")
    notes.mkdir(parents=True, exist_ok=True)
    header = {"source": source.name, "synthetic": source.synthetic, "image_size": image_size}
    names = [task.name for task in layout.tasks]
    plan = {"fingerprint": layout.fingerprint, "header": header, "shards": names, "report": layout.report}
    write_atomic(notes / PLAN, json.dumps(plan).encode())


def _is_done(out: Path, name: str) -> bool:
    """True where a tar of an earlier run is whole. One that lacks a damaged image is built again: it may be mended."""
    if not _note(out, name).is_file():
        return False
    note = _read(_note(out, name))
    shard, path = note["shard"], out / name
    same = bool(shard) and not note["unreadable"] and path.is_file() and file_sha256(path) == shard["sha256"]
    if not same:
        _note(out, name).unlink()
    return same


def _run(tasks: list[ShardTask], out: Path, workers: int) -> Iterator[dict]:
    """Write the shards, in this process or in a pool, and yield the note of each as it is finished."""
    if workers == 0 or len(tasks) < 2:
        yield from (_write_shard(task, out) for task in tasks)
        return
    # spawn: the caller may hold torch threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_end_with_parent)
    try:
        futures: list[Future[dict]] = [pool.submit(_write_shard, task, out) for task in tasks]
        yield from (future.result() for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Leave with a killed parent: a worker left behind would write into the folder of the next build."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write_shard(task: ShardTask, out: Path) -> dict:
    """Write one tar, then its note: the index entry, the annotations met, the images that could not be read."""
    unreadable: dict[str, str] = {}
    metas: list[dict] = []
    masks: set[str] = set()
    checksums: list[tuple[int, int]] = []
    scratch = out / BUILDING / f"{task.name}.{secrets.token_hex(4)}"
    with scratch.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # type: ignore[arg-type]
            for study, image in frontal_pairs(task.studies):
                key = sample_key(task.source, study.study_id, image.image_id)
                try:
                    files, meta = encode_sample(study, image, task.image_size, synthetic=task.synthetic)
                except (ValueError, *NOT_THERE, UnidentifiedImageError) as error:
                    unreadable[key] = error_rule(error)
                    continue
                except OSError as error:  # of the disk, not of the image: it may be whole
                    reason = f"sample {key}: {error.strerror or 'cannot be read'}; run the build again once it can be"
                    raise OSError(error.errno or errno.EIO, reason) from None
                written = json.dumps(meta, sort_keys=True).encode()
                metas.append(meta)
                masks |= {name.removesuffix(MASK) for name in files if name.endswith(MASK)}
                checksums.append((crc32(files["jpg"]), crc32(written)))
                tar.write({"__key__": key, "json": written, **files})
        file.flush()
        os.fsync(file.fileno())
    shard = _entry(scratch, task, metas, checksums) if metas else None
    if shard:
        scratch.replace(out / task.name)
    note = {"shard": shard, "studies": len(task.studies), "unreadable": unreadable}
    note["labels"] = sorted({label for meta in metas for label in meta["labels"]})
    note["boxes"] = sorted({box["label"] for meta in metas for box in meta["extra"].get("boxes", [])})
    note["masks"] = sorted(masks)
    write_atomic(_note(out, task.name), json.dumps(note).encode())
    return note


def _entry(path: Path, task: ShardTask, metas: list[dict], checksums: list[tuple[int, int]]) -> dict:
    """The index entry of a tar just written, with its offsets as a reader finds them."""
    with tarfile.open(path) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    members: list[Member] = []
    for meta, (image_crc, meta_crc) in zip(metas, checksums, strict=True):
        key = sample_key(task.source, meta["study_id"], meta["image_id"])
        study, patient = group_hash(task.source, meta["study_id"]), group_hash(task.source, meta["patient_id"])
        members.append(Member(key, study, patient, *places[f"{key}.jpg"], image_crc, *places[f"{key}.json"], meta_crc))
    return {
        "name": task.name,
        "split": task.split,
        "samples": len(members),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "members": members,
    }


def _report(planned: dict, notes: list[dict]) -> dict:
    """The report of a build, or of as much of it as there is."""
    kept: dict[str, dict[str, int]] = {}
    dropped_images = Counter(planned["dropped_images"])
    dropped_studies = Counter(planned["dropped_studies"])
    for note in notes:
        members = note["shard"]["members"] if note["shard"] else []
        studies = len({member[1] for member in members})
        if members:
            split = kept.setdefault(note["shard"]["split"], {"studies": 0, "samples": 0})
            split["studies"] += studies
            split["samples"] += len(members)
        if note["studies"] > studies:
            dropped_studies[UNREADABLE] += note["studies"] - studies
        dropped_images.update(f"unreadable image: {rule}" for rule in note["unreadable"].values())
    return {**planned, "dropped_studies": dict(dropped_studies), "dropped_images": dict(dropped_images), "kept": kept}


def _note(out: Path, name: str) -> Path:
    return out / BUILDING / f"{name}.json"


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))

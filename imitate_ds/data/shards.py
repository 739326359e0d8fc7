"""Study records -> tar shards + index.json. The format is written down in shards/README.md.

A build goes through a folder of notes, DIR/.building: one JSON per finished tar. A build that was killed leaves no
index, and its notes tell the next one which tars are done; with `part` several machines share one folder of notes, and
whoever finishes last writes the index. Every tar is the same bytes whoever writes it.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import secrets
import shutil
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from webdataset import TarWriter

from imitate_ds.batch import is_missing
from imitate_ds.data.radiographs import decode_radiograph, prepare_radiograph
from imitate_ds.data.shard_index import (
    BUILDING,
    FORMAT,
    INDEX,
    Member,
    ShardEntry,
    ShardIndex,
    build_id,
    group_hash,
    load_index,
    load_report,
    read_member,
    read_samples,
    sample_key,
    write_atomic,
)
from imitate_ds.data.shard_layout import Layout, ShardTask, frontal, plan_layout
from imitate_ds.data.sources.base import RadiographRef, Source, Study
from imitate_ds.data.text_cache import TEXT_INDEX, load_text_cache

__all__ = [
    "Member",
    "ShardEntry",
    "ShardIndex",
    "build_shards",
    "group_hash",
    "load_index",
    "load_report",
    "merge_parts",
    "read_member",
    "read_samples",
    "sample_key",
    "verify_shards",
]

log = logging.getLogger(__name__)

JPEG_QUALITY = 95
PLAN = "plan.json"
UNREADABLE = "no readable frontal radiograph"


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
    workers = 0 writes in this process. Raises ValueError for a source that cannot be split cleanly, or an out that
    holds something else.
    """
    _check_arguments(out, image_size, workers, part, samples_per_shard)
    layout = plan_layout(source, image_size=image_size, samples_per_shard=samples_per_shard)
    _open_notes(out, source, layout, image_size)
    todo = [task for task in layout.tasks[part[0] :: part[1]] if not _is_done(out, task.name)]
    shown = _shown(_run(todo, out, workers), len(todo), progress)
    for note in shown:
        for key, rule in note["unreadable"].items():
            log.warning("sample %s dropped: unreadable image: %s", key, rule)
    if all(_note(out, task.name).is_file() for task in layout.tasks) or (out / INDEX).is_file():
        return merge_parts(out)
    return _report(layout.report, [_read(_note(out, t.name)) for t in layout.tasks if _note(out, t.name).is_file()])


def merge_parts(out: Path) -> dict:
    """Write the index once every part of a build is done, and return the report of the whole.

    Raises FileNotFoundError where nothing was built, ValueError where shards are missing.
    """
    if (out / INDEX).is_file():  # another part came first
        return load_report(out)
    if not (out / BUILDING / PLAN).is_file():
        raise FileNotFoundError(f"{out}: no unfinished build here; start one with 'imitate-ds shards build'")
    plan = _read(out / BUILDING / PLAN)
    missing = [name for name in plan["shards"] if not _note(out, name).is_file()]
    if missing:
        raise ValueError(
            f"{out}: {len(missing)} of {len(plan['shards'])} shards are not built; run the parts that are missing"
        )
    notes = [_read(_note(out, name)) for name in plan["shards"]]
    shards = [note["shard"] for note in notes if note["shard"]]
    if not shards:
        raise ValueError(f"{out}: not one radiograph could be read: {_report(plan['report'], notes)['dropped_images']}")
    report = _report(plan["report"], notes)
    entries = tuple(ShardEntry(**shard) for shard in shards)
    labels = sorted({label for note in notes for label in note["labels"]})
    values = {"format": FORMAT, **plan["header"], "build_id": build_id(entries), "labels": labels}
    values |= {"shards": shards, "report": report}
    write_atomic(out / INDEX, json.dumps(values).encode())
    shutil.rmtree(out / BUILDING, ignore_errors=True)  # another part may be doing the same
    return report


def verify_shards(root: Path) -> list[str]:
    """Read every byte of a shard folder again; one line per problem, none where all is well.

    Raises what load_index raises where there is nothing to verify.
    """
    index = load_index(root)
    problems: list[str] = []
    if index.build_id != build_id(index.shards):
        problems.append(f"{INDEX}: build_id does not belong to these shards")
    for shard in index.shards:
        problems += [f"{shard.name}: {problem}" for problem in _shard_problems(index, shard)]
    if (root / TEXT_INDEX).is_file():
        problems += [problem for shard in index.shards for problem in _text_problems(root, shard)]
    return problems


def _check_arguments(out: Path, image_size: int, workers: int, part: tuple[int, int], samples_per_shard: int) -> None:
    if (out / INDEX).exists():
        raise ValueError(f"out = {out}: holds finished shards; delete the folder, or choose another")
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
    if (notes / PLAN).is_file():
        if _read(notes / PLAN)["fingerprint"] != layout.fingerprint:
            raise ValueError(
                f"out = {out}: holds an unfinished build of other data or options; delete it, or finish that"
            )
        return
    strangers = [path.name for path in out.glob("*.tar")] if out.is_dir() else []
    if strangers:
        raise ValueError(f"out = {out}: holds {len(strangers)} tars without an index; choose an empty folder")
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
    same = bool(shard) and not note["unreadable"] and path.is_file() and _sha256(path) == shard["sha256"]
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


def _shown(notes: Iterable[dict], total: int, progress: bool) -> Iterator[dict]:
    if progress and sys.stderr.isatty():
        yield from track(notes, "building shards", total=total, console=Console(stderr=True))
        return
    for done, note in enumerate(notes, 1):
        if progress:
            print(f"building shards: {done}/{total}", file=sys.stderr, flush=True)
        yield note


def _write_shard(task: ShardTask, out: Path) -> dict:
    """Write one tar, then its note: the index entry, the labels met, the images that could not be read."""
    unreadable: dict[str, str] = {}
    metas: list[dict] = []
    scratch = out / BUILDING / f"{task.name}.{secrets.token_hex(4)}"
    with scratch.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # type: ignore[arg-type]
            for study, image in ((study, image) for study in task.studies for image in frontal(study)):
                key = sample_key(task.source, study.study_id, image.image_id)
                try:
                    files = _encode(study, image, task.image_size)
                except (ValueError, OSError) as error:
                    unreadable[key] = _rule(error)
                    continue
                meta = _meta(study, image, task.synthetic)
                metas.append(meta)
                tar.write({"__key__": key, "json": json.dumps(meta, sort_keys=True).encode(), **files})
        file.flush()
        os.fsync(file.fileno())
    shard = _entry(scratch, task, metas) if metas else None
    scratch.replace(out / task.name) if metas else scratch.unlink()
    labels = sorted({label for meta in metas for label in meta["labels"]})
    note = {"shard": shard, "labels": labels, "studies": len(task.studies), "unreadable": unreadable}
    write_atomic(_note(out, task.name), json.dumps(note).encode())
    return note


def _encode(study: Study, image: RadiographRef, size: int) -> dict[str, bytes]:
    """The picture files of one sample by their suffix. Raises ValueError or OSError where the radiograph is damaged."""
    files = {"jpg": _encoded(prepare_radiograph(image.read(), size), "JPEG", quality=JPEG_QUALITY)}
    for name, read in study.masks.items():
        files[f"{name}.mask.png"] = _encoded(_resized_mask(read(), size), "PNG")
    return files


def _encoded(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _resized_mask(mask: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def _meta(study: Study, image: RadiographRef, synthetic: bool) -> dict:
    """What is kept beside the pixels. Ids and text live here, inside the tar, and nowhere else."""
    return {
        "findings": "" if is_missing(study.findings) else study.findings,
        "impression": "" if is_missing(study.impression) else study.impression,
        "patient_id": study.patient_id,
        "study_id": study.study_id,
        "image_id": image.image_id,
        "view_position": image.view_position,
        "split": study.split,
        "labels": study.labels,
        "extra": study.extra,
        "synthetic": synthetic,
    }


def _entry(path: Path, task: ShardTask, metas: list[dict]) -> dict:
    """The index entry of a tar just written, with its offsets as a reader finds them."""
    with tarfile.open(path) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    members: list[Member] = []
    for meta in metas:
        key = sample_key(task.source, meta["study_id"], meta["image_id"])
        study, patient = group_hash(task.source, meta["study_id"]), group_hash(task.source, meta["patient_id"])
        members.append(Member(key, study, patient, *places[f"{key}.jpg"], *places[f"{key}.json"]))
    return {
        "name": task.name,
        "split": task.split,
        "samples": len(members),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "members": members,
    }


def _rule(error: Exception) -> str:
    """Why a radiograph could not be read, without the file name, which may hold a patient's id."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error).rsplit(": ", 1)[-1] if isinstance(error, ValueError) else "not an image"


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_problems(index: ShardIndex, shard: ShardEntry) -> Iterator[str]:
    path = index.root / shard.name
    if _sha256(path) != shard.sha256:
        yield "sha256 differs from the index; copy or build it again"
        return
    with tarfile.open(path) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    for member in shard.members:
        if places.get(f"{member.key}.jpg") != (member.image_offset, member.image_size):
            yield f"sample {member.key}: no radiograph where the index says"
        elif places.get(f"{member.key}.json") != (member.meta_offset, member.meta_size):
            yield f"sample {member.key}: no JSON where the index says"
        elif problem := _image_problem(read_member(path, member.image_offset, member.image_size), index.image_size):
            yield f"sample {member.key}: {problem}"
    if len(shard.members) != shard.samples:
        yield f"{len(shard.members)} members, but samples = {shard.samples}"


def _image_problem(data: bytes, size: int) -> str:
    try:
        shape = decode_radiograph(data).shape
    except (ValueError, OSError) as error:
        return f"radiograph cannot be decoded: {_rule(error)}"
    return "" if shape == (size, size) else f"radiograph is {shape}, image_size is {size}"


def _text_problems(root: Path, shard: ShardEntry) -> list[str]:
    try:
        load_text_cache(root, shard)
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]
    return []

"""The files of checkpoints: which are whole, which is the newest good one, which may go. Needs neither torch nor DeepSpeed.

    checkpoints/step-00000120/  manifest.json, shard-00000-of-00004.safetensors, ...
    checkpoints/latest          the name of the newest, for people and other tools; nothing here believes it

A folder appears by rename, when every file in it is on the disk and its manifest lists their SHA-256: there is no moment at
which a checkpoint that looks whole is not.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 2  # 1 was DeepSpeed's own files
_UNFINISHED = ".step-*.partial"


class Keep(NamedTuple):
    """Which checkpoints stay: the newest ones, those of every so-many steps, and the best by a metric."""

    last: int
    every: int = 0  # steps; 0: none
    best: int = 0
    metric: str = ""


class WrittenFile(NamedTuple):
    name: str
    bytes: int
    sha256: str


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def unfinished_folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".step-{step:08d}.partial"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """All that have been finished, the oldest first; whether they verify is another question."""
    return sorted(path for path in checkpoints.glob("step-*") if path.is_dir())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a verified checkpoint: step, world_size, state, files, ..."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    return _what_is_wrong(path, part=(0, 1))


def verify_part(path: Path, part: int, of: int) -> str | None:
    """verify_checkpoint, shared out: the manifest and every of-th file."""
    return _what_is_wrong(path, (part, of))


def _what_is_wrong(path: Path, part: tuple[int, int]) -> str | None:
    try:
        manifest = read_manifest(path)
        files, seal = manifest["files"], manifest.pop("seal")
    except FileNotFoundError:
        return "has no manifest (it was not written by this program, or not to its end)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    except OSError as error:
        return f"its manifest cannot be read ({error.strerror})"
    if seal != _seal(manifest):
        return "its manifest is damaged"
    if manifest.get("format") != FORMAT:
        return f"is of format {manifest.get('format', 1)}; this version reads format {FORMAT}"
    first, of = part
    wrong = (_wrong_file(path / name, entry) for name, entry in sorted(files.items())[first::of])
    return next(filter(None, wrong), None)


def _wrong_file(file: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        if file.stat().st_size != entry["bytes"]:
            return f"{file.name} is cut short" if file.stat().st_size < entry["bytes"] else f"{file.name} is too long"
        return None if sha256_of(file) == entry["sha256"] else f"{file.name} is damaged (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"


def begin_checkpoint(checkpoints: Path, step: int) -> Path:
    """An empty folder for the files of a checkpoint; what other saves left unfinished is removed."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for rest in checkpoints.glob(_UNFINISHED):
        shutil.rmtree(rest)
    unfinished = unfinished_folder_of(checkpoints, step)
    unfinished.mkdir()
    return unfinished


def finish_checkpoint(checkpoints: Path, step: int, record: Mapping[str, Any], files: Iterable[WrittenFile]) -> Path:
    """Seal the files of begin_checkpoint, which must be on the disk, and give the folder its name; then move `latest`."""
    unfinished, target = unfinished_folder_of(checkpoints, step), folder_of(checkpoints, step)
    listed = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files}
    whole = {"format": FORMAT, **record, "files": listed}
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({**whole, "seal": _seal(whole)}, indent=1), encoding="utf-8")
    sync(manifest)
    sync(unfinished)
    if target.exists():
        shutil.rmtree(target)  # it did not verify: a whole one of this step would have been resumed from
    unfinished.rename(target)
    sync(checkpoints)
    beside = checkpoints / f".{LATEST}"
    beside.write_text(target.name + "\n", encoding="utf-8")
    sync(beside)
    beside.replace(checkpoints / LATEST)
    return target


def discard_unfinished(checkpoints: Path) -> None:
    for rest in checkpoints.glob(_UNFINISHED):
        shutil.rmtree(rest, ignore_errors=True)


def prune(checkpoints: Path, keep: Keep, newest: int) -> None:
    """Remove what `keep` does not ask for, of the steps up to `newest`: later ones are of a run that went another way."""
    steps = {
        path: _state_of(path) for path in checkpoint_folders(checkpoints) if path <= folder_of(checkpoints, newest)
    }
    for path in steps.keys() - kept(steps, keep):
        shutil.rmtree(path)


def kept(steps: Mapping[Path, Mapping[str, Any]], keep: Keep) -> set[Path]:
    """Which of the checkpoints stay; each is given with the state that was saved with it."""
    ordered = sorted(steps)
    stay = set(ordered[-keep.last :])
    if keep.every:
        stay |= {path for path in ordered if steps[path].get("step", 1) % keep.every == 0}
    return stay | set(_best_first(steps, keep.metric)[: keep.best])


def by_score(checkpoints: Path, metric: str) -> list[Path]:
    """Those that were validated, the best first, of equally good ones the oldest; whether they verify is another question."""
    return _best_first({path: _state_of(path) for path in checkpoint_folders(checkpoints)}, metric)


def _best_first(steps: Mapping[Path, Mapping[str, Any]], metric: str) -> list[Path]:
    scores = {path: steps[path].get("metrics", {}).get(metric) for path in sorted(steps)}
    return sorted((path for path in scores if scores[path] is not None), key=lambda path: scores[path], reverse=True)


def write_synced(path: Path, data: bytes) -> WrittenFile:
    """Write a file to the disk, and say what lies there."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, len(data), hashlib.sha256(data).hexdigest())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state_of(path: Path) -> Mapping[str, Any]:
    try:
        return read_manifest(path)["state"]
    except (OSError, ValueError, KeyError):
        return {}


def _seal(record: Mapping[str, Any]) -> str:
    """SHA-256 of what the manifest says, for a flipped bit in the manifest itself."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

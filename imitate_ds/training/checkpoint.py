"""Checkpoints that can be trusted: one folder per step, believed only when its manifest is there and agrees.

DeepSpeed writes `latest` before the other ranks have finished, so a run killed in mid-save points at a torn checkpoint,
and a flipped bit loads in silence. Here rank 0 writes a manifest with the SHA-256 of every file after all ranks are done,
by rename; there is no `latest`: the newest folder whose manifest verifies is the one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imitate_ds.distributed import barrier, broadcast_object, world
from imitate_ds.training.engine import loss_scale_state, restore_loss_scale

MANIFEST = "manifest.json"


def save_checkpoint(engine: Any, folder: Path, step: int, state: dict[str, Any], *, keep_last: int) -> Path:
    """Save model, optimizer shards and `state` (JSON values) as folder/step-<step>; a collective.

    Then prune to the newest keep_last.
    """
    tag = f"step-{step:08d}"
    target = folder / tag
    if world().is_main and target.exists():
        shutil.rmtree(target)  # a torn one: a whole one of this step would have been resumed from
    barrier()
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
    barrier()
    if world().is_main:
        record = {"step": step, "world_size": world().size, "state": state, "loss_scale": loss_scale_state(engine)}
        _write_manifest(target, record)
        for old in [path for path in _tags(folder) if path.name <= tag][:-keep_last]:
            shutil.rmtree(old)  # never counts a torn folder of a later step as one of the kept
    barrier()
    return target


def find_checkpoint(folder: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; says which ones it passed over, and why.

    None where there is none at all. Raises ValueError where there are some and none verifies: to begin again is for
    the user to say.
    """
    found: Path | None = None
    problem: str | None = None
    if world().is_main:
        candidates = _tags(folder)[::-1]
        for candidate in candidates:
            wrong = verify_checkpoint(candidate)
            if wrong is None:
                found = candidate
                break
            log(f"checkpoint {candidate.name}: {wrong}; trying the one before")
        if candidates and found is None:
            problem = (
                f"train.resume = True: none of the checkpoints in {folder} verifies; to begin again, delete that folder"
            )
    found, problem = broadcast_object((found, problem))
    if problem:
        raise ValueError(problem)
    return found


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that a verified checkpoint was saved with."""
    return json.loads((path / MANIFEST).read_text())["state"]


def load_checkpoint(engine: Any, path: Path) -> dict[str, Any]:
    """Restore the engine from a verified checkpoint of as many ranks; returns the state saved with it."""
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["world_size"] != world().size:
        raise ValueError(
            f"train.resume = True: {path.name} was written by {manifest['world_size']} ranks, this run has "
            f"{world().size}; launch with {manifest['world_size']} ranks"
        )
    loaded, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None or client_state["step"] != manifest["step"]:
        raise RuntimeError(f"{path}: DeepSpeed could not load this checkpoint")
    restore_loss_scale(engine, manifest["loss_scale"])
    return manifest["state"]


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, seal = manifest["files"], manifest.pop("seal")
    except FileNotFoundError:
        return "has no manifest (the save was interrupted)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    if seal != _seal(manifest):
        return "its manifest is damaged"
    for name, digest in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != digest:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def _tags(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def _write_manifest(target: Path, record: dict[str, Any]) -> None:
    files = sorted(p for p in target.rglob("*") if p.is_file())
    record = {**record, "files": {str(p.relative_to(target)): _sha256(p) for p in files}}
    for file in files:
        _sync(file)
    unfinished = target / (MANIFEST + ".tmp")
    unfinished.write_text(json.dumps({**record, "seal": _seal(record)}, indent=1))
    _sync(unfinished)
    unfinished.rename(target / MANIFEST)
    _sync(target)


def _seal(record: dict[str, Any]) -> str:
    """SHA-256 of what the manifest says, for a flipped bit in the manifest itself."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints that can be trusted: one folder per step, believed only when its manifest is there and agrees.

DeepSpeed writes `latest` before the other ranks have finished, so a run killed in mid-save points at a torn checkpoint,
and a flipped bit loads in silence. Here rank 0 writes a manifest with the SHA-256 of every file after all ranks are done,
by rename; there is no `latest`: the newest folder whose manifest verifies is the one.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from imitate_ds.distributed import barrier, broadcast_object, world

MANIFEST = "manifest.json"


def save_checkpoint(engine: Any, folder: Path, step: int, state: dict[str, Any], *, keep_last: int) -> Path:
    """Save model, optimizer shards and `state` as folder/step-<step>; a collective. Then prune to the newest keep_last."""
    tag = f"step-{step:08d}"
    target = folder / tag
    if world().is_main and target.exists():
        shutil.rmtree(target)  # a torn one: a whole one of this step would have been resumed from
    barrier()
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    barrier()
    if world().is_main:
        _write_manifest(target, {"step": step, "world_size": world().size, "state": state})
        for old in [path for path in _tags(folder) if path.name <= tag][:-keep_last]:
            shutil.rmtree(old)  # never counts a torn folder of a later step as one of the kept
    barrier()
    return target


def find_checkpoint(folder: Path, log: Any = print) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; says which ones it passed over, and why."""
    found: Path | None = None
    if world().is_main:
        for candidate in reversed(_tags(folder)):
            problem = verify_checkpoint(candidate)
            if problem is None:
                found = candidate
                break
            log(f"checkpoint {candidate.name}: {problem}; trying the one before")
    return broadcast_object(found)  # type: ignore[return-value]


def load_checkpoint(engine: Any, path: Path) -> dict[str, Any]:
    """Restore the engine from a verified checkpoint; returns the state saved with it.

    Raises ValueError when the checkpoint was written by another number of ranks.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["world_size"] != world().size:
        raise ValueError(
            f"train.resume = True: {path.name} was written by {manifest['world_size']} ranks, this run has "
            f"{world().size}; launch with {manifest['world_size']} ranks"
        )
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise RuntimeError(f"{path}: DeepSpeed could not load this checkpoint")
    return manifest["state"]


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return "has no manifest (the save was interrupted)"
    except json.JSONDecodeError:
        return "its manifest is damaged"
    for name, digest in manifest["files"].items():
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
    partial = target / (MANIFEST + ".tmp")
    partial.write_text(json.dumps(record, indent=1))
    _sync(partial)
    partial.rename(target / MANIFEST)
    _sync(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

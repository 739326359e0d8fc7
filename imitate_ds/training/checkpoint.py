"""Checkpoints that can be trusted: written by all ranks, believed only when every file agrees with the manifest.

A save copies the engine's state, each rank writes its own pieces to the disk, and rank 0 seals and names the folder when all
are done. The copy is all that training waits for where the rest is done in the background. What cannot be written (no space
left, a quota, a read-only or vanished folder) is one OSError on all ranks, and the checkpoint before stays as it is.
"""

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from imitate_ds.distributed import from_main, gather_objects, max_over_ranks, world
from imitate_ds.training.checkpoint_files import (
    Keep,
    WrittenFile,
    begin_checkpoint,
    by_score,
    checkpoint_folders,
    discard_unfinished,
    finish_checkpoint,
    prune,
    read_manifest,
    unfinished_folder_of,
    verify_part,
)
from imitate_ds.training.engine import loss_scale_state, restore_loss_scale
from imitate_ds.training.engine_state import optimizer_steps, restore, snapshot
from imitate_ds.training.tensor_files import TensorFiles, write_tensors


class _Pending(NamedTuple):
    """A save whose files are being written."""

    step: int
    record: dict[str, Any]
    written: Future[WrittenFile]


class Checkpoints:
    """The checkpoints of one run. Every method is a collective."""

    def __init__(self, folder: Path, keep: Keep, *, in_background: bool = False):
        self.folder, self.keep, self.in_background = folder, keep, in_background
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Save the engine and `state` (JSON values); in the background, finish() or poll() must be called later.

        Raises OSError on all ranks where one of them could not write.
        """
        self.finish()
        from_main(lambda: self._told(step, lambda: begin_checkpoint(self.folder, step)))
        record = {
            "step": step,
            "world_size": world().size,
            "zero_stage": engine.zero_optimization_stage(),
            "optimizer": type(engine.basic_optimizer).__name__,
            "optimizer_steps": optimizer_steps(engine),
            "commit": _commit(),
            "state": state,
            "loss_scale": loss_scale_state(engine),
        }
        self._pending = _Pending(step, record, self._writer.submit(self._write, step, snapshot(engine)))
        if not self.in_background:
            self.finish()

    def poll(self) -> None:
        """Finish a save in the background if every rank has written its part."""
        if self._pending and not max_over_ranks(float(not self._pending.written.done())):
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background, if there is one."""
        if self._pending is None:
            return
        step, record, written = self._pending
        self._pending = None
        failure = written.exception()
        if failure and not isinstance(failure, OSError):
            raise failure
        answers = gather_objects(str(failure) if failure else written.result())
        problems = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if isinstance(answer, str)]
        from_main(lambda: self._seal(step, record, answers, problems))

    def _write(self, step: int, tensors: dict[str, Tensor]) -> WrittenFile:
        here = world()
        name = f"shard-{here.rank:05d}-of-{here.size:05d}.safetensors"
        return write_tensors(unfinished_folder_of(self.folder, step) / name, tensors)

    def _seal(self, step: int, record: dict[str, Any], files: list[WrittenFile], problems: list[str]) -> None:
        if problems:
            discard_unfinished(self.folder)
            raise OSError(self._failed(step, "; ".join(problems)))
        self._told(step, lambda: finish_checkpoint(self.folder, step, record, files))
        self._told(step, lambda: prune(self.folder, self.keep, step))

    def _told(self, step: int, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            raise OSError(self._failed(step, str(error))) from error

    def _failed(self, step: int, reason: str) -> str:
        whole = checkpoint_folders(self.folder) if self.folder.is_dir() else []
        before = f"{whole[-1].name} is as it was" if whole else "there is none before it"
        return (
            f"{self.folder}: the checkpoint of step {step} could not be written ({reason}); {before}. Make room, or make the "
            "folder writable again, and go on with --set train.resume=true"
        )


def find_checkpoint(folder: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; says which ones it passed over, and why.

    A collective: the ranks share out the files. None where there is none at all. Raises ValueError where there are some and
    none verifies: to begin again is for the user to say.
    """
    candidates = from_main(lambda: checkpoint_folders(folder))[::-1]
    found = _first_that_verifies(candidates, log)
    if candidates and found is None:
        raise ValueError(
            f"train.resume = True: none of the checkpoints in {folder} verifies; to begin again, delete that folder"
        )
    return found


def find_best_checkpoint(folder: Path, metric: str, log: Callable[[str], None] = print) -> Path | None:
    """The one that verifies and validated best, the same on all ranks; None where none was validated. A collective."""
    return _first_that_verifies(from_main(lambda: by_score(folder, metric)), log)


def _first_that_verifies(candidates: list[Path], log: Callable[[str], None]) -> Path | None:
    here = world()
    for candidate in candidates:
        wrong = next(filter(None, gather_objects(verify_part(candidate, here.rank, here.size))), None)
        if wrong is None:
            return candidate
        if here.is_main:
            log(f"checkpoint {candidate.name}: {wrong}; trying the one before")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that a verified checkpoint was saved with."""
    return read_manifest(path)["state"]


def load_checkpoint(engine: Any, path: Path) -> dict[str, Any]:
    """Restore the engine from a verified checkpoint, of any number of ranks and any ZeRO stage; returns its state.

    A collective. Raises ValueError where it is of another model.
    """
    manifest = read_manifest(path)
    try:
        with TensorFiles([path / name for name in sorted(manifest["files"])]) as stored:
            restore(engine, stored, step=manifest["optimizer_steps"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    restore_loss_scale(engine, manifest["loss_scale"])
    engine.global_steps = manifest["step"]
    engine.skipped_steps = manifest["step"] - manifest["optimizer_steps"]
    return manifest["state"]


def _commit() -> str:
    """Of this program, where it runs from a git checkout; else ''."""
    if not (git := shutil.which("git")):
        return ""
    here = Path(__file__).parent
    found = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip()

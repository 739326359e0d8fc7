"""Checks of the folders of a run: how fast shards are read, and whether the run folder keeps what it is given."""

import fcntl
import os
import random
import stat
import tempfile
import time
from pathlib import Path

from imitate_ds.diagnosis.finding import Finding, Options, absent, broken, gib, ok, slow
from imitate_ds.diagnosis.machine import file_system

# An estimate from published training rates: a ResNet-50 in bf16 takes 2,500 images/s on an A100, and a study is two views.
GPU_STUDIES_S = 1250
RADIOGRAPH = 20 * 1024  # bytes of a stored JPEG of 256 pixels
WORKERS = 2  # data.workers, unless set
LOOK_S = 2.0  # each measurement takes so long, or less
PART = 4 * 2**20
SLOW_WRITE = 50e6  # bytes/s: the 300 MB of a ResNet-50 with its AdamW then take 6 s
NO_SHARDS = absent("not looked at", "--shards DIR")
NO_RUN_DIR = absent("not looked at", "--run-dir DIR")


def sequential_read(options: Options) -> Finding:
    """How fast the largest tar is read from its start; what this machine had cached of it is dropped first."""
    if options.shards is None:
        return NO_SHARDS
    largest = max(_tars(options.shards), key=lambda path: path.stat().st_size)
    descriptor = _open_uncached(largest)
    try:
        rate = _rate(lambda done: len(os.pread(descriptor, PART, done)), at_most=2**30)
    finally:
        os.close(descriptor)
    eaten, gpus = GPU_STUDIES_S * RADIOGRAPH, _gpus_here()
    text = f"{rate / 1e6:,.0f} MB/s, {file_system(options.shards)}; a GPU eats {eaten / 1e6:.0f}"
    if rate < eaten * gpus:
        return slow(text, f"less than {gpus} GPU(s) eat: copy the shards to a disk of the machine")
    return ok(text)


def random_read(options: Options) -> Finding:
    """How many members one reader gets a second at random places, as the loader reads them."""
    if options.shards is None:
        return NO_SHARDS
    tars = [path for path in _tars(options.shards) if path.stat().st_size > RADIOGRAPH][:64]
    if not tars:
        return absent("no tar is large enough to tell")
    draw = random.Random(0)  # the same places every time
    opened = [(_open_uncached(path), path.stat().st_size) for path in tars]
    try:
        rate = _rate(lambda _: _read_somewhere(*draw.choice(opened), draw), at_most=4000 * RADIOGRAPH) / RADIOGRAPH
    finally:
        for descriptor, _ in opened:
            os.close(descriptor)
    text = f"{rate:,.0f} radiographs of 20 KB/s by one reader; a GPU eats {GPU_STUDIES_S:,} studies/s"
    if rate * WORKERS < GPU_STUDIES_S:
        return slow(text, f"data.workers: {-(-GPU_STUDIES_S // max(1, round(rate)))} or more, or a disk of the machine")
    return ok(text)


def run_dir_write(options: Options) -> Finding:
    """How fast a checkpoint's bytes reach the disk: written and synced, in a file that is gone whatever happens."""
    if options.run_dir is None:
        return NO_RUN_DIR
    part, folder = os.urandom(PART), _nearest(options.run_dir)
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor, began = file.fileno(), time.perf_counter()
        while (written := os.fstat(descriptor).st_size) < 256 * 2**20 and time.perf_counter() - began < LOOK_S:
            os.write(descriptor, part)
        os.fsync(descriptor)
        rate = written / (time.perf_counter() - began)
    text = f"{rate / 1e6:,.0f} MB/s with fsync, {file_system(folder)}"
    if rate < SLOW_WRITE:
        return slow(
            text,
            "a checkpoint keeps all ranks waiting: output_dir on a faster file system, or a larger train.save_every",
        )
    return ok(text)


def run_dir_rename_and_lock(options: Options) -> Finding:
    """Checkpoints appear by rename, and locks must lock: some network file systems grant every flock."""
    if options.run_dir is None:
        return NO_RUN_DIR
    with tempfile.TemporaryDirectory(dir=_nearest(options.run_dir), prefix=".doctor-") as name:
        folder = Path(name)
        _rename_over(folder)
        if not _locks(folder / "lock"):
            return broken(
                "flock grants the same lock twice", "mount it with flock (Lustre: -o flock), or use another file system"
            )
    return ok("rename replaces, flock locks (within this machine)")


def run_dir_room(options: Options) -> Finding:
    if options.run_dir is None:
        return NO_RUN_DIR
    room = os.statvfs(_nearest(options.run_dir))
    free = room.f_bavail * room.f_frsize
    text = f"{gib(free)} free" + (f", {room.f_favail:,} files" if room.f_files else "")
    if free < 2 * 2**30 or (room.f_files and room.f_favail < 1000):
        return broken(text, "a checkpoint may not fit: make room, or set output_dir elsewhere")
    if free < 20 * 2**30:
        return slow(text, "enough for small models: mind train.keep_last")
    return ok(text)


def run_dir_access(options: Options) -> Finding:
    """A run folder holds pictures of radiographs, and checkpoints that will be trusted."""
    if options.run_dir is None:
        return NO_RUN_DIR
    folder, umask = _nearest(options.run_dir), _umask()
    mode = folder.stat().st_mode
    text = f"{stat.filemode(mode)}, umask {umask:03o}" + (
        "" if folder == options.run_dir else f" (of {folder}: it is not there yet)"
    )
    if not os.access(folder, os.W_OK | os.X_OK):
        return broken(text, f"not writable for {os.geteuid()}: chown it, or set output_dir elsewhere")
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return broken(text, "anybody may replace a checkpoint in it: chmod o-w")
    if mode & stat.S_IROTH and folder == options.run_dir:
        return ok(
            text, "anybody here may look at the radiographs in its TensorBoard: chmod o-rx, where they are patients'"
        )
    return ok(text)


def _tars(folder: Path) -> list[Path]:
    """Raises FileNotFoundError for what is no shard folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; build one with 'imitate-ds shards build'")
    tars = sorted(folder.glob("*.tar"))
    if not tars or not (folder / "index.json").is_file():
        raise FileNotFoundError(f"{folder}: no tars with an index.json; build them with 'imitate-ds shards build'")
    return tars


def _open_uncached(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor


def _rate(read, *, at_most: int) -> float:
    """Bytes a second of read(bytes so far) -> bytes, called until it gives none, `at_most` bytes came or the time is over."""
    done, began = 0, time.perf_counter()
    while done < at_most and time.perf_counter() - began < LOOK_S:
        got = read(done)
        if not got:
            break
        done += got
    return done / max(1e-9, time.perf_counter() - began)


def _read_somewhere(descriptor: int, size: int, draw: random.Random) -> int:
    return len(os.pread(descriptor, RADIOGRAPH, draw.randrange(size - RADIOGRAPH)))


def _rename_over(folder: Path) -> None:
    """As a checkpoint and its manifest appear. Raises OSError where one of the steps does not work."""
    before, after = folder / "before", folder / "after"
    after.write_text("old")
    before.write_text("new")
    before.replace(after)
    if after.read_text() != "new" or before.exists():
        raise OSError(f"{folder.parent}: rename did not replace a file")
    (folder / ".partial").mkdir()
    (folder / ".partial").rename(folder / "whole")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locks(path: Path) -> bool:
    """Whether a lock that is held is refused to somebody else. Raises OSError where flock is not supported."""
    with path.open("w") as first, path.open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: the doctor leaves nothing behind."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _gpus_here() -> int:
    """By their device files: to ask torch would take seconds."""
    return max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))

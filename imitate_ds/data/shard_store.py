"""Where the bytes of a shard folder come from: a local folder, or a URL whose files are fetched into a bounded cache.

A file appears in the cache whole and with the checksum its index names, or not at all. All processes of a machine share
the cache; one of them downloads a file while the others wait for it. Downloads go through fsspec, which reads http(s), s3
and what else it has a package for; a broken one goes on where it broke off.
"""

import hashlib
import json
import logging
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

from imitate_ds.data.file_locks import release_lock, take_lock
from imitate_ds.data.shard_transport import BLOCK, Fault, open_file_system, remote_bytes, require_protocol
from imitate_ds.data.shard_urls import cache_folder_name, is_remote, join_url, lower_scheme, without_credentials

log = logging.getLogger(__name__)

CACHE_VARIABLE = "IMITATE_DS_CACHE"
DEFAULT_CACHE = "~/.cache/imitate_ds"
FETCHING = ".fetching"  # folder of locks and unfinished downloads, inside the cached folder
UNSIZED_BYTES = 64 * 2**20  # most of a file whose size nobody named: index.json, text.json
FIRST_WAIT_S = 0.5  # doubled after every failure
LONGEST_WAIT_S = 30.0
KEEP_S = 60.0  # whoever was handed a path has this long to open it
PREFETCH_THREADS = 4
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
LONGEST_NAME = 200
CREDENTIALS = (
    "check the credentials: for s3 those of the AWS tools (FSSPEC_S3_ANON=true where none are needed), for http "
    "~/.netrc"
)

# Not the generator that programs seed: waiting must not change their draws, and forked processes must not wait alike.
_jitter = random.SystemRandom()


class File(NamedTuple):
    """One file of a shard folder, as an index names it."""

    name: str  # "train-000000.tar", "index.json", "text_encoder/model.safetensors"
    bytes: int | None = None  # None: not known before
    sha256: str | None = None


class UnreachableError(OSError):
    """A server that could not be reached, or that broke off, in every attempt."""


class _Note(NamedTuple):
    """What a lock file says of its file. Times are those of time.time()."""

    sha256: str = ""  # of what lies in the cache
    asked: float = 0.0  # when that was asked for
    failed: float = 0.0  # when a download last failed after all attempts, and why
    reason: str = ""


class _Queue:
    """What one process holds of a store: its connections, and the files its background threads have still to fetch."""

    def __init__(self, file_system: Any):
        self.file_system = file_system
        self.lock = threading.Lock()
        self.waiting: deque[File] = deque()
        self.names: set[str] = set()  # waiting or under way
        self.threads = 0
        self.warned = False  # that the cache is too small


@dataclass(frozen=True)
class ShardStore:
    """A shard folder, local or remote. `root` is the local folder where its files lie, or are cached."""

    location: str  # without credentials: fit for messages
    root: Path
    remote: bool = False
    max_bytes: int = 0
    attempts: int = 1
    timeout_s: float = 0.0
    url: str = field(default="", repr=False)

    def fetch(self, file: File, *, fresh: bool = False) -> Path:
        """Where a file of this folder lies on this machine; a remote one is downloaded unless it is there.

        fresh: ask the server even so, and take the copy that is there only where the server cannot be reached.
        Raises ValueError for a name that leads out of the folder and for a file larger than the cache, FileNotFoundError
        and PermissionError as the server says, and OSError after the last attempt. What lies in a local folder, the
        caller checks.
        """
        path = self.root / _checked_name(file.name)
        if not self.remote:
            return path
        self._check_size(file)
        began = time.time()
        with self._locked(file.name) as lock:
            note = _read_note(lock)
            if downloaded := not _is_here(path, file, note) or (fresh and note.asked < began):
                if note.failed > began:  # while this process waited for the one that tried
                    self._fall_back(UnreachableError(note.reason), path if fresh else None)
                else:
                    self._replace(path, file, lock, note, fresh)
            os.utime(path)
        if downloaded:
            self._make_room()
        return path

    def prefetch(self, files: Iterable[File]) -> None:
        """Fetch files in the background, but those that are there or under way. Failures show when fetch is called."""
        if not self.remote:
            return
        missing = [file for file in files if not self._may_be_here(file)]
        queue = self._queue()
        with queue.lock:
            new = {file.name: file for file in missing if file.name not in queue.names}
            queue.names.update(new)
            queue.waiting.extend(new.values())
            starting = min(PREFETCH_THREADS - queue.threads, len(queue.waiting))
            queue.threads += max(starting, 0)
        for _ in range(starting):
            # Not an executor: the interpreter would wait for its threads at exit, however long a server stalls.
            threading.Thread(target=self._work, args=(queue,), name="shard-prefetch", daemon=True).start()

    def close(self) -> None:
        """Forget what is still to be prefetched, and the connections. What is under way comes to its end."""
        if queue := _queues.pop(self, None):
            with queue.lock:
                queue.waiting.clear()

    def _work(self, queue: _Queue) -> None:
        while file := _next_file(queue):
            try:
                self.fetch(file)
            except (OSError, ValueError) as error:
                log.info("prefetch: %s", error)
            finally:
                with queue.lock:
                    queue.names.discard(file.name)

    def _queue(self) -> _Queue:
        """This process's own: neither connections nor threads outlive a fork."""
        if self not in _queues:
            _queues.setdefault(self, _Queue(open_file_system(self.url, self.timeout_s)))
        return _queues[self]

    def _may_be_here(self, file: File) -> bool:
        """By size alone, or not worth a thread because fetch will refuse it."""
        try:
            return (self.root / _checked_name(file.name)).stat().st_size == file.bytes
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True

    def _check_size(self, file: File) -> None:
        """An index may come from a stranger, and what it says of a file too."""
        if file.bytes is not None and (type(file.bytes) is not int or file.bytes < 0):
            raise ValueError(f"{self.location}: {file.name} is said to have {file.bytes!r} bytes; copy the index again")
        if file.bytes is not None and file.bytes > self.max_bytes:
            raise ValueError(
                f"data.cache_gib = {self.max_bytes / 2**30:g}: {file.name} alone has {file.bytes / 2**30:.3g} GiB; raise it"
            )

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """The lock file of a file, held: by one thread of one process at a time."""
        lock = take_lock(self._side_path(name, "lock"), wait=True)
        assert lock is not None
        try:
            yield lock
        finally:
            release_lock(lock)

    def _side_path(self, name: str, suffix: str) -> Path:
        return self.root / FETCHING / f"{name.replace('/', '+')}.{suffix}"  # '+' is in no name

    def _replace(self, path: Path, file: File, lock: int, note: _Note, fresh: bool) -> None:
        """Download a file and put it in its place. The lock is held."""
        part, asked = self._side_path(file.name, "part"), time.time()
        try:
            with open(part, "wb", buffering=0, opener=_private) as out:  # empties what a killed process left
                sha256 = self._download(file, out)
                os.fsync(out.fileno())
            _write_note(lock, _Note())  # a kill between here and the next note costs one more download
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.replace(path)
            _write_note(lock, _Note(sha256, asked))
        except UnreachableError as error:
            _write_note(lock, note._replace(failed=time.time(), reason=str(error)))
            self._fall_back(error, path if fresh else None)
        finally:
            part.unlink(missing_ok=True)

    def _fall_back(self, error: UnreachableError, copy: Path | None) -> None:
        if copy is None or not copy.is_file():
            raise error
        log.warning("%s; going on with the copy of an earlier run", error)

    def _download(self, file: File, out: RawIOBase) -> str:
        """The whole file into `out`; its SHA-256. Attempts begin anew whenever a block more than ever has arrived."""
        failures, most, digest = 0, 0, hashlib.sha256()
        while True:
            try:
                self._receive(file, out, digest)
                return digest.hexdigest()
            except Fault as error:
                fault = error
            if out.tell() >= most + BLOCK:
                failures, most = 0, out.tell()
            if fault.restart or file.sha256 is None:  # without a checksum, two halves may be of two versions
                out.seek(0)
                out.truncate()
                digest = hashlib.sha256()
            failures += 1
            if fault.fatal or failures >= self.attempts:
                break
            time.sleep(_wait_s(failures))
        raise self._error(file, fault)  # here, and not above: a chained error would show the URL with its credentials

    def _receive(self, file: File, out: RawIOBase, digest: Any) -> None:
        """One attempt: what is missing from `out`. Raises Fault, or OSError where it cannot be written."""
        limit = UNSIZED_BYTES if file.bytes is None else file.bytes
        for chunk in self._bytes_of(file, out.tell(), limit) if out.tell() < limit else ():
            if out.tell() + len(chunk) > limit:
                raise Fault(f"more than {limit:,} bytes came", restart=True)
            self._write(out, chunk)
            digest.update(chunk)
        if file.bytes is not None and out.tell() < file.bytes:
            raise Fault(f"only {out.tell():,} of {file.bytes:,} bytes came", cut=True)
        if file.sha256 is not None and digest.hexdigest() != file.sha256:
            raise Fault("the checksum differs from the index", restart=True)

    def _write(self, out: RawIOBase, chunk: bytes) -> None:
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[out.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.root}: {error.strerror}; the cache may take data.cache_gib = {self.max_bytes / 2**30:g}: lower it, "
                "or move it with data.cache_dir",
            ) from None

    def _bytes_of(self, file: File, start: int, limit: int) -> Iterator[bytes]:
        url, sized = join_url(self.url, file.name), file.bytes is not None
        return remote_bytes(self._queue().file_system, url, start, limit, sized=sized, timeout_s=self.timeout_s)

    def _error(self, file: File, fault: Fault) -> OSError:
        where = f"{self.location}: {file.name}"
        if fault.fatal is FileNotFoundError:
            return FileNotFoundError(
                f"{where}: not there; check data.shards, and that the folder was copied whole and embedded"
            )
        if fault.fatal is PermissionError:
            return PermissionError(f"{where}: refused ({fault.reason}); {CREDENTIALS}")
        if fault.fatal:
            return OSError(f"{where}: {fault.reason}; check data.shards")
        tried = f"{where}: {fault.reason}, the last of {self.attempts} attempts"
        if fault.cut:
            return UnreachableError(f"{tried}; check the network and the server, then run again")
        return OSError(
            f"{tried}; if the folder was built or embedded again, start this run again; if not, run 'imitate-ds shards "
            "verify' where it lies"
        )

    def _make_room(self) -> None:
        """Remove tars and embeddings, the longest unused first, until the folder is within max_bytes."""
        sizes = {path: info for path in self.root.rglob("*") if (info := _regular(path))}
        total = sum(info.st_size for info in sizes.values())
        shards = [path for path in self.root.iterdir() if path.name.endswith((".tar", ".text.safetensors"))]
        for path in sorted(set(shards) & set(sizes), key=lambda path: sizes[path].st_mtime):
            if total <= self.max_bytes:
                return
            if self._remove_unused(path):
                total -= sizes[path].st_size
        if total > self.max_bytes and not self._queue().warned:
            self._queue().warned = True
            log.warning(
                "data.cache_gib = %.3g: the shards in use have %.3g GiB; raise it, or they are fetched again and again",
                self.max_bytes / 2**30,
                total / 2**30,
            )

    def _remove_unused(self, path: Path) -> bool:
        """Whether the file is gone now. Readers that hold it open keep it."""
        lock = take_lock(self._side_path(path.name, "lock"), wait=False)
        if lock is None:
            return False  # somebody is just fetching it
        try:
            info = _regular(path)
            if info and time.time() - info.st_mtime <= KEEP_S:
                return False
            _write_note(lock, _Note())
            path.unlink(missing_ok=True)  # another process may be making room too
            return True
        finally:
            release_lock(lock)


def open_store(
    location: str | Path,
    *,
    cache: Path | None = None,
    max_bytes: int = 100 * 2**30,
    attempts: int = 6,
    timeout_s: float = 60.0,
) -> ShardStore:
    """The shard folder at a path, or at a URL whose files are kept in a folder of their own inside `cache`.

    cache: $IMITATE_DS_CACHE, or ~/.cache/imitate_ds, unless given. max_bytes: of the cached folder. timeout_s: without a byte.
    Raises ValueError for a URL that cannot be read, ModuleNotFoundError where a package for its protocol is missing.
    """
    location = str(location)
    if not is_remote(location):
        return ShardStore(location, Path(location))
    location = lower_scheme(location)
    shown = without_credentials(location)
    # Here and not when the first file is asked for: a process must not be forked while its threads import.
    require_protocol(location)
    cache = cache or Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()
    root = cache.absolute() / cache_folder_name(shown)
    _make_private(root)
    return ShardStore(shown, root, True, max_bytes, attempts, timeout_s, location)


# Of this process, for fork does not copy threads. Two stores of the same values share one.
_queues: dict[ShardStore, _Queue] = {}
_inherited: list[dict[ShardStore, _Queue]] = []


def _after_fork() -> None:
    """In a forked child: let go of what belongs to the parent without touching it.

    The parent's connections are kept for ever, unused: closing them here would take them out of the parent's epoll,
    which a fork shares, and the parent would wait for them in vain.
    """
    _inherited.append(dict(_queues))
    _queues.clear()


os.register_at_fork(after_in_child=_after_fork)


def _checked_name(name: object) -> str:
    """Raises ValueError for a name that could lead out of its folder."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        raise ValueError(
            f"a file of the shards is called {name!r:.250}; a name is parts of letters, digits, '.', '_' and '-' that begin "
            f"with a letter or a digit, with '/' between them, {LONGEST_NAME} characters at most"
        )
    return name


def _make_private(root: Path) -> None:
    """A folder for patient data: its user's only."""
    root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (root, root / FETCHING):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            try:
                folder.chmod(0o700)
            except PermissionError:
                raise PermissionError(
                    f"{folder}: belongs to another user, who could change what is read; set data.cache_dir"
                ) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _regular(path: Path) -> os.stat_result | None:
    """What the system knows of a file, unless it is a folder or gone."""
    try:
        return path.stat() if path.is_file() else None
    except FileNotFoundError:
        return None


def _read_note(lock: int) -> _Note:
    try:
        return _Note(**json.loads(os.pread(lock, 2**16, 0)))
    except (ValueError, TypeError):  # empty, or cut off by a crash
        return _Note()


def _write_note(lock: int, note: _Note) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(note._asdict()).encode(), 0)


def _is_here(path: Path, file: File, note: _Note) -> bool:
    """Whether the file lies in the cache: by size, and by the checksum it had when it came."""
    info = _regular(path)
    if info is None or (file.bytes is not None and info.st_size != file.bytes):
        return False
    return file.sha256 is None or note.sha256 == file.sha256


def _next_file(queue: _Queue) -> File | None:
    with queue.lock:
        if queue.waiting:
            return queue.waiting.popleft()
        queue.threads -= 1
        return None


def _wait_s(failures: int) -> float:
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1)) * _jitter.uniform(0.5, 1)

"""Locks on files, between the threads and processes of a machine. A process that dies, or is forked, leaves none behind."""

import fcntl
import os
from pathlib import Path

_held: set[int] = set()


def take_lock(path: Path, *, wait: bool) -> int | None:
    """The descriptor of a lock file, locked; None if somebody else has it and wait is False.

    flock and not lockf, which would not hold one thread of a process back from another.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _held.add(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        _forget(lock)
        return None
    except OSError as error:
        _forget(lock)
        raise OSError(
            error.errno,
            f"{path.parent}: cannot lock files there ({error.strerror}); set data.cache_dir to a local disk",
        ) from None
    return lock


def release_lock(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough while a forked child has a copy of the descriptor
    _forget(lock)


def _forget(lock: int) -> None:
    _held.discard(lock)
    os.close(lock)


def _after_fork() -> None:
    """In a forked child: locks are only closed, for unlocking would free them in the parent too; kept open they would stay
    locked after a parent that was killed."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)

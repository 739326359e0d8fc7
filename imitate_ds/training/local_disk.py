"""A folder on a disk of this node for one process, which nothing outlives: what ZeRO offloads to NVMe lies there.

DeepSpeed names its files by rank alone, so two runs in one folder would write over each other, and it never removes them.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from imitate_ds.distributed import at_end

PREFIX = "imitate_ds-"
LOCK = "in_use"
_held: list[int] = []  # the kernel lets go of these locks when the process is gone, however it went


def folder_of_process(parent: str) -> Path:
    """A new empty folder in `parent`, that only its owner may read; removed at the end of this process.

    Those of processes that were killed are removed too. Variables in parent are filled
    in. Raises ValueError where it is no folder that can be written to.
    """
    where = Path(os.path.expandvars(parent))
    if not where.is_absolute() or not where.is_dir() or not os.access(where, os.W_OK):
        raise ValueError(
            f"nvme_path = {parent!r}: must be the whole path of a folder on a disk of this node, and writable"
        )
    for left in where.glob(f"{PREFIX}*/{LOCK}"):
        _remove_unless_used(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
    _held.append(_locked(folder / LOCK))
    at_end(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


def _remove_unless_used(lock: Path) -> None:
    try:
        handle = _locked(lock)
    except OSError:  # its process lives, or it is another user's
        return
    shutil.rmtree(lock.parent, ignore_errors=True)
    os.close(handle)


def _locked(path: Path) -> int:
    """Raises OSError where another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle

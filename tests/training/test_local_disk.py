import re
import signal
import subprocess
import sys

import pytest

from imitate_ds.training.local_disk import folder_of_process

HOLD = """
import sys, time
from imitate_ds.distributed import leave_world
from imitate_ds.training.local_disk import folder_of_process
print(folder_of_process(sys.argv[1]), flush=True)
sys.stdin.read()
leave_world()
"""


def hold(parent) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def folder_of(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_every_process_has_its_own_and_none_outlives_it(tmp_path):
    first, second = hold(tmp_path), hold(tmp_path)
    theirs = {folder_of(first), folder_of(second)}
    assert {str(path) for path in tmp_path.iterdir()} == theirs
    assert len(theirs) == 2
    first.send_signal(signal.SIGKILL)
    first.wait()
    second.communicate("")  # ends in order, and removes its own only
    assert len(list(tmp_path.iterdir())) == 1
    third = hold(tmp_path)
    its = folder_of(third)  # that of the killed one is gone by now
    assert [str(path) for path in tmp_path.iterdir()] == [its]
    third.communicate("")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parent", ["$NO_SUCH_VARIABLE", "", "/no/such/folder"])
def test_a_path_that_is_no_folder_is_named(parent):
    with pytest.raises(ValueError, match=re.escape(f"nvme_path = {parent!r}: must be the whole path of a folder")):
        folder_of_process(parent)

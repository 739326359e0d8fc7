"""Asking what may hang or die: a process of ours that answers in lines, and that is left behind when it does not."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any


class Helper:
    """`python -m imitate_ds.diagnosis ARGUMENTS` with a pipe for its answers, JSON objects, one a line.

    A thread would not do: one that waits for a dead file system cannot be ended, and keeps the program from its end.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None, own_session: bool = True):
        self._answers, writer = os.pipe()
        self._output = os.memfd_create("output")  # what it prints; a file in TMPDIR might hang
        self._own_session, self._rest = own_session, b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "imitate_ds.diagnosis", str(writer), *arguments],
            env=environment,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._output,
            pass_fds=(writer,),
            start_new_session=own_session,  # so that whoever it started goes with it
        )
        os.close(writer)

    def __enter__(self) -> "Helper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        os.close(self._answers)
        os.close(self._output)

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """Its next answer; None once it has ended. Raises TimeoutError after that many seconds without one."""
        until = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"no answer after {timeout_s:g} s")
            got = os.read(self._answers, 2**16)
            if not got:
                return None
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def tell(self, message: Any) -> None:
        """Give it one line. Nothing happens where it has ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def last_words(self) -> str:
        """For a helper that ended too early: how, and the last line that it printed."""
        status = self._process.wait(timeout=10)
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        printed = os.pread(self._output, 4096, max(0, os.fstat(self._output).st_size - 4096))
        lines = printed.decode(errors="replace").strip().splitlines()
        return f"ended with {how}" + (f": {lines[-1].strip()[:200]}" if lines else "")

    def _end(self) -> None:
        """Kill it, and wait a moment: one that waits for a dead file system does not even die."""
        if self._own_session:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)

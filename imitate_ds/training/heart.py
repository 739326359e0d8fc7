"""Signs of life, and the end of what hangs: every rank says a few times a minute what it is doing, and notices when it is stuck.

A collective whose partner has died fails at once, or never: a machine without power closes no connection, and a pulled cable
is silence. So each rank has a thread that ends the process when its main thread has been at the same thing for too long, and
that leaves behind who was last heard of where.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from imitate_ds.distributed import barrier, world
from imitate_ds.flight import flight
from imitate_ds.training.run_state import FAILURES, HEARTBEATS, Beat, read_beats

STUCK = 3  # the exit status of a rank that ends itself


def beat_seconds(ranks: int) -> float:
    """How often a rank beats: the files of many ranks must not be a burden to a shared file system."""
    return max(2.0, ranks / 50)


class Heart:
    """Beats until stopped. timeout_s: for how long the main thread may be at the same thing."""

    def __init__(self, run_dir: Path, timeout_s: float):
        here = world()
        self.run_dir, self.timeout_s, self.rank, self.ranks = run_dir, timeout_s, here.rank, here.size
        self._stopped = threading.Event()
        self._failed_before = False
        if here.is_main:
            _forget(run_dir)
        barrier()  # before anyone's first sign of life
        (run_dir / HEARTBEATS).mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._live, name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)

    def report_failure(self, error: BaseException) -> list[str]:
        """Write down this rank's end and its last collectives; say who was silent, once silence can be told from a pause."""
        self._write_failure("".join(traceback.format_exception_only(error)).strip())
        time.sleep(2.5 * beat_seconds(self.ranks))  # a rank that died a moment ago has only just been heard of
        return self._say_who_is_silent()

    def _live(self) -> None:
        self._beat()
        while not self._stopped.wait(beat_seconds(self.ranks)):
            self._beat()
            stuck = time.time() - flight.since
            if stuck > self.timeout_s and not self._stopped.is_set():
                self._write_failure(f"stuck for {stuck:.0f} s")
                self._say(
                    f"stuck for {stuck:.0f} s in step {flight.step}, {flight.doing} (train.timeout_s = {self.timeout_s:g}); this "
                    "rank ends itself. The run goes on from its newest checkpoint with --set train.resume=true"
                )
                self._say_who_is_silent()
                sys.stderr.flush()
                os._exit(STUCK)

    def _beat(self) -> None:
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), flight.step, flight.doing, flight.since, time.time())
        self._write(HEARTBEATS, beat._asdict())

    def _write_failure(self, reason: str) -> None:
        record = {"rank": self.rank, "host": socket.gethostname(), "time": time.time(), "step": flight.step}
        self._write(FAILURES, {**record, "doing": flight.doing, "error": reason, "collectives": [*flight.collectives]})

    def _write(self, folder: str, record: dict[str, Any]) -> None:
        """A full disk or a vanished folder must not end a run by way of its signs of life."""
        path = self.run_dir / folder / f"rank-{self.rank:05d}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            beside = path.with_name("." + path.name)
            beside.write_text(json.dumps(record), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            if not self._failed_before:
                self._say(f"{path}: cannot be written ({error.strerror})")
            self._failed_before = True

    def _say_who_is_silent(self) -> list[str]:
        beats = read_beats(self.run_dir)
        newest = max((beat.time for beat in beats), default=0.0)
        never = sorted(set(range(self.ranks)) - {beat.rank for beat in beats})
        silent = [f"rank {rank} was never heard of" for rank in never]
        silent += [
            f"rank {beat.rank} ({beat.host}) was last heard of {newest - beat.time:.0f} s before the others, in step "
            f"{beat.step}, {beat.doing}"
            for beat in beats
            if newest - beat.time > 2 * beat_seconds(self.ranks)
        ]
        for line in silent:
            self._say(line)
        return silent

    def _say(self, text: str) -> None:
        print(f"imitate_ds: rank {self.rank}: {text}", file=sys.stderr, flush=True)


def _forget(run_dir: Path) -> None:
    """Signs of life of a start before this one, which may have had more ranks."""
    for folder in (HEARTBEATS, FAILURES):
        for path in (run_dir / folder).glob("*rank-*.json"):
            path.unlink(missing_ok=True)

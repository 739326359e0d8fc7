"""What this process is doing, and the last collectives it took part in: what is left to read when a run hangs or dies.

Only names, steps and times: nothing of a batch. Costs two clock readings a collective.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

KEPT = 64  # collectives; a step has about ten


@dataclass
class Flight:
    """One per process, written by its main thread; another thread may read it at any time."""

    step: int = 0
    doing: str = "starting"
    since: float = field(default_factory=time.time)
    collectives: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    number: int = 0  # of the last collective: ranks that are out of step with each other differ in it
    waited: float = 0.0  # seconds in collectives since the start
    # Called by the main thread with what begins, and whether it is a collective in the midst of that.
    listeners: list[Callable[[str, bool], None]] = field(default_factory=list)

    def begin(self, doing: str, step: int | None = None, *, collective: str = "") -> None:
        """From now on this process does something else, or takes part in a collective for it."""
        self.step = self.step if step is None else step
        self.doing, self.since = f"{doing}: {collective}" if collective else doing, time.time()
        for listener in self.listeners:
            listener(doing, bool(collective))

    @contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """A collective goes on in here; it stays marked as unfinished when it raises."""
        before, self.number = self.doing, self.number + 1
        entry = {"number": self.number, "name": name, "step": self.step, "began": time.time(), "ended": None}
        self.collectives.append(entry)
        self.begin(before, collective=name)
        yield
        entry["ended"] = time.time()
        self.waited += entry["ended"] - entry["began"]
        self.begin(before)


flight = Flight()

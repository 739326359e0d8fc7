"""Asked to end: a signal raises a flag, and the ranks agree at the end of a step where to stop.

Slurm sends SIGTERM when a job is preempted or cancelled, and the signal of --signal before its time is over. A scheduler may
send it to one rank only; and no rank may stop alone, for the others would wait in the next collective.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Drain:
    """Whether this process was asked to end: by the first signal that came, 0 where none has."""

    def __init__(self) -> None:
        self.signal = 0

    def hear(self, number: int, _: FrameType | None = None) -> None:
        self.signal = self.signal or number


@contextmanager
def listening() -> Iterator[Drain]:
    """Signals that ask for the end only raise the flag in here, whatever the process is doing."""
    drain = Drain()
    before = {number: signal.signal(number, drain.hear) for number in SIGNALS}
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

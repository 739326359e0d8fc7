"""Where the time of the steps goes, by what flight.begin says this process is doing.

On a CPU by its clock. On CUDA by events on the stream, whose distance is the device's own time, with what it waits for the host:
nobody waits for them, until a reading that comes where the host has waited anyway.
"""

import time
from collections import defaultdict, deque

import torch

from imitate_ds.flight import flight

# What a step is made of. What DeepSpeed sends by itself is in `backward` and `step`; `communication` is our own collectives.
KINDS = {
    "waiting for data": "data",
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "optimizer step": "step",
    "between steps": "other",
}
SHARES = (*KINDS.values(), "communication")


class Timeline:
    """Listens between `with` and its end. Validation, saving and whatever else is not a step's are left out."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)  # seconds since the last reading, by kind
        self._marks: deque[tuple[str, torch.cuda.Event]] = deque()  # on CUDA, those whose time is not known yet
        self._kind, self._since = "", time.perf_counter()

    def __enter__(self) -> "Timeline":
        flight.listeners.append(self.begin)
        return self

    def __exit__(self, *_: object) -> None:
        flight.listeners.remove(self.begin)

    def begin(self, doing: str, in_collective: bool = False) -> None:
        kind = KINDS.get(doing, "")
        self._mark("communication" if kind and in_collective else kind)

    def read(self) -> dict[str, float]:
        """Seconds since the last reading, by kind."""
        self._mark(self._kind)
        if self._marks:
            self._marks[-1][1].synchronize()
            self._collect()
        spent = {kind: self.spent[kind] for kind in SHARES}
        self.spent.clear()
        return spent

    def shares(self) -> dict[str, float]:
        """Of the time since the last reading, to be logged."""
        spent = self.read()
        whole = max(1e-9, sum(spent.values()))
        return {f"time/{kind}": seconds / whole for kind, seconds in spent.items()}

    def _mark(self, kind: str) -> None:
        self._kind, before = kind, self._kind
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((kind, event))
            self._collect()
        else:
            now = time.perf_counter()
            self.spent[before] += now - self._since
            self._since = now

    def _collect(self) -> None:
        """What the device has come past by now."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            kind, began = self._marks.popleft()
            self.spent[kind] += began.elapsed_time(self._marks[0][1]) / 1000

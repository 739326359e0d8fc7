"""What a source of data yields: studies, with their report sections and radiographs, and nothing read yet."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class RadiographRef:
    """One image of a study. `read` loads its pixels (uint8 grey [H, W]) and may raise ValueError or OSError."""

    image_id: str
    view_position: str  # "frontal", "lateral" or "unknown"
    read: Callable[[], np.ndarray]  # picklable: a functools.partial of a module-level function


@dataclass(frozen=True)
class Study:
    """One examination. Ids stay inside the tar; the outside world sees only keys derived from them by a hash."""

    patient_id: str
    study_id: str
    split: str  # "train", "val" or "test"
    findings: str  # "" where absent
    impression: str
    radiographs: tuple[RadiographRef, ...]
    labels: dict[str, int] = field(default_factory=dict)  # 1, 0, -1 (uncertain); a label that is not known is left out
    extra: dict[str, object] = field(default_factory=dict)  # JSON values kept with the sample: boxes, provenance
    masks: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)  # name -> uint8 [H, W], picklable


class Source(Protocol):
    """A collection: `name` is written into the index; iteration is in a stable order, the same on every machine."""

    name: str
    synthetic: bool

    def __iter__(self) -> Iterator[Study]: ...

    def __len__(self) -> int: ...

"""What a source of data yields: studies, with their report sections and radiographs, and nothing read yet."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

# Grey levels of a mask: up to the first it is outside, above the second inside; between them nobody says.
OUTSIDE, UNSAID = 63, 191


@dataclass(frozen=True)
class RadiographRef:
    """One image of a study. `read` loads its pixels (uint8 grey [H, W]) and may raise ValueError or OSError."""

    image_id: str
    view_position: str  # "frontal", "lateral" or "unknown"
    # picklable: a functools.partial of a module-level function. The files that it reads are its Path arguments.
    read: Callable[[], np.ndarray]


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
    # name -> reader, as of a radiograph: uint8 [H, W] of its size, 255 inside, 0 outside. An empty mask is an annotation too.
    masks: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)


# What was published of a collection: split, "train + val" or "all" -> {"radiographs", "patients", "boxes"} -> how many.
# A source that knows has it as `published`; `imitate-ds data check` compares.
Published = Mapping[str, Mapping[str, int]]


class Source(Protocol):
    """A collection: `name` is written into the index; iteration is in a stable order, the same on every machine."""

    name: str
    synthetic: bool
    has_reports: bool  # False: labels, masks or boxes alone, and a study without text is no less whole for it

    def __iter__(self) -> Iterator[Study]: ...

    def __len__(self) -> int: ...


def reader_files(read: Callable[[], np.ndarray]) -> tuple[Path, ...]:
    """The files that the reader of a radiograph or a mask reads; none where it draws what it returns."""
    values = (*read.args, *read.keywords.values()) if isinstance(read, partial) else ()
    return tuple(value for value in values if isinstance(value, Path))

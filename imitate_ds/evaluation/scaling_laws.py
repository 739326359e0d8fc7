"""Which runs of a scaling sweep lie on one line, against what, and the power law through them."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from imitate_ds.evaluation.power_law import PowerLaw, fit_power_law
from imitate_ds.evaluation.scaling_rows import ScalingRow

FRONTIER = "best for its compute"


class Axis(NamedTuple):
    """Against what a figure is drawn: along a line it is swept, and all but `free` and the seed is the same.

    Where runs have budgets the share of the data is no compute, and is the same along a line of compute.
    """

    name: str  # of a field of ScalingRow
    label: str
    free: tuple[str, ...]


# Compute is what data and budgets make of it; and an encoder is a line.
AXES = (
    Axis("flops", "training compute, FLOPs", ("share", "budget")),
    Axis("train_studies", "training studies", ("share",)),
    Axis("batch", "studies in a batch", ("batch",)),
)
PLACE = ("encoder", "batch", "negatives", "share", "budget")  # all that tells runs apart, but for the seed


class Measure(NamedTuple):
    """A figure that falls as runs get better."""

    name: str
    label: str
    of: Callable[[ScalingRow], float | None]


def measures(rows: Sequence[ScalingRow]) -> list[Measure]:
    """The loss, of validation if every run that has finished has one, and one minus the AUROC of the probe."""
    finished = [row for row in rows if row.finished]
    found = []
    if finished and all(row.val_loss is not None for row in finished):
        found.append(Measure("val_loss", "validation loss", lambda row: row.val_loss))
    elif any(row.train_loss is not None for row in finished):
        found.append(Measure("train_loss", "training loss, last steps", lambda row: row.train_loss))
    if any(row.auroc is not None for row in finished):
        found.append(
            Measure("error", "1 - AUROC of the linear probe", lambda row: None if row.auroc is None else 1 - row.auroc)
        )
    return found


class Line(NamedTuple):
    """Runs that differ along one axis and in their seed."""

    measure: Measure
    axis: Axis
    name: str
    rows: list[ScalingRow]
    x: list[float]
    y: list[float]
    law: PowerLaw | None  # None: too few settings for one

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        about = {"measure": self.measure.name, "axis": self.axis.name, "line": self.name}
        law = self.law.as_dict() if self.law else None
        return {**about, "runs": [row.run for row in self.rows], "law": law}


def lines_of(rows: Sequence[ScalingRow], axis: Axis, measure: Measure) -> list[Line]:
    """A line for all that is swept besides the axis; against compute also that of the best. None where the axis is not swept.

    Against compute the runs of an encoder that all took the same are points above each other, on no line but that of the best.
    A training loss grows with the batch and its negatives whatever is learned, so it is not drawn against the batch, and there
    is no best of runs that differ in either.
    """
    if (measure.name, axis.name) == ("train_loss", "batch"):
        return []
    known = [row for row in rows if row.finished and getattr(row, axis.name) and measure.of(row)]
    budgeted = axis.name == "flops" and any(row.budget for row in known)
    fixed = [name for name in PLACE if name not in axis.free or (budgeted and name == "share")]
    told = [name for name in fixed if len({getattr(row, name) for row in known}) > 1]
    groups: dict[tuple[Any, ...], list[ScalingRow]] = {}
    for row in known:
        groups.setdefault(tuple(getattr(row, name) for name in fixed), []).append(row)
    comparable = measure.name != "train_loss" or not {"batch", "negatives"} & set(told)
    best = axis.name == "flops" and len(groups) > 1 and comparable
    swept = [group for group in groups.values() if best or _is_swept(group, axis)]
    lines = [_line(axis, measure, _named(group[0], told), group) for group in swept]
    if best:
        lines.append(_line(axis, measure, FRONTIER, _frontier(known, measure)))
    return lines


def _is_swept(rows: Sequence[ScalingRow], axis: Axis) -> bool:
    """Do they differ in their setting, and by it along the axis?"""
    return len({place_of(row) for row in rows}) > 1 and len({getattr(row, axis.name) for row in rows}) > 1


def place_of(row: ScalingRow) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in PLACE)


def cells(rows: Iterable[ScalingRow]) -> list[list[ScalingRow]]:
    """Runs that differ in their seed alone, together."""
    found: dict[tuple[Any, ...], list[ScalingRow]] = {}
    for row in rows:
        found.setdefault(place_of(row), []).append(row)
    return list(found.values())


def _frontier(rows: Sequence[ScalingRow], measure: Measure) -> list[ScalingRow]:
    """The runs of those places whose mean over seeds no other place reaches with as much compute or less."""
    means = [
        (fmean(row.flops or 0 for row in cell), fmean(measure.of(row) or 0 for row in cell), cell)
        for cell in cells(rows)
    ]
    best, kept = float("inf"), []
    for _, mean, cell in sorted(means, key=lambda place: place[:2]):
        if mean < best:
            best = mean
            kept += cell
    return kept


def _line(axis: Axis, measure: Measure, name: str, rows: list[ScalingRow]) -> Line:
    rows = sorted(rows, key=lambda row: getattr(row, axis.name))
    x, y = [float(getattr(row, axis.name)) for row in rows], [float(measure.of(row) or 0) for row in rows]
    return Line(measure, axis, name, rows, x, y, fit_power_law(x, y, [place_of(row) for row in rows]))


def _named(row: ScalingRow, told: Sequence[str]) -> str:
    words = {
        "encoder": row.encoder,
        "batch": f"batch {row.batch}",
        "negatives": f"{row.negatives} negatives",
        "share": f"{row.share:.15g} of the data",
        "budget": f"{row.budget:,} studies seen",
    }
    return ", ".join(words[name] for name in told) or "all runs"

"""scaling.html, scaling.csv and scaling.json: every run of a sweep, the laws in what finished, and what the machine made of it.

Figures only; the page needs no other file.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from imitate_ds.data.shard_index import write_atomic
from imitate_ds.evaluation.power_law import PowerLaw
from imitate_ds.evaluation.report import PAGE, html_table
from imitate_ds.evaluation.report_pictures import picture
from imitate_ds.evaluation.scaling_laws import AXES, FRONTIER, Line, cells, lines_of, measures
from imitate_ds.evaluation.scaling_rows import LAST_SHARE, ScalingRow
from imitate_ds.evaluation.validation import LOSS_CHUNK

FORMAT = "imitate_ds.scaling/1"
MARKERS = "os^Dv*XP"
NOTES = {
    "val_loss": "Validation loss: the terms between images and texts, mean over chunks of "
    f"{LOSS_CHUNK} validation studies, so of runs with any batch size alike.",
    "train_loss": f"Training loss: all terms, mean over the last {LAST_SHARE:.0%} of the steps; runs of different batch sizes "
    "cannot be compared by it. Set data.val_split for a loss that can.",
    "error": "Linear probe: logistic regression on frozen features, all training labels, mean AUROC of the labels.",
}


def write_scaling(folder: Path, name: str, rows: Sequence[ScalingRow], *, synthetic: bool) -> None:
    """All three files, anew."""
    found = measures(rows)
    lines = [line for measure in found for axis in AXES for line in lines_of(rows, axis, measure)]
    values = {
        "format": FORMAT,
        "name": name,
        "synthetic": synthetic,
        "loss_chunk": LOSS_CHUNK,
        "runs": [row._asdict() for row in rows],
        "lines": [line.as_dict() for line in lines],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "scaling.json", (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / "scaling.csv", _csv(rows).encode())
    write_atomic(folder / "scaling.html", _page(name, rows, lines, synthetic).encode())


def _csv(rows: Sequence[ScalingRow]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(ScalingRow._fields)
    writer.writerows(rows)
    return buffer.getvalue()


def _page(name: str, rows: Sequence[ScalingRow], lines: Sequence[Line], synthetic: bool) -> str:
    flag = "Research only, not for clinical use."
    if synthetic:
        flag = (
            f"<b>Synthetic data.</b> {flag} The figures show that the program works; they say nothing about medicine."
        )
    parts = [_about(rows)]
    for measure in dict.fromkeys(line.measure.name for line in lines):
        mine = [line for line in lines if line.measure.name == measure]
        title = mine[0].measure.label
        parts.append(
            f"<h2>{escape(title[0].upper() + title[1:])}</h2><p>{NOTES[measure]}</p>{_pictures(mine)}{_law_table(mine)}"
        )
    parts += [f"<h2>Speed</h2>{_speed_table(rows)}", f"<h2>Runs</h2>{_run_table(rows)}"]
    return PAGE.format(title=f"imitate_ds: {escape(name)}", flag=flag, body="\n".join(parts))


def _about(rows: Sequence[ScalingRow]) -> str:
    finished = [row for row in rows if row.finished]
    compute = [row.flops for row in finished if row.flops]
    total = f" and {sum(compute):.3g} FLOPs" if len(compute) == len(finished) and compute else ""
    seen = sum(row.studies_seen for row in finished)
    failed = sum(row.state == "failed" for row in rows)
    more = f"; <b>{failed} have failed</b>, see their reasons below" if failed else ""
    return f"<p>{len(finished)} of {len(rows)} runs have finished, with {seen:,} studies seen{total}{more}.</p>"


def _pictures(lines: Sequence[Line]) -> str:
    panels = {}
    for axis in dict.fromkeys(line.axis for line in lines):
        mine = [line for line in lines if line.axis == axis]
        panels[f"Against {axis.label}"] = lambda axes, mine=mine: _draw(axes, mine)
    return picture(panels, lines[0].measure.label)


def _draw(axes: Axes, lines: Sequence[Line]) -> None:
    """Runs as points, means over seeds as larger ones; laws and their intervals as lines and bands, never beyond their runs."""
    looks = _looks(lines)
    for line in lines:
        best = line.name == FRONTIER
        colour, marker = looks[line.name]
        if not best:
            axes.plot(line.x, line.y, marker, ms=3 if line.law is None else 4, alpha=0.6, color=colour, mec="none")
        if line.law is None:
            joined = "-" if len(set(line.x)) > 1 else ""
            (means,) = axes.plot(*_means(line), marker=marker, ls=joined, lw=0.8, color=colour, label=line.name)
            means.set(markersize=6, markeredgecolor="white", markeredgewidth=0.5)
            continue
        x = np.geomspace(line.law.low, line.law.high, 100)
        style = {"ls": ":" if best else "-", "lw": 1.6 if best else 1.2, "color": colour, "marker": marker, "ms": 4}
        style["markevery"] = 33
        axes.plot(x, line.law.at(x), label=f"{line.name}: {_formula(line.law)}", **style)
        if band := line.law.band(x):
            axes.fill_between(x, *band, color=colour, alpha=0.12, lw=0)
    axes.set(xscale="log", yscale="log", xlabel=lines[0].axis.label, ylabel=lines[0].measure.label)
    if lines[0].axis.name != "flops":  # few sizes, which are numbers to read
        sizes = sorted({round(x) for line in lines for x in _means(line)[0]})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.tick_params(labelsize=7, which="both")
    axes.legend(fontsize=6.5, ncols=1 + len(lines) // 12)


def _looks(lines: Sequence[Line]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every line: a colour for each encoder where there are several, the marker tells its lines apart."""
    encoders = list(dict.fromkeys(line.rows[0].encoder for line in lines if line.name != FRONTIER))
    drawn, looks = [0] * len(encoders), {FRONTIER: ("0.25", "")}
    for number, line in enumerate(line for line in lines if line.name != FRONTIER):
        encoder = encoders.index(line.rows[0].encoder)
        colour = encoder if len(encoders) > 1 else number
        looks[line.name] = f"C{colour % 10}", MARKERS[drawn[encoder] % len(MARKERS)]
        drawn[encoder] += 1
    return looks


def _means(line: Line) -> tuple[list[float], list[float]]:
    """x and y of each setting, over its seeds."""
    at = {row.run: place for place, row in enumerate(line.rows)}
    groups = [[at[row.run] for row in cell] for cell in cells(line.rows)]
    return [fmean(line.x[i] for i in group) for group in groups], [fmean(line.y[i] for i in group) for group in groups]


def _formula(law: PowerLaw) -> str:
    floor = f"{law.floor:.3g} + " if law.floor else ""
    return f"{floor}{law.scale:.3g} x^{-law.exponent:.3g}"


def _law_table(lines: Sequence[Line]) -> str:
    """a + b x^-c of every line, in brackets the 95 % intervals, or why there are none."""
    body = []
    for line in (line for line in lines if len(set(line.x)) > 1):
        start = [escape(line.name), escape(line.axis.label), str(len(line.x))]
        if line.law is None:
            body.append([*start, *[""] * 3, '<small class="note">fewer than three different sizes give no law</small>'])
            continue
        given = [_with_interval(line.law, name) for name in ("floor", "scale", "exponent")]
        body.append([*start, *given, f'<small class="note">{escape(line.law.why_no_interval)}</small>'])
    header = ["runs on one line", "x", "runs", "a", "b", "c", ""]
    note = (
        "<p><small>a + b x^-c by least squares in logarithms; a floor a only where it is worth its parameter (AICc). In brackets "
        "95 % intervals (Student's t), as are the bands. A law holds within the range of its runs. The line of the best is "
        "chosen by its figures, so it is a little too low. Small points are runs, large ones means over seeds.</small></p>"
    )
    return html_table(header, body) + note


def _with_interval(law: PowerLaw, name: str) -> str:
    value = getattr(law, name)
    if name == "floor" and not value:
        return ""
    interval = (law.intervals or {}).get(name)
    return f"<b>{value:.3g}</b>" + (f" <small>[{interval[0]:.3g}, {interval[1]:.3g}]</small>" if interval else "")


def _speed_table(rows: Sequence[ScalingRow]) -> str:
    """A line for each encoder, batch, device and precision, over the runs that say how fast they were."""
    groups: dict[tuple[Any, ...], list[ScalingRow]] = {}
    for row in rows:
        if row.studies_per_second:
            groups.setdefault((row.encoder, row.batch, row.device, row.precision, row.ranks), []).append(row)
    body = []
    for (encoder, batch, device, precision, ranks), mine in groups.items():
        size = f"{mine[0].parameters / 1e6:.1f}" if mine[0].parameters else ""
        cost = f"{mine[0].flops_per_study / 1e9:.3g}" if mine[0].flops_per_study else ""
        body.append([escape(encoder), str(batch), escape(device), precision, str(ranks), size, cost])
        body[-1] += [_mean((row.studies_per_second for row in mine), ".3g"), _mean((row.tflops for row in mine), ".3g")]
        body[-1] += [_mean((row.mfu for row in mine), ".1%") or "<small>no peak known</small>"]
    header = ["encoder", "batch", "device", "precision", "ranks", "million parameters", "GFLOPs a study", "studies/s"]
    note = (
        "<p><small>Median of a run, mean over runs; runs side by side on one machine slow each other down. FLOPs are the "
        "model's, forward and backward, as counted in the first step. MFU: share of the device's peak.</small></p>"
    )
    return html_table([*header, "TFLOP/s a device", "MFU"], body) + note


def _mean(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(fmean(known), form) if known else ""


def _run_table(rows: Sequence[ScalingRow]) -> str:
    header = [
        "run",
        "state",
        "steps",
        "training studies",
        "studies seen",
        "FLOPs",
        "validation loss",
        "training loss",
        "AUROC",
    ]
    body = []
    for row in rows:
        state = escape(row.state) + (f"<br><small>{escape(row.reason)}</small>" if row.reason else "")
        counts = [f"{row.steps:,} of {row.planned_steps:,}", f"{row.train_studies:,}", f"{row.studies_seen:,}"]
        figures = ["" if value is None else f"{value:.3f}" for value in (row.val_loss, row.train_loss, row.auroc)]
        body.append([escape(row.run), state, *counts, f"{row.flops:.3g}" if row.flops else "", *figures])
    return html_table(header, body)

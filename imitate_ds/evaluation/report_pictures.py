"""The pictures of report.html: each an image that the page carries in itself."""

import base64
import io
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imitate_ds.evaluation.figure_names import place_of

KINDS = ("pr", "calibration", "dice")  # of the curves of a fine-tuned task, beside ROC
MOST_CURVES = 12  # of training on the page; the rest are in TensorBoard


def retrieval_picture(result: dict[str, Any]) -> str:
    curves = result.get("curves", {})

    def draw(axes: Axes, names: list[str]) -> None:
        for number, name in enumerate(names):
            colour = f"C{number}"
            axes.plot(curves[name]["k"], curves[name]["recall"], "o-", ms=3, color=colour, label=name.split("/")[0])
            axes.plot(curves[name]["k"], curves[name]["chance"], ":", color=colour)
        axes.set(xscale="log", xlabel="k", ylabel="R@k (dotted: chance)", ylim=(0, 1.02))
        axes.legend(fontsize=8)

    directions = ("image_to_text", "text_to_image")
    panels = {way.replace("_", " "): [name for name in curves if name.endswith(way)] for way in directions}
    return picture({title: lambda axes, n=names: draw(axes, n) for title, names in panels.items() if names}, "R@k")


def auroc_picture(result: dict[str, Any]) -> str:
    curves = {name: curve for name, curve in result.get("curves", {}).items() if name.startswith("roc/")}
    places = {place_of(name): value for name, value in result["metrics"].items() if value["low"] is not None}
    bars = {(it.share, it.label): value for it, value in places.items() if it and it.measure == "auroc"}
    last = list(bars)[-1][0] if bars else ""  # the largest share

    def draw_rocs(axes: Axes) -> None:
        for number, (name, curve) in enumerate(curves.items()):
            style, label = _style(number), name.removeprefix("roc/")
            axes.plot(curve["false_positive_rate"], curve["true_positive_rate"], label=label, **style)
        axes.plot([0, 1], [0, 1], color="0.7", lw=0.8)
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate", aspect="equal")
        axes.legend(fontsize=6, ncols=2 if len(curves) > 10 else 1, loc="lower right")

    def draw_intervals(axes: Axes) -> None:
        chosen = [(label, value) for (share, label), value in bars.items() if share == last][::-1]
        for row, (_, value) in enumerate(chosen):
            axes.plot([value["low"], value["high"]], [row, row], color="C0")
            axes.plot(value["value"], row, "o", ms=4, color="C0")
        axes.axvline(0.5, color="0.7", lw=0.8)
        axes.set(xlabel="AUROC", yticks=range(len(chosen)), yticklabels=[label for label, _ in chosen])
        axes.tick_params(axis="y", labelsize=7)

    panels = {f"ROC {last}".strip(): draw_rocs, f"95 % intervals {last}".strip(): draw_intervals}
    return picture(panels, "ROC curves and AUROC intervals") if curves and bars else ""


def task_picture(result: dict[str, Any]) -> str:
    """Of a fine-tuned task: precision and recall and calibration of all labels, or a panel for the Dice of each mask."""
    curves = result.get("curves", {})
    precisions, calibrations, dices = ([name for name in curves if name.startswith(f"{kind}/")] for kind in KINDS)

    def draw_precisions(axes: Axes) -> None:
        for number, name in enumerate(precisions):
            axes.plot(curves[name]["recall"], curves[name]["precision"], label=name.partition("/")[2], **_style(number))
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        axes.legend(fontsize=6, ncols=2 if len(precisions) > 10 else 1)

    def draw_calibrations(axes: Axes) -> None:
        for number, name in enumerate(calibrations):
            curve = curves[name]
            label = f"{name.partition('/')[2]} (ECE {curve['ece']:.3f})"
            axes.plot(curve["predicted"], curve["observed"], marker=".", label=label, **_style(number))
        axes.plot([0, 1], [0, 1], color="0.7", lw=0.8)
        axes.set(xlabel="mean probability of a bin", ylabel="share that is positive", aspect="equal")
        axes.legend(fontsize=6, ncols=2 if len(calibrations) > 10 else 1)

    def draw_dice(axes: Axes, curve: dict[str, Any]) -> None:
        axes.stairs(curve["counts"], curve["edges"], fill=True)
        axes.axvline(curve["quartiles"][1], color="0.3", lw=0.8, ls="--")
        axes.set(xlabel="Dice of an image (dashed: median)", ylabel="images", xlim=(0, 1))

    at = ", IoU 0.5" if result["task"] == "detection" else ""
    panels: dict[str, Callable[[Axes], None]] = {f"Precision and recall{at}": draw_precisions} if precisions else {}
    panels |= {"Calibration, ten bins": draw_calibrations} if calibrations else {}
    panels |= {name.partition("/")[2]: lambda axes, c=curves[name]: draw_dice(axes, c) for name in dices}
    return picture(panels, "Curves of the task")


def training_picture(records: list[dict[str, Any]]) -> str:
    """A panel for each number over the steps; all k of one retrieval in one panel."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "split", "time") and isinstance(value, int | float):
                panel, _, k = name.partition("_R@")
                if (record["split"], name) == ("val", "loss"):  # of fewer terms than the loss of training
                    panel = "loss between images and texts"
                line = f"{record['split']} R@{k}" if k else record["split"]
                steps, values = panels.setdefault(panel, {}).setdefault(line, ([], []))
                steps.append(record["step"])
                values.append(value)

    def draw(axes: Axes, lines: dict[str, tuple[list[float], list[float]]]) -> None:
        for label, (steps, values) in lines.items():
            axes.plot(steps, values, ".-" if len(steps) < 50 else "-", lw=1, label=label)
        axes.set(xlabel="step")
        axes.legend(fontsize=7)

    def rank(panel: str) -> tuple[bool, bool]:
        """The loss first, then what is measured on the validation split."""
        return panel != "loss", not any(line.startswith("val") for line in panels[panel])

    chosen = sorted(panels, key=rank)[:MOST_CURVES]
    drawn = {name: lambda axes, lines=panels[name]: draw(axes, lines) for name in chosen}
    return picture(drawn, "Training curves")


def _style(number: int) -> dict[str, Any]:
    return {"ls": ("-", "--", ":")[number // 10 % 3], "color": f"C{number % 10}", "lw": 1.2}


def picture(panels: dict[str, Callable[[Axes], None]], text: str) -> str:
    """One picture of several panels, as an image that the page carries in itself."""
    if not panels:
        return ""
    columns = 2 if len(panels) < 3 else 3
    rows = -(-len(panels) // columns)
    chart = Figure(figsize=(11, (4.4 if columns == 2 else 2.8) * rows), layout="constrained")
    for axes, (title, draw) in zip(_axes(chart, rows, columns), panels.items(), strict=False):
        axes.set_visible(True)
        axes.set_title(title, fontsize=9)
        draw(axes)
    buffer = io.BytesIO()
    chart.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}">'


def _axes(chart: Figure, rows: int, columns: int) -> Iterable[Axes]:
    grid = chart.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_visible(False)
    return grid

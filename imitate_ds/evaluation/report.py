"""results.json and report.html of a run: one result per task, and one page that shows them all and needs no other file.

Figures only: the page knows neither report text nor ids.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imitate_ds.data.shard_index import write_atomic

RESULTS, REPORT, RECORDS = "results.json", "report.html", "metrics.jsonl"
RETRIEVAL_METRIC = re.compile(r"(?P<row>.+?)_(?P<level>chance_|blind_)?(?P<measure>[RP]@\d+)")
MEASURES = {"auroc": "AUROC", "ap": "AP", "ap50": "AP50", "f1": "F1", "accuracy": "accuracy", "dice": "Dice"}
MEASURES |= {"blind_accuracy": "best fixed answer", "pointing": "pointing game"}
MEASURES |= {"chance_pointing": "random pixel", "blind_pointing": "best fixed pixel"}
LABEL_METRIC = re.compile(
    rf"(?:(?P<share>[^/]+%)/)?(?P<measure>{'|'.join(MEASURES)})(?:(?P<macro>_macro)|/(?P<label>.+))?"
)
MOST_CURVES = 12  # of training on the page; the rest are in TensorBoard

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }}
h1 {{ font-size: 1.6rem }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #d0d7de }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #e4e8ec; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
small {{ color: #59636e }} img {{ max-width: 100% }} pre {{ white-space: pre-wrap; font-size: 12px }}
.flag {{ background: #fff3cd; border-left: 4px solid #b58100; padding: .6rem 1rem }}
</style></head><body>
<h1>{title}</h1>
<p class="flag">{flag}</p>
{body}
</body></html>
"""


def open_out(out: Path) -> None:
    """Make the folder for results, before the work. Raises ValueError where what is there is not ours."""
    if out.is_file():
        raise ValueError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    load_results(out)


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Put one task's result into out/results.json, in the place of an older one, and draw report.html anew.

    Raises ValueError where results.json is there but is not ours.
    """
    open_out(out)
    others = [old for old in load_results(out) if old["task"] != result["task"]]
    results = sorted([*others, result], key=lambda one: one["task"])
    text = json.dumps({"results": results}, indent=1, allow_nan=False) + "\n"
    write_atomic(out / RESULTS, text.encode())
    write_report(out)


def load_results(out: Path) -> list[dict[str, Any]]:
    """The results in a folder, one per task; none where there is no results.json."""
    path = out / RESULTS
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())["results"]
        if all({"task", "protocol", "model", "data", "metrics"} <= result.keys() for result in results):
            return results
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path}: not a results file of imitate-ds; move it away, or choose another --out")


def write_report(out: Path, run_dir: Path | None = None) -> Path:
    """Draw out/report.html from results.json, and from the training records of run_dir (default: out) if it has any."""
    results = load_results(out)
    records = _training_records((run_dir or out) / RECORDS)
    parts = [_task_section(result) for result in results]
    if records:
        parts.append(f"<h2>Training</h2>{_training_picture(records)}")
    synthetic = [result for result in results if result["data"]["synthetic"] or result["model"].get("synthetic")]
    flag = "Research only, not for clinical use."
    if synthetic:
        flag = (
            f"<b>Synthetic data.</b> {flag} The figures show that the program works; they say nothing about medicine."
        )
    title = f"imitate_ds: {escape(out.resolve().name)}"
    path = out / REPORT
    write_atomic(path, PAGE.format(title=title, flag=flag, body="\n".join(parts)).encode())
    return path


def _task_section(result: dict[str, Any]) -> str:
    model, data = result["model"], result["data"]
    kind = " (synthetic)" if data["synthetic"] else ""
    about = (
        f"{model.get('image_encoder', 'model')}, preset {model.get('preset', 'unknown')}, on {data['source']}{kind}, "
        f"split {data['split']}: {data['samples']} radiographs of {data['patients']} patients. "
        f"Protocol {result['protocol']}; in brackets 95 % intervals by patient."
    )
    retrieval = result["task"] == "retrieval"
    table = _retrieval_table(result["metrics"]) if retrieval else _label_table(result["metrics"])
    picture = _retrieval_picture(result) if retrieval else _auroc_picture(result)
    details = json.dumps({key: result.get(key) for key in ("model", "data", "settings")}, indent=1)
    return (
        f"<h2>{escape(result['task'].capitalize())}</h2><p>{escape(about)}</p>{table}{picture}"
        f"<details><summary>Settings</summary><pre>{escape(details)}</pre></details>"
    )


def _retrieval_table(metrics: dict[str, dict]) -> str:
    """Rows are levels and directions, columns R@k and P@k; beneath a figure what chance and a blind answer give."""
    rows: dict[str, dict[str, dict[str, dict]]] = {}
    for name, value in metrics.items():
        if match := RETRIEVAL_METRIC.fullmatch(name):
            cell = rows.setdefault(match["row"], {}).setdefault(match["measure"], {})
            cell[(match["level"] or "").rstrip("_")] = value
    columns = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    body = [
        [escape(name.replace("_", " ")), *(_retrieval_cell(row.get(column, {})) for column in columns)]
        for name, row in rows.items()
    ]
    note = (
        "<p><small>R@k: the right report or radiograph is among the first k. P@k: share of the first k that have a class "
        "of the query, mean over classes; duplicate texts stay separate candidates there. Chance: a random order. Blind: "
        "the best answer that is the same for every query.</small></p>"
    )
    return _table(["level / direction", *columns], body) + note


def _retrieval_cell(cell: dict[str, dict]) -> str:
    levels = [f"{name} {_number(cell[name]['value'])}" for name in ("chance", "blind") if name in cell]
    return (_with_interval(cell[""]) if "" in cell else "") + f"<br><small>{', '.join(levels)}</small>"


def _label_table(metrics: dict[str, dict]) -> str:
    """Rows are labels, what is over all of them first; columns are measures, of a probe the shares of the training labels."""
    rows: dict[str, dict[str, dict]] = {}
    for name, value in metrics.items():
        if place := _place(name):
            rows.setdefault(place.label, {})[place.column] = value
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = []
    for label, row in rows.items():
        first = next(iter(row.values()))
        size = first["n"] if "positives" not in first else f"{first['positives']} of {first['n']}"
        body.append(
            [escape(label), str(size), *(_with_interval(row[column]) if column in row else "" for column in columns)]
        )
    undefined = max((len(value.get("not_defined", [])) for value in metrics.values()), default=0)
    note = f"<p><small>{undefined} labels have one value only in this split: not defined, left out of the mean.</small></p>"
    return _table(["label", "positive", *columns], body) + (note if undefined else "")


class Place(NamedTuple):
    """Where a figure by label stands on the page."""

    share: str  # of the training labels, of a probe
    measure: str
    label: str

    @property
    def column(self) -> str:
        return f"{MEASURES[self.measure]}, {self.share}" if self.share else MEASURES[self.measure]


def _place(name: str) -> Place | None:
    if not (match := LABEL_METRIC.fullmatch(name)):
        return None
    over_all = "mean of labels" if match["macro"] else "all"
    return Place(match["share"] or "", match["measure"], match["label"] or over_all)


def _with_interval(value: dict) -> str:
    if value["value"] is None:
        return "<small>not defined</small>"
    interval = "" if value["low"] is None else f" <small>[{_number(value['low'])}, {_number(value['high'])}]</small>"
    spread = f" <small>± {_number(value['std'])}</small>" if "std" in value else ""
    return f"<b>{_number(value['value'])}</b>{spread}{interval}"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _retrieval_picture(result: dict[str, Any]) -> str:
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
    return _picture({title: lambda axes, n=names: draw(axes, n) for title, names in panels.items() if names}, "R@k")


def _auroc_picture(result: dict[str, Any]) -> str:
    curves = {name: curve for name, curve in result.get("curves", {}).items() if name.startswith("roc/")}
    places = {_place(name): value for name, value in result["metrics"].items() if value["low"] is not None}
    bars = {(it.share, it.label): value for it, value in places.items() if it and it.measure == "auroc"}
    last = list(bars)[-1][0] if bars else ""  # the largest share

    def draw_rocs(axes: Axes) -> None:
        for number, (name, curve) in enumerate(curves.items()):
            style = {"ls": ("-", "--", ":")[number // 10 % 3], "color": f"C{number % 10}", "lw": 1.2}
            label = name.removeprefix("roc/")
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
    return _picture(panels, "ROC curves and AUROC intervals") if curves and bars else ""


def _training_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    whole = [line for line in lines if line.startswith("{") and line.endswith("}")]
    return [json.loads(line) for line in whole]


def _training_picture(records: list[dict[str, Any]]) -> str:
    """A panel for each number over the steps; all k of one retrieval in one panel."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "split", "time") and isinstance(value, int | float):
                panel, _, k = name.partition("_R@")
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
    return _picture(drawn, "Training curves")


def _picture(panels: dict[str, Callable[[Axes], None]], text: str) -> str:
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

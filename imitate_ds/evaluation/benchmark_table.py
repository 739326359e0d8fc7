"""The table of a benchmark: results.json, predictions.parquet and report.html from the folders of its runs."""

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imitate_ds.data.shard_index import write_atomic
from imitate_ds.evaluation.predictions import join_predictions, read_predictions
from imitate_ds.evaluation.report import PAGE, REPORT, RESULTS, html_table, load_results, with_interval
from imitate_ds.evaluation.task_scores import Measure, measure
from imitate_ds.metrics import Figures, bootstrap_by_patient, figure

MAIN = (
    "auroc_macro",
    "ap_macro",
    "ap50_macro",
    "accuracy",
    "dice_macro",
)  # the figures of the page; results.json has all


class Entry(NamedTuple):
    """A run of fine-tuning that has ended, and where it stands in the table."""

    task: str
    encoder: str
    train: str
    share: float
    seed: int
    folder: Path


def write_benchmark(
    folder: Path,
    name: str,
    protocol: str,
    entries: Iterable[Entry],
    evaluations: Mapping[tuple[str, str], dict[str, Any]],
) -> None:
    """Raises ValueError or FileNotFoundError where a run has left no results."""
    groups: dict[tuple[str, str, str, float], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.task, entry.encoder, entry.train, entry.share), []).append(entry)
    rows = [_row(group) for group in groups.values()]
    measured = [{"evaluation": key[0], "encoder": key[1], "result": found} for key, found in evaluations.items()]
    values = {"name": name, "protocol": protocol, "rows": rows, "evaluations": measured}
    write_atomic(folder / RESULTS, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    join_predictions(
        folder / "predictions.parquet",
        {entry.folder.name: path for group in groups.values() for entry in group for path in _predictions(entry)},
    )
    write_atomic(folder / REPORT, _page(name, protocol, rows, measured).encode())


def _predictions(entry: Entry) -> list[Path]:
    return sorted(entry.folder.glob("predictions.*.parquet"))


def _row(group: list[Entry]) -> dict[str, Any]:
    """Of every figure the mean over seeds, its interval by patient, and the deviation over seeds."""
    results = [_result(entry) for entry in group]
    first, train = group[0], results[0]["settings"]["train"]
    return {
        "task": first.task,
        "encoder": first.encoder,
        "train": first.train,
        "share": first.share,
        "seeds": [entry.seed for entry in group],
        "head": results[0]["model"]["head"],
        "training": {name: train[name] for name in ("source", "samples", "patients", "synthetic")},
        "test": results[0]["data"],
        "metrics": _over_seeds(group, results),
    }


def _over_seeds(group: list[Entry], results: list[dict[str, Any]]) -> Figures:
    """The same drawn patients for all seeds, so that an interval is that of the mean."""
    measured, patients = zip(*map(_measure, group, results), strict=True)

    def mean(weights: np.ndarray) -> np.ndarray:
        return np.stack([one.statistic(weights) for one in measured]).mean(axis=0)

    low, high = bootstrap_by_patient(mean, patients[0])
    figures: Figures = {}
    for place, metric in enumerate(measured[0].names):
        each = np.array([result["metrics"][metric]["value"] for result in results], dtype=np.float64)  # None is NaN
        more = {
            name: value for name, value in results[0]["metrics"][metric].items() if name not in ("value", "low", "high")
        }
        if len(each) > 1 and np.isfinite(each).all():
            more |= {"std": round(float(each.std(ddof=1)), 6), "draws": len(each)}
        figures[metric] = figure(float(each.mean()), low[place], high[place], **more)
    return figures


def _measure(entry: Entry, result: dict[str, Any]) -> tuple[Measure, np.ndarray]:
    """How the predictions of a run are measured, and their patients; samples stand in the order of their keys."""
    run, targets = result["settings"]["run"], tuple(result["settings"]["targets"])
    kind, exclusive = result["task"], run["task"]["exclusive"]
    (path,) = _predictions(entry)
    known, answers = read_predictions(path, kind, targets)
    batch = run["train"]["global_batch_size"] or run["train"]["micro_batch_size"]
    reference = batch if result["protocol"] == "reference" else 0
    return measure(kind, known, answers, exclusive=exclusive, reference=reference), known.patients


def _result(entry: Entry) -> dict[str, Any]:
    results = load_results(entry.folder)
    if not results:
        raise FileNotFoundError(f"{entry.folder}: no {RESULTS}; has data.test_split of the task been left out?")
    return results[0]


def _page(name: str, protocol: str, rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    flag = "Research only, not for clinical use."
    if any(row["test"]["synthetic"] for row in rows):
        flag = (
            f"<b>Synthetic data.</b> {flag} The figures show that the program works; they say nothing about medicine."
        )
    parts = [
        _task_table(task, [row for row in rows if row["task"] == task])
        for task in dict.fromkeys(r["task"] for r in rows)
    ]
    parts += [_evaluation_table(one) for one in measured]
    note = f"<p>Protocol {protocol}. Mean and deviation over seeds; in brackets 95 % intervals of the mean, by patient.</p>"
    return PAGE.format(title=f"imitate_ds: {escape(name)}", flag=flag, body=note + "\n".join(parts))


def _task_table(task: str, rows: list[dict[str, Any]]) -> str:
    """Encoders down, figures and label shares across."""
    metrics = [metric for metric in MAIN if metric in rows[0]["metrics"]]
    shares = sorted({row["share"] for row in rows})
    columns = [(metric, share) for metric in metrics for share in shares]
    body = []
    for encoder, train in dict.fromkeys((row["encoder"], row["train"]) for row in rows):
        mine = {row["share"]: row for row in rows if (row["encoder"], row["train"]) == (encoder, train)}
        cells = [with_interval(mine[share]["metrics"][metric]) if share in mine else "" for metric, share in columns]
        body.append([escape(f"{encoder}, {train}"), *cells])
    test = rows[0]["test"]
    about = f"{test['source']}, split {test['split']}: {test['samples']} radiographs of {test['patients']} patients."
    header = ["encoder", *(f"{metric.replace('_', ' ')}, {share:.0%} of labels" for metric, share in columns)]
    return f"<h2>{escape(task)}</h2><p>{escape(about)}</p>{html_table(header, body)}"


def _evaluation_table(one: dict[str, Any]) -> str:
    figures = one["result"]["metrics"]
    body = [[escape(metric), str(value.get("n", "")), with_interval(value)] for metric, value in figures.items()]
    title = escape(f"{one['evaluation']}, {one['encoder']}")
    return (
        f"<h2>{title}</h2><details><summary>All figures</summary>{html_table(['metric', 'n', 'value'], body)}</details>"
    )

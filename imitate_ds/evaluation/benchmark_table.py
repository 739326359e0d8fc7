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
from imitate_ds.metrics import Figures, bootstrap_by_patient, bootstrap_p, bootstrap_values, figure, interval

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


class Place(NamedTuple):
    """In the table; every seed has a run there."""

    task: str
    encoder: str
    train: str
    share: float


def write_benchmark(
    folder: Path,
    name: str,
    protocol: str,
    entries: Iterable[Entry],
    evaluations: Mapping[tuple[str, str], dict[str, Any]],
) -> None:
    """Raises ValueError or FileNotFoundError where a run has left no results."""
    groups: dict[Place, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(Place(entry.task, entry.encoder, entry.train, entry.share), []).append(entry)
    scored = {place: _scored(group) for place, group in groups.items()}
    rows = [_row(group, scored[place]) for place, group in groups.items()]
    differences = [_difference(scored, place) for place in scored if _first_encoder(scored, place) != place]
    measured = [{"evaluation": key[0], "encoder": key[1], "result": found} for key, found in evaluations.items()]
    values = {"name": name, "protocol": protocol, "rows": rows, "differences": differences, "evaluations": measured}
    write_atomic(folder / RESULTS, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    join_predictions(
        folder / "predictions.parquet",
        {entry.folder.name: path for group in groups.values() for entry in group for path in _predictions(entry)},
    )
    write_atomic(folder / REPORT, _page(name, protocol, rows, differences, measured).encode())


def _predictions(entry: Entry) -> list[Path]:
    return sorted(entry.folder.glob("predictions.*.parquet"))


class Scored(NamedTuple):
    """The runs of one place in the table, one for each seed, on the same test samples."""

    results: list[dict[str, Any]]
    measured: list[Measure]
    patients: np.ndarray

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Of every figure, over seeds: the same drawn patients for all, so that its interval is that of the mean."""
        return np.stack([one.statistic(weights) for one in self.measured]).mean(axis=0)


def _scored(group: list[Entry]) -> Scored:
    results = [_result(entry) for entry in group]
    measured, patients = zip(*map(_measure, group, results), strict=True)
    return Scored(results, list(measured), patients[0])


def _row(group: list[Entry], scored: Scored) -> dict[str, Any]:
    """Of every figure the mean over seeds, its interval by patient, and the deviation over seeds."""
    first, results = group[0], scored.results
    train = results[0]["settings"]["train"]
    return {
        "task": first.task,
        "encoder": first.encoder,
        "train": first.train,
        "share": first.share,
        "seeds": [entry.seed for entry in group],
        "runs": [entry.folder.name for entry in group],
        "head": results[0]["model"]["head"],
        "training": {name: train[name] for name in ("source", "samples", "patients", "synthetic")},
        "test": results[0]["data"],
        "metrics": _over_seeds(scored),
    }


def _over_seeds(scored: Scored) -> Figures:
    low, high = bootstrap_by_patient(scored.mean, scored.patients)
    ones = np.ones(len(scored.patients))
    by_seed = np.stack([one.statistic(ones) for one in scored.measured])
    figures: Figures = {}
    for place, metric in enumerate(scored.measured[0].names):
        beside = scored.results[0]["metrics"][metric]
        each = by_seed[:, place]
        more = {name: value for name, value in beside.items() if name not in ("value", "low", "high")}
        if len(each) > 1 and np.isfinite(each).all():
            more |= {"std": round(float(each.std(ddof=1)), 6), "draws": len(each)}
        figures[metric] = figure(float(each.mean()), low[place], high[place], **more)
    return figures


def _first_encoder(scored: Mapping[Place, Scored], place: Place) -> Place:
    """The same place in the table, of the encoder that is named first."""
    return next(other for other in scored if other._replace(encoder=place.encoder) == place)


def _difference(scored: Mapping[Place, Scored], place: Place) -> dict[str, Any]:
    """How much better an encoder is than the first, both drawn the same patients (paired bootstrap)."""
    first = _first_encoder(scored, place)
    one, other = scored[first], scored[place]

    def difference(weights: np.ndarray) -> np.ndarray:
        return other.mean(weights) - one.mean(weights)

    drawn = bootstrap_values(difference, one.patients)
    value, (low, high), p = difference(np.ones(len(one.patients))), interval(drawn), bootstrap_p(drawn)
    figures = {
        name: figure(
            value[i], low[i], high[i], n=len(one.patients), p=round(float(p[i]), 4) if np.isfinite(p[i]) else None
        )
        for i, name in enumerate(one.measured[0].names)
        if name in MAIN
    }
    return {"task": place.task, "train": place.train, "share": place.share, "a": first.encoder, "b": place.encoder} | {
        "metrics": figures
    }


def _measure(entry: Entry, result: dict[str, Any]) -> tuple[Measure, np.ndarray]:
    """How the predictions of a run are measured, and their patients; samples stand in the order of their keys."""
    run, targets = result["settings"]["run"], tuple(result["settings"]["targets"])
    kind, exclusive = result["task"], run["task"]["exclusive"]
    (path,) = _predictions(entry)
    known, answers = read_predictions(path, kind, targets)
    reference = result["settings"]["global_batch_size"] if result["protocol"] == "reference" else 0
    return measure(kind, known, answers, exclusive=exclusive, reference=reference), known.patients


def _result(entry: Entry) -> dict[str, Any]:
    results = load_results(entry.folder)
    if not results:
        raise FileNotFoundError(f"{entry.folder}: no {RESULTS}; has data.test_split of the task been left out?")
    return results[0]


def _page(
    name: str,
    protocol: str,
    rows: list[dict[str, Any]],
    differences: list[dict[str, Any]],
    measured: list[dict[str, Any]],
) -> str:
    flag = "Research only, not for clinical use."
    if any(row["test"]["synthetic"] for row in rows):
        flag = (
            f"<b>Synthetic data.</b> {flag} The figures show that the program works; they say nothing about medicine."
        )
    parts = [
        _task_table(task, [row for row in rows if row["task"] == task])
        for task in dict.fromkeys(r["task"] for r in rows)
    ]
    parts += [_differences_table(differences)] if differences else []
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
    runs = [f'<a href="runs/{escape(run)}/{REPORT}">{escape(run)}</a>' for row in rows for run in row["runs"]]
    links = (
        f"<details><summary>Curves, errors and worst samples of each run</summary><p>{', '.join(runs)}</p></details>"
    )
    return f"<h2>{escape(task)}</h2><p>{escape(about)}</p>{html_table(header, body)}{links}"


def _differences_table(differences: list[dict[str, Any]]) -> str:
    body = [
        [
            escape(f"{one['task']}, {one['train']}, {one['share']:.0%}: {one['b']} - {one['a']}"),
            metric,
            with_interval(value),
            str(value["p"]),
        ]
        for one in differences
        for metric, value in one["metrics"].items()
    ]
    return f"<h2>Differences</h2><p>Paired by patient.</p>{html_table(['', 'figure', 'difference', 'p'], body)}"


def _evaluation_table(one: dict[str, Any]) -> str:
    figures = one["result"]["metrics"]
    body = [[escape(metric), str(value.get("n", "")), with_interval(value)] for metric, value in figures.items()]
    title = escape(f"{one['evaluation']}, {one['encoder']}")
    return (
        f"<h2>{title}</h2><details><summary>All figures</summary>{html_table(['metric', 'n', 'value'], body)}</details>"
    )

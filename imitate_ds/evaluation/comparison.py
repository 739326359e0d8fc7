"""Two fine-tuned runs on the same samples: is one better than the other, or were the patients kind to it?

Paired: every bootstrap draw takes the same patients for both, so that what makes a patient hard for both drops out of the
difference. Both are measured as `strict` does, every sample counts, whatever protocol the runs had.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imitate_ds.data.labeled import Annotations
from imitate_ds.evaluation.predictions import read_predictions
from imitate_ds.evaluation.report import load_results
from imitate_ds.evaluation.task_scores import measure
from imitate_ds.metrics import SEED, bootstrap_p, bootstrap_values, interval

KINDS = ("classification", "segmentation", "detection")
P = "two-sided, from the draws: min(1, 2 (k + 1) / (draws + 1)), k the smaller of how many differences are <= 0 and >= 0"


class Scored(NamedTuple):
    """A fine-tuned run and what it said of its test samples, in the order of their keys."""

    run: Path
    result: dict[str, Any]
    known: Annotations
    answers: np.ndarray

    @property
    def exclusive(self) -> bool:
        return self.result["settings"]["run"]["task"]["exclusive"]


def compare_runs(a: Path, b: Path, draws: int) -> dict[str, Any]:
    """Per metric both values, b - a, its 95 % interval and p-value. Raises ValueError naming what is not the same."""
    first = read_scored(a)
    second = read_scored(b, first)
    _check_same_samples(first, second)
    task, known = first.result["task"], first.known
    one, other = (measure(task, it.known, it.answers, exclusive=it.exclusive) for it in (first, second))

    def differences(weights: np.ndarray) -> np.ndarray:
        return other.statistic(weights) - one.statistic(weights)

    drawn = bootstrap_values(differences, known.patients, draws)
    ones = np.ones(len(known))
    columns = {"a": one.statistic(ones), "b": other.statistic(ones), "difference": differences(ones)}
    columns |= dict(zip(("low", "high"), interval(drawn), strict=True)) | {"p": bootstrap_p(drawn)}
    metrics = {
        name: {what: _number(values[i]) for what, values in columns.items()} | {"n": one.beside[i]["n"]}
        for i, name in enumerate(one.names)
    }
    return {
        "task": task,
        "runs": {"a": _about(first), "b": _about(second)},
        "targets": list(known.targets),
        "samples": len(known),
        "patients": len(np.unique(known.patients)),
        "bootstrap": {"draws": draws, "seed": SEED, "unit": "patient", "interval": "95 % percentile", "p": P},
        "metrics": metrics,
    }


def read_scored(run: Path, like: Scored | None = None) -> Scored:
    """What a run folder holds; with `like`, of the same task, its targets in the same order.

    Raises FileNotFoundError or ValueError.
    """
    result = next((it for it in load_results(run) if it["task"] in KINDS), None)
    path = run / f"predictions.{result['data']['split']}.parquet" if result else run / "results.json"
    if result is None or not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, or nothing of fine-tuning in it; name the folder of a run that was fine-tuned to its end, "
            "with data.test_split"
        )
    if like is None:
        return Scored(run, result, *read_predictions(path, result["task"], tuple(result["settings"]["targets"])))
    _check_same_task(like, run, result)
    return Scored(run, result, *read_predictions(path, result["task"], like.known.targets))


def _check_same_task(a: Scored, run: Path, result: dict[str, Any]) -> None:
    if a.result["task"] != result["task"]:
        raise ValueError(f"task.kind: {a.run} is {a.result['task']}, {run} is {result['task']}; compare the same task")
    targets, others = set(a.known.targets), set(result["settings"]["targets"])
    if targets != others:
        alone = {a.run: targets - others, run: others - targets}
        said = [f"{where} alone has {', '.join(sorted(names))}" for where, names in alone.items() if names]
        raise ValueError(f"task.targets: {'; '.join(said)}; compare the same targets")
    exclusive = result["settings"]["run"]["task"]["exclusive"]
    if a.exclusive != exclusive:
        raise ValueError(f"task.exclusive: {a.exclusive} in {a.run}, {exclusive} in {run}; compare the same task")


def _check_same_samples(a: Scored, b: Scored) -> None:
    """Where a model was tested is not its merit: the same keys, of the same patients, with the same truth."""
    keys, others = set(a.known.keys), set(b.known.keys)
    if keys != others:
        raise ValueError(
            f"test samples: {len(keys - others)} are in {a.run} alone, {len(others - keys)} in {b.run} alone, the first is "
            f"{min(keys ^ others)}; compare runs of the same shards, data.test_split and data.test_list"
        )
    for what, there in _truths(a).items():
        unlike = [key for key, x, y in zip(a.known.keys, there, _truths(b)[what], strict=True) if not _equal(x, y)]
        if unlike:
            raise ValueError(
                f"{what} of {len(unlike)} test samples: not the same in {a.run} and {b.run}, the first is {unlike[0]}; compare "
                "runs of the same shards, data.uncertain and data.blank"
            )


def _truths(it: Scored) -> dict[str, Any]:
    known = it.known
    boxes = [np.c_[corners, labels] for corners, labels in zip(known.boxes, known.box_labels, strict=True)]
    truths = {"patients": known.patients, "labels": known.labels, "boxes": boxes}
    # Not their pixels: a mask has the size of the encoder's input, and models of different sizes may be compared.
    return truths | ({"masks": np.isnan(it.answers[:, :, 0])} if it.result["task"] == "segmentation" else {})


def _equal(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def _about(it: Scored) -> dict[str, Any]:
    result = it.result
    about = {"run": str(it.run), "protocol": result["protocol"], "step": result["settings"]["step"]}
    return about | {"model": result["model"], "data": result["data"]}


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None

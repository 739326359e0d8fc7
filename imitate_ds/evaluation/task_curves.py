"""What a figure hides: the curves of a task, its errors by kind, how far probabilities can be believed, and its worst cases.

Plain lists for results.json, by name:
  roc/LABEL, pr/LABEL     rates at 101 even steps; of boxes pr/LABEL alone, at IoU 0.5, as its AP reads it
  confusion               of exclusive classes: counts, rows what is true, columns the likeliest class
  confusion/LABEL         else, at 0.5: counts [[true negative, false positive], [false negative, true positive]]
  calibration/LABEL       by bin of the probability: its mean, the share that is positive, the number; ece, over all bins
  dice/LABEL              how many images have a Dice in each of 20 bins, and its quartiles
"""

from typing import Any, NamedTuple

import numpy as np

from imitate_ds.data.labeled import Annotations
from imitate_ds.evaluation.detection_ap import RECALLS, count_wrong_boxes, precision_curves
from imitate_ds.evaluation.task_scores import SURE, detections_of, dice_scores
from imitate_ds.metrics import nan_mean, precision_recall_curve, roc_curve

CALIBRATION_BINS, DICE_BINS = 10, 20
WORST = 10
SMALLEST = 1e-7  # probability: what float32 can tell from 0 and 1

Curves = dict[str, dict[str, Any]]


class Worst(NamedTuple):
    """Samples, worst first."""

    measure: str
    keys: list[str]
    values: list[float]


def task_curves(kind: str, known: Annotations, answers: np.ndarray, *, exclusive: bool = False) -> Curves:
    """Curves of answers as task_scores has them; of a label only what is defined."""
    if kind == "classification":
        return _label_curves(known, answers) | _confusions(known, answers, exclusive)
    if kind == "segmentation":
        return _dice_curves(known, answers)
    return _box_curves(known, answers)


def worst_samples(
    kind: str, known: Annotations, answers: np.ndarray, *, exclusive: bool = False, most: int = WORST
) -> Worst:
    """The largest loss, the lowest Dice, the most wrong boxes; of equal ones the first. What has no value is left out."""
    if kind == "classification":
        measure, values, sign = "cross-entropy", _losses(known.labels, answers, exclusive), -1
    elif kind == "segmentation":
        measure, values, sign = "Dice", np.array([nan_mean(row) for row in dice_scores(answers)]), 1
    else:
        found = detections_of(answers)
        wrong = count_wrong_boxes(
            found, known.boxes, known.box_labels, classes=len(known.targets), threshold=0.5, score=SURE
        )
        measure, values, sign = "missed and false boxes", wrong, -1
    order = np.argsort(sign * values, kind="stable")
    chosen = order[~np.isnan(values[order])][:most]
    return Worst(measure, [known.keys[i] for i in chosen], values[chosen].round(6).tolist())


def calibration_curve(labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Reliability in bins of equal width, empty ones left out, and the expected calibration error.

    labels [n] of 1 and 0. A bin holds its upper edge. The error: over bins, weighed by their numbers, the mean distance of
    the mean probability from the share that is positive.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.searchsorted(edges[1:-1], scores)
    counts, said, true = (np.bincount(bins, of, minlength=CALIBRATION_BINS) for of in (None, scores, labels))
    there = counts > 0
    said, true, counts = said[there] / counts[there], true[there] / counts[there], counts[there]
    error = float(counts @ np.abs(said - true) / counts.sum())
    return {"predicted": _rounded(said), "observed": _rounded(true), "counts": counts.tolist(), "ece": round(error, 6)}


def _label_curves(known: Annotations, scores: np.ndarray) -> Curves:
    curves: Curves = {}
    for i, name in enumerate(known.targets):
        says = known.labels[:, i] >= 0
        labels, mine = known.labels[says, i], scores[says, i]
        if (labels == 0).any() and (labels == 1).any():
            false_positives, true_positives = roc_curve(labels, mine)
            recalls, precisions = precision_recall_curve(labels, mine)
            curves[f"roc/{name}"] = {"false_positive_rate": false_positives, "true_positive_rate": true_positives}
            curves[f"pr/{name}"] = {"recall": recalls, "precision": precisions}
        if len(labels):
            curves[f"calibration/{name}"] = calibration_curve(labels, mine)
    return curves


def _confusions(known: Annotations, scores: np.ndarray, exclusive: bool) -> Curves:
    if exclusive:
        counts = _cross_count(known.labels.argmax(axis=1), scores.argmax(axis=1), len(known.targets))
        return {"confusion": {"classes": list(known.targets), "counts": counts}}
    curves: Curves = {}
    for i, name in enumerate(known.targets):
        says = known.labels[:, i] >= 0
        if says.any():
            counts = _cross_count(known.labels[says, i], (scores[says, i] >= SURE).astype(int), 2)
            curves[f"confusion/{name}"] = {"threshold": SURE, "counts": counts}
    return curves


def _cross_count(true: np.ndarray, said: np.ndarray, size: int) -> list[list[int]]:
    flat = np.bincount(true.astype(int) * size + said, minlength=size * size)
    return flat.reshape(size, size).tolist()


def _dice_curves(known: Annotations, counts: np.ndarray) -> Curves:
    edges, curves = np.linspace(0, 1, DICE_BINS + 1), {}
    for i, name in enumerate(known.targets):
        scores = dice_scores(counts)[:, i]
        scores = scores[~np.isnan(scores)]
        if len(scores):
            quartiles = _rounded(np.percentile(scores, [25, 50, 75]))
            numbers = np.histogram(scores, edges)[0].tolist()
            curves[f"dice/{name}"] = {"edges": _rounded(edges), "counts": numbers, "quartiles": quartiles}
    return curves


def _box_curves(known: Annotations, answers: np.ndarray) -> Curves:
    found, classes = detections_of(answers), len(known.targets)
    tables = precision_curves(found, known.boxes, known.box_labels, classes=classes, threshold=0.5)
    pairs = zip(known.targets, tables, strict=True)
    return {
        f"pr/{name}": {"recall": _rounded(RECALLS), "precision": _rounded(precision), "iou": 0.5}
        for name, precision in pairs
        if not np.isnan(precision).any()
    }


def _losses(labels: np.ndarray, scores: np.ndarray, exclusive: bool) -> np.ndarray:
    """The cross-entropy of each sample [n], in mean over its known labels; NaN where it has none."""
    sure = np.clip(scores, SMALLEST, 1 - SMALLEST)
    if exclusive:
        return -np.log(sure[np.arange(len(labels)), labels.argmax(axis=1)])
    each = np.where(labels == 1, -np.log(sure), -np.log(1 - sure))
    return np.array([nan_mean(row) for row in np.where(labels >= 0, each, np.nan)])


def _rounded(values: np.ndarray) -> list[float]:
    return values.round(4).tolist()

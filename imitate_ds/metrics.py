"""Figures of merit, and how sure one may be of them: retrieval ranks, AUROC, average precision, F1, bootstrap over patients.

Every statistic takes one weight per sample, so a bootstrap draw is a vector of how often each patient was drawn, and
nothing is sorted or ranked again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Statistic = Callable[[np.ndarray], "np.ndarray | float"]  # weights [n] -> one figure, or several at once
LabelStatistic = Callable[
    [np.ndarray, np.ndarray], Callable[[np.ndarray], float]
]  # labels [n], values [n] -> statistic
Ties = Literal["against", "index"]
Figures = dict[str, dict[str, Any]]  # metric -> {value, low, high, n, ...}

DRAWS, SEED = 1000, 0  # of the bootstrap
TIE = 1e-6  # cosine similarities closer than this are equal: it is what float32 rows can tell apart


def positive_ranks(
    similarity: Tensor, query_groups: Tensor, candidate_groups: Tensor, *, ties: Ties = "against"
) -> Tensor:
    """How many wrong candidates stand at or before the best right one: int64 [Q]; 0 means the first hit is right.

    similarity [Q, K] of cosines; a candidate is right if its group (int64 [K]) is the query's (int64 [Q]).
    Of equally similar candidates the wrong ones come first (ties="against"), or the first in order (ties="index").
    """
    right = query_groups[:, None] == candidate_groups[None, :]
    if not right.any(dim=1).all():
        raise ValueError("query_groups: every query must have at least one right candidate")
    if ties == "index":
        similarity = _without_ties(similarity)
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    before = similarity > best if ties == "index" else similarity >= best - TIE
    return (before & ~right).sum(dim=1)


def recall_at_k(similarity: Tensor, query_groups: Tensor, candidate_groups: Tensor, *, k: int) -> float:
    """Share of queries with a right candidate among the k most similar; see positive_ranks for groups and ties."""
    return (positive_ranks(similarity, query_groups, candidate_groups) < k).double().mean().item()


def chance_recall_at_k(right: np.ndarray, candidates: int, k: int) -> float:
    """Expected R@k of a random order: right [Q] is how many of the candidates are right for each query."""
    misses = np.ones(len(right))
    for drawn in range(min(k, candidates)):
        misses *= np.clip(candidates - right - drawn, 0, None) / (candidates - drawn)
    return float(1 - misses.mean())


def blind_recall_at_k(query_groups: np.ndarray, k: int) -> float:
    """R@k of the best fixed answer, the same k groups for every query: what one gets without looking."""
    sizes = np.unique(query_groups, return_counts=True)[1]
    return float(np.sort(sizes)[::-1][:k].sum() / len(query_groups))


def precision_at_k(similarity: Tensor, query_labels: Tensor, candidate_labels: Tensor, *, k: int) -> Tensor:
    """Per query and class, the share of the k most similar candidates that have the class: float64 [Q, L].

    similarity [Q, K]; labels bool [Q, L] and [K, L]. Entries whose query lacks the class are NaN. Equal candidates stand
    in index order, so the figure is the same on every machine.
    """
    count = similarity.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"k = {k}: must be from 1 to the number of candidates, {count}")
    top = _without_ties(similarity).topk(k, dim=1).indices
    return candidate_labels[top].double().mean(dim=1).masked_fill(~query_labels, torch.nan)


def mean_statistic(values: np.ndarray, base: np.ndarray | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The weighted mean of values [n] or of each column of [n, L], NaN entries left out; `base` [n] weighs samples too."""
    table = values.reshape(len(values), -1)
    known = ~np.isnan(table) * (1.0 if base is None else base[:, None])
    filled = np.nan_to_num(table) * known

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _divide(weights @ filled, weights @ known)

    return statistic


def auroc_statistic(labels: np.ndarray, scores: np.ndarray) -> Callable[[np.ndarray], float]:
    """The weighted area under the ROC curve, as a function of weights [n]; NaN where only one class has weight.

    labels [n]: 1, 0, or anything else (left out). A tie of a positive and a negative counts one half. Scores are sorted
    here, once.
    """
    counts = _counts_by_score(labels, scores)

    def statistic(weights: np.ndarray) -> float:
        positives, negatives = counts(weights)
        below = np.cumsum(negatives) - negatives
        pairs = positives.sum() * negatives.sum()
        return float(positives @ (below + negatives / 2) / pairs) if pairs else float("nan")

    return statistic


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of scores [n]; NaN if the labels [n] (1, 0; others left out) have one value only."""
    return auroc_statistic(labels, scores)(np.ones(len(labels)))


def average_precision_statistic(labels: np.ndarray, scores: np.ndarray) -> Callable[[np.ndarray], float]:
    """The weighted mean of the precision at every positive, those of equal score at once; labels and NaN as for AUROC.

    What scikit-learn calls average_precision_score: the steps of the curve, not interpolated.
    """
    counts = _counts_by_score(labels, scores)

    def statistic(weights: np.ndarray) -> float:
        positives, negatives = (side[::-1] for side in counts(weights))  # the highest score first
        if not positives.any() or not negatives.any():
            return float("nan")
        found = np.cumsum(positives)
        precision = _divide(found, found + np.cumsum(negatives))
        return float(positives @ np.nan_to_num(precision) / found[-1])

    return statistic


def f1_statistic(labels: np.ndarray, predicted: np.ndarray) -> Callable[[np.ndarray], float]:
    """The weighted F1 of predictions bool [n]; labels and NaN as for AUROC."""
    known, positive = (labels == 0) | (labels == 1), labels == 1
    predicted = predicted & known

    def statistic(weights: np.ndarray) -> float:
        positives, negatives = weights @ positive, weights @ (known & ~positive)
        if not (positives and negatives):
            return float("nan")
        return float(2 * (weights @ (predicted & positive)) / (positives + weights @ predicted))

    return statistic


def accuracy_statistic(labels: np.ndarray, predicted: np.ndarray) -> Callable[[np.ndarray], float]:
    """The weighted share of predictions bool [n] that are right; labels and NaN as for AUROC."""
    known, positive = (labels == 0) | (labels == 1), labels == 1
    right = known & (predicted == positive)

    def statistic(weights: np.ndarray) -> float:
        positives, negatives = weights @ positive, weights @ (known & ~positive)
        return float(weights @ right / (positives + negatives)) if positives and negatives else float("nan")

    return statistic


def macro_statistic(kind: LabelStatistic, labels: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """One figure for each of L columns, and last their mean: weights [n] -> [L + 1]. Columns not defined are left out of it.

    values [n, L] are scores or predictions, as `kind` takes them.
    """
    columns = [kind(labels[:, i], values[:, i]) for i in range(labels.shape[1])]

    def statistic(weights: np.ndarray) -> np.ndarray:
        figures = np.array([column(weights) for column in columns])
        return np.append(figures, nan_mean(figures))

    return statistic


def macro_auroc_statistic(labels: np.ndarray, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """AUROC of each of L columns, and last their mean: weights [n] -> [L + 1]. Columns not defined are left out of it."""
    return macro_statistic(auroc_statistic, labels, scores)


def roc_curve(labels: np.ndarray, scores: np.ndarray, points: int = 101) -> tuple[list[float], list[float]]:
    """The ROC curve for a picture: false-positive rates at `points` even steps, and the true-positive rates there."""
    known = (labels == 0) | (labels == 1)
    order = np.argsort(-scores[known], kind="stable")
    positive = labels[known][order] == 1
    last_of_tie = np.r_[np.diff(scores[known][order]) != 0, True]
    rates = [np.r_[0, np.cumsum(side)[last_of_tie] / max(side.sum(), 1)] for side in (~positive, positive)]
    grid = np.linspace(0, 1, points)
    # the curve is a staircase: take the highest point at each rate
    right = np.searchsorted(rates[0], grid, side="right") - 1
    return grid.round(4).tolist(), rates[1][right].round(4).tolist()


def precision_recall_curve(
    labels: np.ndarray, scores: np.ndarray, points: int = 101
) -> tuple[list[float], list[float]]:
    """For a picture: recalls at `points` even steps, and the precision at the highest threshold that reaches each.

    labels [n]: 1, 0, or anything else (left out); there must be a positive. Nothing is interpolated.
    """
    positives, negatives = (side[::-1] for side in _counts_by_score(labels, scores)(np.ones(len(labels))))
    found = np.cumsum(positives)
    precision = found / (found + np.cumsum(negatives))
    grid = np.linspace(0, 1, points)
    # whole counts: a recall of 0.3 is reached by 3 of 10, which as a quotient of floats may lie below
    places = np.searchsorted(found, np.ceil(grid * found[-1] - 1e-9), side="left")
    return grid.round(4).tolist(), precision[places].round(4).tolist()


def bootstrap_by_patient(
    statistic: Statistic, patients: Sequence[str] | np.ndarray, draws: int = DRAWS, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of a statistic, patients drawn with replacement, all samples of one going together.

    `patients` [n] names each sample's patient. Returns (low, high), each of the statistic's shape; draws in which a
    figure is not defined are left out of its interval, and NaN is returned where that is all of them.
    """
    return interval(bootstrap_values(statistic, patients, draws, seed))


def bootstrap_values(
    statistic: Statistic, patients: Sequence[str] | np.ndarray, draws: int = DRAWS, seed: int = SEED
) -> np.ndarray:
    """The statistic of every draw of bootstrap_by_patient: float64 [draws, ...]."""
    count, member = _patients(patients)
    rng = np.random.default_rng(seed)
    weights = (np.bincount(rng.integers(count, size=count), minlength=count)[member] for _ in range(draws))
    return np.array([statistic(w) for w in weights], dtype=np.float64)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval over draws [draws, ...]; NaN where none is defined."""
    defined = ~np.isnan(values).all(axis=0)
    bounds = np.full((2, *values.shape[1:]), np.nan)
    bounds[:, defined] = np.nanpercentile(values[:, defined], [2.5, 97.5], axis=0)
    return bounds[0], bounds[1]


def bootstrap_p(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-value of no difference, from draws [draws, M] -> [M].

    With R draws in which it is defined: min(1, 2 (k + 1) / (R + 1)), k the smaller of how many are at most 0 and at least 0.
    The ones keep it from 0, which so many draws cannot show ("Bootstrap Methods and their Application", Davison and Hinkley,
    1997, eq. 4.11).
    """
    known = (~np.isnan(differences)).sum(axis=0)
    fewer = np.minimum((differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0))
    return np.where(known > 0, np.minimum(1.0, 2 * (fewer + 1) / (known + 1)), np.nan)


def figure(value: float, low: float = math.nan, high: float = math.nan, *, n: int, **more: Any) -> dict[str, Any]:
    """One metric as results.json has it, from n samples; None where it, or its interval, is not defined."""
    numbers = {"value": value, "low": low, "high": high}
    return {k: round(float(v), 6) if math.isfinite(v) else None for k, v in numbers.items()} | {"n": n, **more}


def nan_mean(values: np.ndarray) -> float:
    """The mean of what is defined; NaN, without a warning, if nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _without_ties(similarity: Tensor) -> Tensor:
    """float64 [Q, K] in the same order, but for what is equal within TIE: that stands in index order."""
    count = similarity.shape[1]
    steps = (similarity.double() / TIE).round()
    return steps - torch.arange(count, dtype=torch.float64, device=similarity.device) / (2 * count)


def _counts_by_score(labels: np.ndarray, scores: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Weights [n] -> weight of positives and of negatives at each distinct score, ascending: float64 [T] each."""
    known = np.flatnonzero((labels == 0) | (labels == 1))
    order = known[np.argsort(scores[known], kind="stable")]
    positive = labels[order] == 1
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, dtype=int)

    def counts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(order):
            return np.zeros(0), np.zeros(0)
        here = weights[order].astype(np.float64)
        return np.add.reduceat(here * positive, starts), np.add.reduceat(here * ~positive, starts)

    return counts


def _patients(patients: Sequence[str] | np.ndarray) -> tuple[int, np.ndarray]:
    names, member = np.unique(np.asarray(patients), return_inverse=True)
    if not len(names):
        raise ValueError("patients: must name at least one")
    return len(names), member


def _divide(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)

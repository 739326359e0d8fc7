"""Figures by label with their intervals: what zero-shot, probe and grounding report alike."""

from typing import Any

import numpy as np

from imitate_ds.evaluation.embedded import SplitRecords
from imitate_ds.metrics import (
    Figures,
    Statistic,
    bootstrap_by_patient,
    figure,
    macro_auroc_statistic,
    roc_curve,
)


def label_figures(records: SplitRecords, name: str, draws: list[Statistic]) -> Figures:
    """`name`_macro and `name`/LABEL, each the mean over draws; a label with one value is not defined.

    draws: statistics weights [n] -> [L + 1], the labels' figures and last their mean, as macro_statistic makes them.
    """

    def each_draw(weights: np.ndarray) -> np.ndarray:
        return np.stack([statistic(weights) for statistic in draws])

    values = each_draw(np.ones(len(records.keys)))
    low, high = bootstrap_by_patient(lambda weights: each_draw(weights).mean(axis=0), records.patients)
    means, spread = values.mean(axis=0), values.std(axis=0, ddof=1 if len(draws) > 1 else 0)
    more = [
        {"std": round(float(s), 6), "draws": len(draws)} if len(draws) > 1 and np.isfinite(s) else {} for s in spread
    ]
    undefined = [label for label, value in zip(records.index.labels, means, strict=False) if np.isnan(value)]
    counts = {"labels": len(means) - 1 - len(undefined), "not_defined": undefined}
    figures = {f"{name}_macro": figure(means[-1], low[-1], high[-1], n=len(records.keys), **counts, **more[-1])}
    for i, label in enumerate(records.index.labels):
        column = records.labels[:, i]
        size = {"n": int(((column == 0) | (column == 1)).sum()), "positives": int((column == 1).sum())}
        figures[f"{name}/{label}"] = figure(means[i], low[i], high[i], **size, **more[i])
    return figures


def auroc_figures(records: SplitRecords, draws: list[np.ndarray]) -> Figures:
    """AUROC per label and macro of scores [n, L], the mean over draws."""
    return label_figures(records, "auroc", [macro_auroc_statistic(records.labels, scores) for scores in draws])


def roc_curves(records: SplitRecords, scores: np.ndarray) -> dict[str, Any]:
    """The ROC curve of every label that has both values, of scores [n, L]."""
    curves = {}
    for i, name in enumerate(records.index.labels):
        column = records.labels[:, i]
        if (column == 0).any() and (column == 1).any():
            false_positives, true_positives = roc_curve(column, scores[:, i])
            curves[f"roc/{name}"] = {"false_positive_rate": false_positives, "true_positive_rate": true_positives}
    return curves

"""The linear probe: one logistic regression per label on frozen features, at several shares of the labels.

Everything is chosen on training patients: scaling, and the strength of regularisation. What is scored is never looked at.
"""

import math
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imitate_ds.metrics import auroc, nan_mean

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: smaller is more regularised
HELD_OUT = 0.2  # share of the training patients on which C is chosen
FALLBACK = 1e-2  # where those patients are too few to tell: no label has both values among them


class ProbeFit(NamedTuple):
    scores: np.ndarray  # float64 [n, L]: log odds for what is scored
    strength: float  # the C chosen
    samples: int  # of training
    untrained: list[int]  # labels with one value only in training: their scores are constant, so their AUROC is 0.5


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    scored: np.ndarray,
    *,
    share: float,
    seed: int,
) -> ProbeFit:
    """Fit on a share of the training units, patients or samples, drawn by the seed, and score other samples.

    features float32 [m, C], labels [m, L] (1, 0; others left out), units [m] names what is drawn; scored [n, C].
    """
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(units))
    names = names[: max(2, math.ceil(share * len(names)))]
    held_out = np.isin(units, names[: max(1, round(HELD_OUT * len(names)))])
    drawn = np.isin(units, names)
    fit = drawn & ~held_out

    trials = _scores(features[fit], labels[fit], features[held_out], STRENGTHS)
    figures = [_macro_auroc(labels[held_out], trial) for trial in trials]
    decided = not np.isnan(figures).all()
    strength = STRENGTHS[int(np.nanargmax(figures))] if decided else FALLBACK
    scores = _scores(features[drawn], labels[drawn], scored, (strength,))[0]
    untrained = [i for i in range(labels.shape[1]) if not _both_values(labels[drawn, i])]
    return ProbeFit(scores, strength, int(drawn.sum()), untrained)


def _scores(
    features: np.ndarray, labels: np.ndarray, scored: np.ndarray, strengths: tuple[float, ...]
) -> list[np.ndarray]:
    """Log odds [n, L] at each strength, ascending; zero where a label has one value only."""
    scores = [np.zeros((len(scored), labels.shape[1])) for _ in strengths]
    for column in range(labels.shape[1]):
        target = labels[:, column]
        if not _both_values(target):
            continue
        known = (target == 0) | (target == 1)
        # warm: each solution starts from the one before, several times faster along the path
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-3, warm_start=True))
        for table, strength in zip(scores, strengths, strict=True):
            probe.set_params(logisticregression__C=strength).fit(features[known], target[known])
            table[:, column] = probe.decision_function(scored)
    return scores


def _macro_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    return nan_mean(np.array([auroc(labels[:, i], scores[:, i]) for i in range(labels.shape[1])]))


def _both_values(target: np.ndarray) -> bool:
    return bool((target == 0).any() and (target == 1).any())

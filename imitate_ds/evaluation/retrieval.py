"""Retrieval at one level: reports for a radiograph, radiographs for a report.

Recall is by pair, with texts of one group as one; precision is by class, every text for itself, as GLoRIA measures it
("GLoRIA: A Multimodal Global-Local Representation Learning Framework for Label-efficient Medical Image Recognition",
Huang et al., 2021).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imitate_ds.metrics import (
    Figures,
    Ties,
    blind_recall_at_k,
    bootstrap_by_patient,
    chance_recall_at_k,
    figure,
    mean_statistic,
    nan_mean,
    positive_ranks,
    precision_at_k,
)

KS = (1, 5, 10)
PRECISION_KS = (1, 5, 10, 100)
CURVE_KS = (1, 2, 3, 5, 10, 20, 50, 100)
CHUNK = 1024  # queries whose similarities are in memory at once


class Pairs(NamedTuple):
    """Row i of both sides belongs to one sample; the inner product of rows is their similarity."""

    images: Tensor  # [n, D]
    texts: Tensor  # [n, D]
    groups: np.ndarray  # int64 [n], equal where the texts are duplicates
    patients: np.ndarray  # [n]
    labels: np.ndarray  # [n, L], 1 where a class is present
    classes: tuple[str, ...] = ()  # names of the L labels, where figures are to name them

    def take(self, places: np.ndarray) -> "Pairs":
        """The samples at these places, in this order."""
        rows = torch.from_numpy(places)
        images, texts = self.images[rows], self.texts[rows]
        return Pairs(images, texts, self.groups[places], self.patients[places], self.labels[places], self.classes)


class Search(NamedTuple):
    """Queries against candidates; a candidate is right if its group is the query's."""

    queries: Tensor  # [Q, D]
    candidates: Tensor  # [K, D]
    query_groups: Tensor  # [Q]
    candidate_groups: Tensor  # [K]
    asked_by: np.ndarray  # [n]: the query that each sample asks


def score_pairs(pairs: Pairs, ties: Ties = "against") -> tuple[Figures, dict[str, Any]]:
    """R@k and P@k in both directions with intervals by patient, chance and blind levels; and curves of R@k over k.

    ties: which of equally similar candidates R@k puts first, see positive_ranks; P@k always goes by index.
    """
    figures: Figures = {}
    curves: dict[str, Any] = {}
    for direction, search in _searches(pairs).items():
        recalls, curve = _recalls(search, pairs.patients, ties)
        figures |= {f"{direction}_{name}": value for name, value in recalls.items()}
        curves[direction] = curve
        sides = (pairs.images, pairs.texts) if direction == "image_to_text" else (pairs.texts, pairs.images)
        precisions = _precisions(*sides, pairs)
        figures |= {f"{direction}_{name}": value for name, value in precisions.items()}
    return figures, curves


def balanced_places(keys: Sequence[str], labels: np.ndarray, classes: Sequence[str], per_class: int) -> np.ndarray:
    """Places of per_class samples of each class that have this one of the classes [n, L] and no other, as in CheXpert 5x200.

    The first in order of keys: they are hashes, so this is a draw, and the same one however the shards were written. A
    label that is uncertain, or not given, is none. Raises ValueError where a class has too few, naming how many.
    """
    present = labels == 1
    alone = present & (present.sum(axis=1, keepdims=True) == 1)
    counts = dict(zip(classes, alone.sum(axis=0).tolist(), strict=True))
    if short := {name: count for name, count in counts.items() if count < per_class}:
        found = ", ".join(f"{name} {count}" for name, count in short.items())
        raise ValueError(
            f"--per-class {per_class}: too few studies have one of the classes and no other: {found}; lower it, or name other "
            "--classes"
        )
    order = np.argsort(np.array(keys), kind="stable")
    chosen = [order[alone[order, column]][:per_class] for column in range(len(classes))]
    return np.sort(np.concatenate(chosen))


def _searches(pairs: Pairs) -> dict[str, Search]:
    """Each distinct text is one candidate for an image, and one query that has several right images."""
    _, first, groups = np.unique(pairs.groups, return_index=True, return_inverse=True)
    distinct, names = pairs.texts[torch.from_numpy(first)], torch.arange(len(first))
    of_image = torch.from_numpy(groups)
    return {
        "image_to_text": Search(pairs.images, distinct, of_image, names, np.arange(len(groups))),
        "text_to_image": Search(distinct, pairs.images, names, of_image, groups),
    }


def _recalls(search: Search, patients: np.ndarray, ties: Ties) -> tuple[Figures, dict[str, Any]]:
    ranks = _ranks(search, ties).numpy()
    right = search.candidate_groups.bincount()[search.query_groups].numpy()
    asked, candidates, n = search.query_groups.numpy(), len(search.candidates), len(ranks)
    # a text that several samples share is one query: in a draw of patients it weighs by the mean over its samples
    share = 1 / np.bincount(search.asked_by)[search.asked_by]
    hits = ranks[search.asked_by, None] < np.array(KS)
    statistic = mean_statistic(hits.astype(float), share)
    low, high = bootstrap_by_patient(statistic, patients)
    figures: Figures = {}
    for i, k in enumerate(KS):
        figures[f"R@{k}"] = figure((ranks < k).mean(), low[i], high[i], n=n)
        figures[f"chance_R@{k}"] = figure(chance_recall_at_k(right, candidates, k), n=n)
        figures[f"blind_R@{k}"] = figure(blind_recall_at_k(asked, k), n=n)
    ks = [k for k in CURVE_KS if k <= candidates]
    curve = {
        "recall": [(ranks < k).mean() for k in ks],
        "chance": [chance_recall_at_k(right, candidates, k) for k in ks],
    }
    return figures, {"k": ks, **{name: [round(float(v), 6) for v in values] for name, values in curve.items()}}


def _ranks(search: Search, ties: Ties) -> Tensor:
    parts = [
        positive_ranks(rows.double() @ search.candidates.double().T, groups, search.candidate_groups, ties=ties)
        for rows, groups in zip(search.queries.split(CHUNK), search.query_groups.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def _precisions(queries: Tensor, candidates: Tensor, pairs: Pairs) -> Figures:
    """P@k: of the k samples found, the share with a class that the query has; mean over its queries, then over classes.

    Every sample is a query and a candidate: duplicate texts stay separate, under either protocol. Chance is the mean
    share of samples that have a class; a blind answer, the same for every query, does best with the samples that have
    the most classes.
    """
    present, n = torch.from_numpy(pairs.labels == 1), len(pairs.labels)
    if not present.any():
        return {}
    prevalence = present.double().mean(dim=0).numpy()
    chance, classes = float(prevalence[prevalence > 0].mean()), int((prevalence > 0).sum())
    most_classes = np.sort(present.sum(dim=1).numpy())[::-1] / classes
    figures: Figures = {}
    for k in (k for k in PRECISION_KS if k <= len(candidates)):
        shares = torch.cat(
            [
                precision_at_k(rows.double() @ candidates.double().T, asked, present, k=k)
                for rows, asked in zip(queries.split(CHUNK), present.split(CHUNK), strict=True)
            ]
        )
        by_class = mean_statistic(shares.numpy())
        low, high = bootstrap_by_patient(lambda weights, by_class=by_class: nan_mean(by_class(weights)), pairs.patients)
        values = by_class(np.ones(n))
        named = {"by_class": dict(zip(pairs.classes, values.round(6).tolist(), strict=True))} if pairs.classes else {}
        figures[f"P@{k}"] = figure(nan_mean(values), float(low), float(high), n=n, classes=classes, **named)
        figures[f"chance_P@{k}"] = figure(chance, n=n, classes=classes)
        figures[f"blind_P@{k}"] = figure(float(most_classes[:k].mean()), n=n, classes=classes)
    return figures

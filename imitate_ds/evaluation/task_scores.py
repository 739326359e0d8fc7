"""What a model answers for every sample of a labelled split, and what that is worth.

Answers, one row a sample, in the order of the split:
  classification  [n, L]        the probability of each label
  segmentation    [n, M, 3]     of each mask at 0.5, in pixels: in both, predicted, true; NaN where nobody has drawn it
  detection       [n, MOST, 6]  x1 y1 x2 y2 in pixels of the stored square, score (0: none), label
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imitate_ds.batch import IGNORED, LabeledBatch
from imitate_ds.data.labeled import Annotations, LabeledSplit
from imitate_ds.distributed import gather_rows, training_device
from imitate_ds.evaluation.detection_ap import THRESHOLDS, average_precisions_statistic
from imitate_ds.evaluation.validation import first_of_each, key_numbers
from imitate_ds.flight import flight
from imitate_ds.metrics import (
    Figures,
    auroc_statistic,
    average_precision_statistic,
    bootstrap_by_patient,
    figure,
    mean_statistic,
    nan_mean,
)

MOST = 100  # detections of an image that are kept, as COCO does
SURE = 0.5  # a pixel of a mask, or a label, is there from this probability on; it is never chosen on what is scored


@torch.no_grad()
def answers_of(
    forward: Callable[[LabeledBatch], Any],
    predict: Callable[[Any], Any],
    split: LabeledSplit,
    batches: Iterable[LabeledBatch],
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Answers for a split, shared out over the ranks as build_scoring_loader does; the same for any number. A collective.

    None where `stop`, asked after every batch, and which must answer alike on all ranks, says True.
    """
    device, keys, rows = training_device(), [], []
    for batch in batches:
        there = batch.to(device)
        answered = _rows(predict(forward(there)), there, split)
        flight.begin("scoring")  # a sign of life: one process alone meets nobody who would see that it goes on
        keys.append(gather_rows(key_numbers(batch.keys).to(device)).cpu())
        rows.append(gather_rows(answered).cpu())
        if stop():
            return None
    numbers, table = torch.cat(keys), torch.cat(rows)
    first = first_of_each(numbers)  # repeats fill up the last rank's batches
    wanted = torch.searchsorted(numbers[first], key_numbers(split.keys))
    return table[first][wanted].numpy()


def _rows(answer: Any, batch: LabeledBatch, split: LabeledSplit) -> Tensor:
    if isinstance(answer, list):
        scale = split.index.image_size / batch.images.shape[-1]
        return torch.stack([_padded(found, scale) for found in answer])
    if answer.ndim == 2:
        return answer.double()
    known, true, said = batch.masks != IGNORED, batch.masks == 1, answer >= SURE
    said = said & known
    counts = torch.stack([(said & true).sum((2, 3)), said.sum((2, 3)), true.sum((2, 3))], dim=2).double()
    return counts.masked_fill(~known.any(dim=(2, 3))[..., None], torch.nan)


def _padded(found: Any, scale: float) -> Tensor:
    rows = torch.cat([found.boxes * scale, found.scores[:, None], found.labels[:, None].float()], dim=1)
    rows = rows[rows[:, 4].argsort(descending=True, stable=True)][:MOST].double()
    return torch.cat([rows, rows.new_zeros(MOST - len(rows), 6)])


class Measure(NamedTuple):
    """Figures by name, of which a statistic gives all values at once; what is to be said beside each."""

    names: list[str]
    statistic: Callable[[np.ndarray], np.ndarray]
    beside: list[dict[str, Any]]


def measure(
    kind: str, known: Annotations, answers: np.ndarray, *, exclusive: bool = False, reference: int = 0
) -> Measure:
    """How a task is measured.

    reference: as papers did, in batches of so many: the Dice of a split is the mean of batch means, and for boxes images
    without box or without detection are left out. 0: every sample counts, and the same.
    """
    if kind == "classification":
        return _labels(known, answers, exclusive)
    if kind == "segmentation":
        return _dice(known, answers, reference)
    return _boxes(known, answers, skips=bool(reference))


def figures_of(measured: Measure, known: Annotations, *, draws: int) -> Figures:
    """Values, and with draws > 0 their 95 % intervals by patient."""
    values = measured.statistic(np.ones(len(known)))
    low = high = np.full(len(values), np.nan)
    if draws:
        low, high = bootstrap_by_patient(_going_on(measured.statistic), known.patients, draws)
    rows = zip(measured.names, values, low, high, measured.beside, strict=True)
    return {name: figure(value, lowest, highest, **beside) for name, value, lowest, highest, beside in rows}


def _going_on(statistic: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The same, with a sign of life for each draw: of many images a bootstrap takes minutes."""

    def one(weights: np.ndarray) -> np.ndarray:
        flight.begin("intervals")
        return statistic(weights)

    return one


def dice_scores(counts: np.ndarray) -> np.ndarray:
    """Dice [n, M] of answers [n, M, 3]; where a mask is empty, 1 for an empty prediction and 0 for any other."""
    common, said, true = np.moveaxis(counts, 2, 0)
    with np.errstate(invalid="ignore"):
        return np.where(said + true == 0, 1.0, 2 * common / np.where(said + true == 0, 1, said + true))


def detections_of(answers: np.ndarray) -> list[np.ndarray]:
    """Of each image [k, 6] without what fills up."""
    return [rows[rows[:, 4] > 0] for rows in answers]


def _labels(known: Annotations, scores: np.ndarray, exclusive: bool) -> Measure:
    labels, count = known.labels, len(known.targets)
    single = [i for i in range(count) if not ((labels[:, i] == 0).any() and (labels[:, i] == 1).any())]
    kinds = {"auroc": auroc_statistic, "ap": average_precision_statistic}
    columns = {kind: [make(labels[:, i], scores[:, i]) for i in range(count)] for kind, make in kinds.items()}
    right = mean_statistic((labels.argmax(axis=1) == scores.argmax(axis=1)).astype(float))
    sizes = [{"n": int((labels[:, i] >= 0).sum()), "positives": int((labels[:, i] == 1).sum())} for i in range(count)]
    macro = {"n": len(known), "labels": count - len(single), "not_defined": [known.targets[i] for i in single]}

    def statistic(weights: np.ndarray) -> np.ndarray:
        values = []
        for kind in kinds:
            each = np.array([np.nan if i in single else column(weights) for i, column in enumerate(columns[kind])])
            values += [nan_mean(each), *each]
        return np.array([*values, *(right(weights) if exclusive else [])], dtype=np.float64)

    names = [name for kind in kinds for name in (f"{kind}_macro", *(f"{kind}/{target}" for target in known.targets))]
    beside = [*([macro, *sizes] * len(kinds))]
    return Measure(names + ["accuracy"] * exclusive, statistic, beside + [{"n": len(known)}] * exclusive)


def _dice(known: Annotations, counts: np.ndarray, batch: int) -> Measure:
    scores = dice_scores(counts)
    base = None
    if batch:
        numbers = np.arange(len(scores)) // batch
        base = 1.0 / np.bincount(numbers)[numbers]
    means = mean_statistic(scores, base)
    drawn = (~np.isnan(scores)).sum(axis=0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        each = np.asarray(means(weights))
        return np.array([nan_mean(each), *each])

    undefined = [name for name, n in zip(known.targets, drawn, strict=True) if not n]
    macro = {"n": len(known), "labels": len(known.targets) - len(undefined), "not_defined": undefined}
    names = ["dice_macro", *(f"dice/{name}" for name in known.targets)]
    empty = [int((counts[:, i, 2] == 0).sum()) for i in range(len(known.targets))]
    each = [{"n": int(n), "empty": e} for n, e in zip(drawn, empty, strict=True)]
    return Measure(names, statistic, [macro, *each])


def _boxes(known: Annotations, answers: np.ndarray, *, skips: bool) -> Measure:
    found = detections_of(answers)
    classes = len(known.targets)
    precisions = average_precisions_statistic(found, known.boxes, known.box_labels, classes=classes)
    counted = np.array(
        [bool(len(boxes) and len(rows)) or not skips for boxes, rows in zip(known.boxes, found, strict=True)]
    )
    half = THRESHOLDS.index(0.5)

    def statistic(weights: np.ndarray) -> np.ndarray:
        table = precisions(weights * counted)
        each, at_half = table.mean(axis=1), table[:, half]
        return np.array([nan_mean(each), *each, nan_mean(at_half), *at_half])

    there = [int(sum((labels == i).sum() for labels in known.box_labels)) for i in range(classes)]
    undefined = [name for name, boxes in zip(known.targets, there, strict=True) if not boxes]
    macro = {"n": int(counted.sum()), "labels": classes - len(undefined), "not_defined": undefined}
    names = [
        name for kind in ("ap", "ap50") for name in (f"{kind}_macro", *(f"{kind}/{target}" for target in known.targets))
    ]
    each = [{"n": int(counted.sum()), "boxes": boxes} for boxes in there]
    return Measure(names, statistic, [macro, *each] * 2)

"""Average precision of boxes as COCO computes it, as a function of one weight per image.

"Microsoft COCO: Common Objects in Context" (Lin et al., 2014) and its program: a detection is right if it overlaps a box of its
class that no surer one has taken; precision is read at 101 recalls. Images without boxes and images without detections count.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import from_numpy
from torchvision.ops import box_iou

THRESHOLDS = tuple(np.round(np.arange(0.40, 0.751, 0.05), 2).tolist())  # of IoU, as the RSNA challenge and MGCA
RECALLS = np.linspace(0, 1, 101)
TINY = np.spacing(1)


def average_precisions_statistic(
    found: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    box_labels: Sequence[np.ndarray],
    *,
    classes: int,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Callable[[np.ndarray], np.ndarray]:
    """Weights [n] of the images -> AP [classes, thresholds]; NaN for a class without boxes among what has weight.

    found: of each image [k, 6], x1 y1 x2 y2 score label; boxes [b, 4] and box_labels [b] what is there.
    """
    curves = [_curve_of_class(found, boxes, box_labels, label, thresholds) for label in range(classes)]

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.stack([curve(weights).mean(axis=1) for curve in curves])

    return statistic


def precision_curves(
    found: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    box_labels: Sequence[np.ndarray],
    *,
    classes: int,
    threshold: float = 0.5,
) -> np.ndarray:
    """Precision [classes, 101] at RECALLS, whose means are the AP at one IoU; NaN for a class without boxes."""
    ones = np.ones(len(found))
    curves = [_curve_of_class(found, boxes, box_labels, label, [threshold]) for label in range(classes)]
    return np.stack([curve(ones)[0] for curve in curves])


def count_wrong_boxes(
    found: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    box_labels: Sequence[np.ndarray],
    *,
    classes: int,
    threshold: float = 0.5,
    score: float = 0.5,
) -> np.ndarray:
    """Of each image, int64 [n], how many boxes were missed and how many detections of a score from `score` on are wrong."""
    wrong = np.zeros(len(found), np.int64)
    for image, (each, true, labels) in enumerate(zip(found, boxes, box_labels, strict=True)):
        for label in range(classes):
            mine, there = _surest_first(each[each[:, 4] >= score], label), true[labels == label]
            right = int(_hits(mine[:, :4], there, [threshold]).sum())
            wrong[image] += len(mine) + len(there) - 2 * right
    return wrong


def _surest_first(found: np.ndarray, label: int) -> np.ndarray:
    mine = found[found[:, 5] == label]
    return mine[np.argsort(-mine[:, 4], kind="stable")]


def _curve_of_class(
    found: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    box_labels: Sequence[np.ndarray],
    label: int,
    thresholds: Sequence[float],
) -> Callable[[np.ndarray], np.ndarray]:
    """Weights [n] of the images -> precision [thresholds, 101] at RECALLS, 0 at those not reached."""
    scores, images, hits = [], [], []
    there = np.array([(labels == label).sum() for labels in box_labels])
    for image, (each, true, labels) in enumerate(zip(found, boxes, box_labels, strict=True)):
        mine = _surest_first(each, label)
        scores.append(mine[:, 4])
        images.append(np.full(len(mine), image))
        hits.append(_hits(mine[:, :4], true[labels == label], thresholds))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    image_of, hit = np.concatenate(images)[order], np.concatenate(hits)[order]

    def curve(weights: np.ndarray) -> np.ndarray:
        total, here = float(there @ weights), weights[image_of][:, None].astype(np.float64)
        if not total:
            return np.full((len(thresholds), len(RECALLS)), np.nan)
        right, wrong = np.cumsum(hit * here, axis=0), np.cumsum(~hit * here, axis=0)
        precision = right / np.maximum(right + wrong, TINY)
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        return np.stack([_read_at_recalls(right[:, t] / total, precision[:, t]) for t in range(len(thresholds))])

    return curve


def _read_at_recalls(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    return np.append(precision, 0.0)[np.searchsorted(recall, RECALLS, side="left")]


def _hits(detections: np.ndarray, boxes: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """bool [k, thresholds]: detections, the surest first, each against the best box that is still free."""
    hits = np.zeros((len(detections), len(thresholds)), bool)
    if not len(detections) or not len(boxes):
        return hits
    overlap = box_iou(from_numpy(detections.astype(np.float64)), from_numpy(boxes.astype(np.float64))).numpy()
    for t, threshold in enumerate(thresholds):
        free = np.ones(len(boxes), bool)
        for k, row in enumerate(overlap):
            best = np.where(free, row, -1.0)
            box = int(best.argmax())
            if best[box] >= threshold:
                hits[k, t], free[box] = True, False
    return hits

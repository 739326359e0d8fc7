"""Average precision of boxes against the program that COCO's is measured with, and its weights against repeated images."""

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from imitate_ds.evaluation.detection_ap import THRESHOLDS, average_precisions_statistic

CLASSES = 3


def random_case(seed: int, images: int = 12):
    """Boxes, and detections that are some of them shaken, some of them made up, with scores that repeat."""
    rng = np.random.default_rng(seed)
    found, boxes, labels = [], [], []
    for _ in range(images):
        count = rng.integers(0, 4)
        corner, size = rng.uniform(0, 60, (count, 2)), rng.uniform(14, 30, (count, 2))
        true = np.c_[corner, corner + size]
        label = rng.integers(0, CLASSES - 1, count)  # of the last class there is nothing
        # less than half a side: COCO's program passes over boxes that are turned inside out
        shaken = np.repeat(true, 2, axis=0) + rng.uniform(-6, 6, (2 * count, 4))
        extra = rng.uniform(0, 60, (rng.integers(0, 4), 2))
        rows = np.r_[shaken, np.c_[extra, extra + 15]]
        guess = np.r_[np.repeat(label, 2), rng.integers(0, CLASSES, len(extra))]
        guess = np.where(rng.uniform(size=len(guess)) < 0.15, rng.integers(0, CLASSES, len(guess)), guess)
        found.append(np.c_[rows, rng.uniform(0.05, 1, len(rows)), guess])
        boxes.append(true)
        labels.append(label)
    return found, boxes, labels


def by_coco(found, boxes, labels) -> np.ndarray:
    """AP [classes, thresholds] as faster-coco-eval computes it."""
    table = np.full((CLASSES, len(THRESHOLDS)), np.nan)
    recalls = np.linspace(0, 1, 101).tolist()  # torchmetrics takes float32 ones, and so reads some a step further on
    for t, threshold in enumerate(THRESHOLDS):
        metric = MeanAveragePrecision(
            "xyxy", "bbox", [threshold], recalls, class_metrics=True, backend="faster_coco_eval"
        )
        said = [
            {
                "boxes": torch.tensor(rows[:, :4]).float().reshape(-1, 4),
                "scores": torch.tensor(rows[:, 4]).float(),
                "labels": torch.tensor(rows[:, 5]).long(),
            }
            for rows in found
        ]
        true = [
            {"boxes": torch.tensor(box).float().reshape(-1, 4), "labels": torch.tensor(label).long()}
            for box, label in zip(boxes, labels, strict=True)
        ]
        metric.update(said, true)
        result = metric.compute()
        for label, value in zip(result["classes"].reshape(-1), result["map_per_class"].reshape(-1), strict=True):
            table[int(label), t] = float(value) if value >= 0 else np.nan
    return table


@pytest.mark.parametrize("seed", range(4))
def test_equals_coco(seed):
    case = random_case(seed)
    ours = average_precisions_statistic(*case, classes=CLASSES)(np.ones(len(case[0])))
    np.testing.assert_allclose(ours, by_coco(*case), atol=1e-6)
    assert np.isnan(ours[CLASSES - 1]).all()


def test_a_weight_is_a_repetition():
    found, boxes, labels = random_case(9)
    weights = np.random.default_rng(0).integers(0, 4, len(found))
    ours = average_precisions_statistic(found, boxes, labels, classes=CLASSES)(weights)
    repeated = [[part[i] for i in np.repeat(np.arange(len(found)), weights)] for part in (found, boxes, labels)]
    again = average_precisions_statistic(*repeated, classes=CLASSES)(np.ones(weights.sum()))
    np.testing.assert_allclose(ours, again, atol=1e-12)


def test_an_image_without_boxes_counts_against():
    box = np.array([[10.0, 10, 30, 30]])
    right, wrong = np.array([[10.0, 10, 30, 30, 0.6, 0]]), np.array([[0.0, 0, 9, 9, 0.9, 0]])
    nothing, none = np.zeros((0, 4)), np.zeros(0, int)
    alone = average_precisions_statistic([right], [box], [np.array([0])], classes=1)(np.ones(1))
    beside = average_precisions_statistic([right, wrong], [box, nothing], [np.array([0]), none], classes=1)(np.ones(2))
    assert alone.mean() == 1
    assert beside.mean() == pytest.approx(0.5)

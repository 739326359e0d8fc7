"""What answers are worth: by scikit-learn, by hand, with empty masks, one-valued labels, and both protocols."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from imitate_ds.data.labeled import open_labeled
from imitate_ds.data.shards import load_index
from imitate_ds.evaluation.task_scores import MOST, dice_scores, figures_of, measure
from imitate_ds.finetune_config import LabeledDataConfig, TaskConfig


@pytest.fixture(scope="module")
def split(phantom_shards):
    """120 samples to hang labels, masks and boxes on."""
    task = TaskConfig(kind="classification", targets=("effusion", "cardiomegaly", "nodule"))
    return open_labeled(load_index(phantom_shards), "train", task, LabeledDataConfig(shards="unused"))


def values(kind, split, answers, **settings):
    return {
        name: f["value"] for name, f in figures_of(measure(kind, split, answers, **settings), split, draws=0).items()
    }


def test_labels_by_scikit_learn_and_what_has_one_value_is_counted_out(split):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (len(split), 3)).astype(np.int8)
    labels[:, 2] = np.where(labels[:, 2] == 1, 0, labels[:, 2])
    scores = rng.uniform(size=labels.shape).round(1)
    marked = replace(split, labels=labels)
    figures = figures_of(measure("classification", marked, scores), marked, draws=50)
    for kind, oracle in (("auroc", roc_auc_score), ("ap", average_precision_score)):
        each = []
        for i, name in enumerate(split.targets[:2]):
            known = labels[:, i] >= 0
            each.append(oracle(labels[known, i], scores[known, i]))
            assert figures[f"{kind}/{name}"]["value"] == pytest.approx(each[-1], abs=1e-6)
        assert figures[f"{kind}/{split.targets[2]}"]["value"] is None
        macro = figures[f"{kind}_macro"]
        assert macro["value"] == pytest.approx(np.mean(each), abs=1e-6)
        assert macro["not_defined"] == [split.targets[2]]
        assert macro["low"] < macro["value"] < macro["high"]
    assert "accuracy" not in figures


def test_accuracy_of_exclusive_classes(split):
    classes = np.arange(len(split)) % 3
    scores = np.eye(3)[np.where(np.arange(len(split)) < 12, (classes + 1) % 3, classes)]
    marked = replace(split, labels=np.eye(3, dtype=np.int8)[classes])
    assert values("classification", marked, scores, exclusive=True)["accuracy"] == pytest.approx(
        1 - 12 / len(split), abs=1e-6
    )


def test_dice_where_masks_are_empty_or_nobody_has_drawn_them():
    counts = np.array([[[5, 10, 10]], [[0, 0, 0]], [[0, 3, 0]], [[0, 0, 3]], [[np.nan] * 3]])
    np.testing.assert_array_equal(dice_scores(counts)[:, 0], [0.5, 1, 0, 0, np.nan])


def test_dice_of_papers_is_the_mean_of_batch_means(split):
    part = split._take(list(range(5)))
    masked = replace(part, masks=("m",), targets=("m",))
    counts = np.array([[[10, 10, 10]], [[0, 5, 5]], [[5, 10, 10]], [[5, 10, 10]], [[10, 10, 10]]], dtype=float)
    each = np.array([1, 0, 0.5, 0.5, 1])
    assert values("segmentation", masked, counts)["dice/m"] == pytest.approx(each.mean())
    by_batch = np.mean([each[:2].mean(), each[2:4].mean(), each[4:].mean()])
    assert values("segmentation", masked, counts, reference=2)["dice/m"] == pytest.approx(by_batch, abs=1e-6)


def test_images_without_boxes_count_but_not_as_papers_did(split):
    """The toy case of which papers say 1.00: a right box, and three images in which nothing is, each with a surer wrong box."""
    part = replace(split._take(list(range(4))), targets=("x",))
    box = np.array([[10, 10, 30, 30]], np.float32)
    boxed = replace(
        part,
        boxes=[box, *[np.zeros((0, 4), np.float32)] * 3],
        box_labels=[np.array([0]), *[np.zeros(0, np.int64)] * 3],
    )
    answers = np.zeros((4, MOST, 6))
    answers[:, 0] = [10, 10, 30, 30, 0.9, 0]
    answers[0, 0, 4] = 0.5
    assert values("detection", boxed, answers)["ap/x"] == pytest.approx(0.25, abs=1e-6)
    assert values("detection", boxed, answers, reference=4)["ap/x"] == pytest.approx(1)

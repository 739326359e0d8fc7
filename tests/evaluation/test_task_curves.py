"""Curves against scikit-learn and by hand, and which samples are the worst."""

import json

import numpy as np
import pytest
from sklearn.calibration import calibration_curve as reliability
from sklearn.metrics import confusion_matrix, precision_recall_curve

from imitate_ds.data.labeled import Annotations
from imitate_ds.evaluation.detection_ap import average_precisions_statistic
from imitate_ds.evaluation.task_curves import calibration_curve, task_curves, worst_samples
from imitate_ds.evaluation.task_scores import MOST

NO_BOXES = np.zeros((0, 4), np.float32)


def annotations(targets, n, *, labels=None, boxes=None, box_labels=None):
    return Annotations(
        targets=targets,
        keys=[f"{i:016x}" for i in range(n)],
        patients=np.arange(n),
        labels=np.zeros((n, 0), np.int8) if labels is None else labels,
        boxes=boxes or [NO_BOXES] * n,
        box_labels=box_labels or [np.zeros(0, np.int64)] * n,
    )


@pytest.fixture
def labelled():
    """200 samples of three labels: scores with ties; the last label is nowhere; -1 does not count."""
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 2, (200, 3)).astype(np.int8)
    labels[:, 2] = np.minimum(labels[:, 2], 0)
    scores = np.clip(rng.uniform(size=labels.shape) + 0.2 * labels, 0, 1).round(2)
    return annotations(("a", "b", "c"), 200, labels=labels), scores


def test_precision_and_recall_are_scikit_learns(labelled):
    known, scores = labelled
    curves = task_curves("classification", known, scores)
    for i, name in enumerate("ab"):
        says = known.labels[:, i] >= 0
        precision, recall, _ = precision_recall_curve(known.labels[says, i], scores[says, i])
        precision, recall = precision[:-1], recall[:-1]  # the last point is made up
        grid = np.linspace(0, 1, 101)
        expected = [precision[np.flatnonzero(recall >= step - 1e-9)[-1]] for step in grid]
        np.testing.assert_allclose(curves[f"pr/{name}"]["recall"], grid, atol=1e-9)
        np.testing.assert_allclose(curves[f"pr/{name}"]["precision"], expected, atol=1e-4)
    assert "pr/c" not in curves
    assert "roc/c" not in curves


def test_calibration_is_scikit_learns_and_its_error_by_hand(labelled):
    known, scores = labelled
    curves = task_curves("classification", known, scores)
    for i, name in enumerate("abc"):
        says = known.labels[:, i] >= 0
        curve = curves[f"calibration/{name}"]
        observed, predicted = reliability(known.labels[says, i], scores[says, i], n_bins=10)
        np.testing.assert_allclose(curve["observed"], observed, atol=1e-4)
        np.testing.assert_allclose(curve["predicted"], predicted, atol=1e-4)
        assert sum(curve["counts"]) == says.sum()
    by_hand = calibration_curve(np.array([1, 1, 0, 0]), np.array([0.9, 1.0, 0.25, 0.05]))
    assert by_hand["counts"] == [1, 1, 1, 1]
    assert by_hand["ece"] == pytest.approx((0.1 + 0 + 0.25 + 0.05) / 4)


def test_errors_by_kind_are_scikit_learns(labelled):
    known, scores = labelled
    curves = task_curves("classification", known, scores)
    for i, name in enumerate("abc"):
        says = known.labels[:, i] >= 0
        expected = confusion_matrix(known.labels[says, i], scores[says, i] >= 0.5, labels=[0, 1])
        assert curves[f"confusion/{name}"]["counts"] == expected.tolist()
    classes = np.arange(200) % 3
    one_of = annotations(known.targets, 200, labels=np.eye(3, dtype=np.int8)[classes])
    curves = task_curves("classification", one_of, scores, exclusive=True)
    assert curves["confusion"]["counts"] == confusion_matrix(classes, scores.argmax(axis=1)).tolist()
    assert not any(name.startswith("confusion/") for name in curves)


def test_dice_is_counted_image_by_image():
    counts = np.array([[[5, 10, 10]], [[0, 0, 0]], [[0, 3, 0]], [[9, 10, 10]], [[np.nan] * 3]])
    curve = task_curves("segmentation", annotations(("lungs",), 5), counts)["dice/lungs"]
    there = {round(edge, 2): n for edge, n in zip(curve["edges"], curve["counts"], strict=False) if n}
    assert there == {0.0: 1, 0.5: 1, 0.9: 1, 0.95: 1}
    assert curve["quartiles"] == pytest.approx([0.375, 0.7, 0.925])
    assert list(task_curves("segmentation", annotations(("lungs",), 1), counts[4:])) == []


def detections(*images):
    answers = np.zeros((len(images), MOST, 6))
    for rows, found in zip(answers, images, strict=True):
        rows[: len(found)] = np.array(found).reshape(-1, 6)
    return answers


BOX = [10, 10, 30, 30]
AWAY = [40, 40, 60, 60]


@pytest.fixture
def boxed():
    """Right; missed; nothing there and nothing said; a wrong box, an unsure one, and one of another class."""
    box, one = np.array([BOX], np.float32), np.array([0])
    known = annotations(
        ("x", "y", "z"),
        4,
        boxes=[box, box, NO_BOXES, box],
        box_labels=[one, one, np.zeros(0, int), one],
    )
    answers = detections([[*BOX, 0.9, 0]], [], [], [[*AWAY, 0.95, 0], [*AWAY, 0.4, 0], [*BOX, 0.8, 1]])
    return known, answers


def test_the_mean_of_the_drawn_precision_is_the_ap(boxed):
    known, answers = boxed
    curves = task_curves("detection", known, answers)
    assert list(curves) == ["pr/x"]
    found = [rows[rows[:, 4] > 0] for rows in answers]
    ap = average_precisions_statistic(found, known.boxes, known.box_labels, classes=3, thresholds=[0.5])(np.ones(4))
    assert np.mean(curves["pr/x"]["precision"]) == pytest.approx(ap[0, 0], abs=1e-4)
    assert ap[0, 0] == pytest.approx(0.5 * 34 / 101)  # the surest is wrong; recall ends at one third


def test_the_worst_by_boxes_have_most_of_them_wrong(boxed):
    known, answers = boxed
    worst = worst_samples("detection", known, answers)
    assert worst.keys == [known.keys[i] for i in (3, 1, 0, 2)]
    assert worst.values == [3, 1, 0, 0]  # missed, and two false ones: the unsure one does not count


def test_the_worst_by_loss_and_by_dice():
    labels = np.array([[1, 0], [1, -1], [-1, -1], [0, 0]], np.int8)
    scores = np.array([[0.9, 0.1], [0.2, 0.99], [0.5, 0.5], [0.0, 1.0]])
    known = annotations(("a", "b"), 4, labels=labels)
    worst = worst_samples("classification", known, scores)
    assert worst.keys == [known.keys[i] for i in (3, 1, 0)]  # nobody says anything about the third
    assert worst.values[1:] == pytest.approx([-np.log(0.2), -np.log(0.9)], abs=1e-6)
    one_of = annotations(("a", "b"), 2, labels=np.array([[1, 0], [0, 1]], np.int8))
    worst = worst_samples("classification", one_of, np.array([[0.7, 0.3], [0.6, 0.4]]), exclusive=True)
    assert worst.values == pytest.approx([-np.log(0.4), -np.log(0.7)], abs=1e-6)
    counts = np.array([[[10, 10, 10], [5, 10, 10]], [[np.nan] * 3, [2, 10, 10]]])
    worst = worst_samples("segmentation", annotations(("a", "b"), 2), counts, most=1)
    assert (worst.keys, worst.values) == (["0000000000000001"], [0.2])


def test_all_of_it_is_plain(labelled, boxed):
    for kind, given in (("classification", labelled), ("detection", boxed)):
        json.dumps(task_curves(kind, *given), allow_nan=False)
        json.dumps(worst_samples(kind, *given)._asdict(), allow_nan=False)

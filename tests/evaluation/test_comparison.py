"""Two runs compared: figures as they were reported, the same patients drawn for both, and refusals that name the difference."""

import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from imitate_ds import cli
from imitate_ds.data.labeled import Annotations
from imitate_ds.evaluate import evaluate_compare
from imitate_ds.evaluation.predictions import read_predictions, write_predictions
from imitate_ds.evaluation.report import write_result
from imitate_ds.evaluation.task_scores import MOST, figures_of, measure

N, TARGETS = 120, ("a", "b")


def annotations(kind, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 2, (N, 2)) if kind == "classification" else np.zeros((N, 0))
    counts = rng.integers(0, 3, N) if kind == "detection" else np.zeros(N, int)
    corners = [rng.integers(0, 30, (n, 2)).astype(np.float32) for n in counts]
    return Annotations(
        targets=TARGETS,
        keys=[f"{(i * 7919) % 65536:016x}" for i in range(N)],  # not in order
        patients=np.array([f"{i // 2:04x}" for i in range(N)]),
        labels=labels.astype(np.int8),
        boxes=[np.c_[corner, corner + 20] for corner in corners],
        box_labels=[rng.integers(0, 2, n) for n in counts],
    )


def answers(kind, known, shift, seed=1):
    """The larger the shift, the better."""
    rng = np.random.default_rng(seed)
    if kind == "classification":
        return 1 / (1 + np.exp(-rng.normal(size=(N, 2)) - shift * known.labels))
    if kind == "segmentation":
        true = rng.integers(0, 60, (N, 2))
        common = np.minimum(true, (true * (0.3 + 0.2 * shift + 0.2 * rng.uniform(size=(N, 2)))).astype(int))
        counts = np.stack([common, common + 20 * (true > 0), true], axis=2).astype(float)
        counts[:9, 1] = np.nan
        return counts
    found = np.zeros((N, MOST, 6))
    for rows, boxes, labels in zip(found, known.boxes, known.box_labels, strict=True):
        for row, box, label in zip(rows, boxes, labels, strict=False):
            row[:] = [*(box + rng.normal(size=4) * 3 / (1 + shift)), rng.uniform(0.1, 1), label]
        rows[len(boxes)] = [1, 1, 9, 9, rng.uniform(0.1, 0.5), 0]
    return found


def write_run(folder, kind, known, given, *, exclusive=False, targets=None):
    folder.mkdir()
    write_predictions(folder / "predictions.test.parquet", kind, known, given)
    data = {"source": "phantom", "synthetic": True, "split": "test", "samples": N, "patients": N // 2}
    settings = {"targets": list(targets or known.targets), "step": 7, "run": {"task": {"exclusive": exclusive}}}
    metrics = figures_of(measure(kind, known, given, exclusive=exclusive), known, draws=0)
    result = {"task": kind, "protocol": "strict", "model": {}, "data": data, "settings": settings, "metrics": metrics}
    write_result(folder, result | {"curves": {}})
    return folder


@pytest.mark.parametrize("kind", ["classification", "segmentation", "detection"])
def test_the_table_gives_back_what_was_scored(tmp_path, kind):
    known = annotations(kind)
    given = answers(kind, known, 1)
    write_predictions(tmp_path / "p", kind, known, given)
    back, answered = read_predictions(tmp_path / "p", kind, TARGETS)
    order = np.argsort(known.keys)
    assert back.keys == sorted(known.keys)
    assert back.patients.tolist() == known.patients[order].tolist()
    np.testing.assert_array_equal(back.labels, known.labels[order])
    for place, i in enumerate(order):
        np.testing.assert_array_equal(back.boxes[place], known.boxes[i])
        np.testing.assert_array_equal(back.box_labels[place], known.box_labels[i])
    np.testing.assert_array_equal(answered, given[order])


@pytest.mark.parametrize("kind", ["classification", "segmentation", "detection"])
def test_values_are_those_of_the_runs_and_a_better_one_is_found_better(tmp_path, kind):
    known = annotations(kind)
    runs = [write_run(tmp_path / name, kind, known, answers(kind, known, s)) for name, s in (("a", 0), ("b", 2))]
    found = evaluate_compare(*runs, draws=200, out=tmp_path / "out")
    reported = [json.loads((run / "results.json").read_text())["results"][0]["metrics"] for run in runs]
    assert list(found["metrics"]) == list(reported[0])
    for name, row in found["metrics"].items():
        assert row["a"] == pytest.approx(reported[0][name]["value"], abs=2e-6)
        assert row["b"] == pytest.approx(reported[1][name]["value"], abs=2e-6)
        assert row["difference"] == pytest.approx(row["b"] - row["a"], abs=3e-6)
        assert row["low"] <= row["difference"] <= row["high"]
    macro = next(row for name, row in found["metrics"].items() if name.endswith("_macro"))
    assert macro["low"] > 0
    assert macro["p"] == pytest.approx(2 / 201, abs=1e-6)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found
    back = evaluate_compare(*runs[::-1], draws=200)["metrics"]
    name = next(iter(back))
    assert (back[name]["low"], back[name]["high"]) == (-found["metrics"][name]["high"], -found["metrics"][name]["low"])


def test_a_run_is_not_unlike_itself(tmp_path):
    known = annotations("classification")
    run = write_run(tmp_path / "a", "classification", known, answers("classification", known, 1))
    for row in evaluate_compare(run, run, draws=50)["metrics"].values():
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_paired_draws_are_surer_than_two_intervals(tmp_path):
    known = annotations("segmentation")
    given = answers("segmentation", known, 0)
    better = given.copy()
    better[:, :, 0] += given[:, :, 2] > 30  # one pixel more, in every image that has so many
    runs = [write_run(tmp_path / name, "segmentation", known, it) for name, it in (("a", given), ("b", better))]
    row = evaluate_compare(*runs, draws=200)["metrics"]["dice_macro"]
    alone = figures_of(measure("segmentation", known, given), known, draws=200)["dice_macro"]
    assert row["low"] > 0
    assert row["high"] - row["low"] < (alone["high"] - alone["low"]) / 4


def test_what_is_not_the_same_is_named(tmp_path):
    known = annotations("classification")
    given = answers("classification", known, 1)
    a = write_run(tmp_path / "a", "classification", known, given)

    def refused(match, name, kind="classification", there=known, said=given, **settings):
        b = write_run(tmp_path / name, kind, there, said, **settings)
        with pytest.raises(ValueError, match=match):
            evaluate_compare(a, b, draws=2)

    masks = annotations("segmentation")
    refused(
        "task.kind: .*/a is classification, .*/k is segmentation",
        "k",
        "segmentation",
        masks,
        answers("segmentation", masks, 1),
    )
    refused("task.targets: .*/a alone has b; .*/t alone has c;", "t", there=replace(known, targets=("a", "c")))
    refused("task.exclusive: False in .*/a, True in .*/e;", "e", exclusive=True)
    keys = ["ffffffffffffffff", *known.keys[1:]]
    refused(
        r"test samples: 1 are in .*/a alone, 1 in .*/s alone, the first is 0{16};", "s", there=replace(known, keys=keys)
    )
    labels = known.labels.copy()
    labels[5:7, 0] = (labels[5:7, 0] + 2) % 3 - 1
    refused(f"labels of 2 test samples: .* the first is {min(known.keys[5:7])}; .*data.uncertain", "l",
            there=replace(known, labels=labels))  # fmt: skip
    patients = np.array(["x", *known.patients[1:]])
    refused("patients of 1 test samples", "p", there=replace(known, patients=patients))
    with pytest.raises(FileNotFoundError, match=r"none/results\.json: no such file.*name the folder of a run"):
        evaluate_compare(a, tmp_path / "none")
    with pytest.raises(ValueError, match="--draws 0: must be at least 1"):
        evaluate_compare(a, a, draws=0)


def test_targets_may_stand_in_another_order(tmp_path):
    known = annotations("classification")
    given = answers("classification", known, 1)
    turned = replace(known, targets=("b", "a"), labels=known.labels[:, ::-1])
    a = write_run(tmp_path / "a", "classification", known, given)
    b = write_run(tmp_path / "b", "classification", turned, given[:, ::-1])
    assert {row["difference"] for row in evaluate_compare(a, b, draws=5)["metrics"].values()} == {0}


def test_boxes_of_before_are_asked_for(tmp_path):
    known = annotations("detection")
    run = write_run(tmp_path / "a", "detection", known, answers("detection", known, 1))
    table = pq.read_table(run / "predictions.test.parquet")
    pq.write_table(table.drop_columns("boxes"), run / "predictions.test.parquet")
    with pytest.raises(ValueError, match="has no column 'boxes'"):
        evaluate_compare(run, run)


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys):
    known = annotations("classification")
    runs = [
        write_run(tmp_path / n, "classification", known, answers("classification", known, i))
        for i, n in enumerate("ab")
    ]
    command = ["imitate-ds", "evaluate", "compare", *map(str, runs), "--draws", "20", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "120 samples of 60 patients" in printed
    assert "auroc_macro" in printed
    assert "comparison.json" in printed

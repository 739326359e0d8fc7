"""results.json and report.html: merged per task, whole or not at all, in need of no other file."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from imitate_ds.evaluation.report import load_results, open_out, write_report, write_result
from imitate_ds.metrics import figure


def _retrieval(value=0.5, synthetic=False):
    metrics = {
        "impression/image_to_text_R@5": figure(value, value - 0.1, value + 0.1, n=40),
        "impression/image_to_text_chance_R@5": figure(0.125, n=40),
        "impression/image_to_text_blind_R@5": figure(0.25, n=40),
        "impression/image_to_text_P@5": figure(0.75, 0.7, 0.8, n=40, classes=3),
    }
    curves = {"impression/image_to_text": {"k": [1, 5], "recall": [0.1, value], "chance": [0.02, 0.125]}}
    return _result("retrieval", metrics, curves, synthetic)


def _probe():
    metrics = {
        "10%/auroc_macro": figure(0.7, 0.6, 0.8, n=40, labels=1, not_defined=["hernia"], std=0.031, draws=5),
        "10%/auroc/effusion": figure(0.7, 0.6, 0.8, n=40, positives=9, std=0.031, draws=5),
        "10%/auroc/hernia": figure(float("nan"), n=40, positives=0),
        "100%/auroc/effusion": figure(0.9, 0.8, 0.95, n=40, positives=9),
    }
    curves = {"roc/effusion": {"false_positive_rate": [0, 0.5, 1], "true_positive_rate": [0.3, 0.9, 1]}}
    return _result("probe", metrics, curves, False)


def _result(task, metrics, curves, synthetic):
    data = {"source": "a<b", "synthetic": synthetic, "split": "val", "samples": 40, "patients": 30}
    model = {"preset": "default", "image_encoder": "resnet10t"}
    given = {"task": task, "protocol": "strict", "model": model, "data": data, "settings": {}}
    return {**given, "metrics": metrics, "curves": curves}


def _zero_shot():
    metrics = {
        "auroc_macro": figure(0.7, 0.6, 0.8, n=40, labels=1, not_defined=[]),
        "auroc/effusion": figure(0.7, 0.6, 0.8, n=40, positives=9),
        "accuracy": figure(0.65, 0.5, 0.8, n=40),
        "blind_accuracy": figure(0.525, n=40),
        "ap/effusion": figure(0.41, 0.3, 0.5, n=40, positives=9),
    }
    return _result("zero-shot", metrics, {}, False)


def _tuned(kind, curves, measure, metrics=None):
    worst = {"measure": measure, "keys": ["00000000000000aa", "00000000000000bb"], "values": [2.5, 0.25]}
    return _result(kind, metrics or {}, curves, False) | {"worst": worst}


CALIBRATION = {"predicted": [0.2, 0.8], "observed": [0.1, 0.9], "counts": [30, 10], "ece": 0.1}


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _text(out):
    return (out / "report.html").read_text()


def test_a_task_takes_the_place_of_its_older_self(tmp_path):
    write_result(tmp_path, _retrieval(0.3))
    write_result(tmp_path, _probe())
    write_result(tmp_path, _retrieval(0.6))
    results = load_results(tmp_path)
    assert [result["task"] for result in results] == ["probe", "retrieval"]
    assert results[1]["metrics"]["impression/image_to_text_R@5"]["value"] == 0.6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_the_page_is_well_formed_and_carries_its_pictures(tmp_path):
    write_result(tmp_path, _retrieval())
    write_result(tmp_path, _probe())
    parser = _Links()
    parser.feed(_text(tmp_path))
    assert parser.open == []
    assert len(parser.links) == 2
    for link in parser.links:
        kind, data = link.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)


def test_the_page_shows_figures_intervals_chance_and_what_is_not_defined(tmp_path):
    write_result(tmp_path, _retrieval())
    write_result(tmp_path, _probe())
    text = re.sub(r"<[^>]+>", "", _text(tmp_path))
    assert "0.500 [0.400, 0.600]chance 0.125, blind 0.250" in text
    assert "0.700 ± 0.031 [0.600, 0.800]" in text
    assert "9 of 40" in text
    assert "not defined" in text
    assert "1 labels have one value only" in text
    assert "a&lt;b" in _text(tmp_path)


def test_measures_of_one_label_stand_in_one_row(tmp_path):
    write_result(tmp_path, _zero_shot())
    rows = re.findall(r"<tr>(.*?)</tr>", _text(tmp_path))
    cells = [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]
    assert cells[0] == ["label", "positive", "AUROC", "AP", "accuracy", "best fixed answer"]
    assert ["effusion", "9 of 40", "0.700 [0.600, 0.800]", "0.410 [0.300, 0.500]", "", ""] in cells
    assert ["all", "40", "", "", "0.650 [0.500, 0.800]", "0.525"] in cells


def test_synthetic_data_are_flagged(tmp_path):
    write_result(tmp_path / "a", _retrieval(synthetic=True))
    write_result(tmp_path / "b", _retrieval(synthetic=False))
    assert "<b>Synthetic data.</b>" in _text(tmp_path / "a")
    assert "Synthetic data" not in _text(tmp_path / "b")
    assert "not for clinical use" in _text(tmp_path / "b")


def test_training_curves_come_from_the_run(tmp_path):
    run = tmp_path / "run"
    write_result(run, _retrieval())
    assert "Training" not in _text(run)
    lines = [{"step": step, "split": "train", "time": 1.0, "loss": 3 - step / 10} for step in range(5)]
    lines.append({"step": 4, "split": "val", "time": 1.0, "impression/image_to_text_R@1": 0.5})
    torn = '{"step": 5, "spl'
    (run / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), torn]))
    write_report(run)
    assert "<h2>Training</h2>" in _text(run)
    write_result(tmp_path / "elsewhere", _probe())
    write_report(tmp_path / "elsewhere", run_dir=run)
    assert "<h2>Training</h2>" in _text(tmp_path / "elsewhere")


def test_the_same_results_draw_the_same_page(tmp_path):
    write_result(tmp_path, _retrieval())
    first = re.sub(r"base64,[^\"]+", "", _text(tmp_path))
    write_report(tmp_path)
    assert re.sub(r"base64,[^\"]+", "", _text(tmp_path)) == first


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        open_out(tmp_path / "out")
    open_out(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()


@pytest.mark.parametrize("content", ["", "[]", '{"results": [{"task": "x"}]}', '{"results": 3}', '{"results": [3]}'])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="not a results file of imitate-ds"):
        write_result(tmp_path, _retrieval())
    assert (tmp_path / "results.json").read_text() == content
    assert not (tmp_path / "report.html").exists()


def _rows(out):
    rows = re.findall(r"<tr>(.*?)</tr>", _text(out))
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_a_tuned_classifier_shows_errors_calibration_and_its_worst_cases(tmp_path):
    curves = {
        "roc/a<b": {"false_positive_rate": [0, 1], "true_positive_rate": [0, 1]},
        "pr/a<b": {"recall": [0, 1], "precision": [1, 0.5]},
        "calibration/a<b": CALIBRATION,
        "confusion/a<b": {"threshold": 0.5, "counts": [[20, 5], [3, 12]]},
    }
    metrics = {"auroc/a<b": figure(0.7, 0.6, 0.8, n=40, positives=15)}
    write_result(tmp_path, _tuned("classification", curves, "cross-entropy", metrics))
    rows = _rows(tmp_path)
    assert ["a&lt;b", "12", "3", "5", "20", "0.100"] in rows
    assert rows[-3:] == [
        ["worst samples, by key", "cross-entropy"],
        ["00000000000000aa", "2.500"],
        ["00000000000000bb", "0.250"],
    ]
    assert "ten bins" in _text(tmp_path)
    assert _text(tmp_path).count("<img") == 2


def test_exclusive_classes_stand_against_each_other(tmp_path):
    curves = {
        "confusion": {"classes": ["normal", "viral"], "counts": [[8, 2], [1, 9]]},
        "calibration/viral": CALIBRATION,
    }
    write_result(tmp_path, _tuned("classification", curves, "cross-entropy"))
    assert ["normal", "8", "2"] in _rows(tmp_path)
    assert ["viral", "1", "9"] in _rows(tmp_path)


@pytest.mark.parametrize(
    ("kind", "curve"),
    [
        ("segmentation", {"dice/lungs": {"edges": [0, 0.5, 1], "counts": [1, 3], "quartiles": [0.6, 0.7, 0.8]}}),
        ("detection", {"pr/nodule": {"recall": [0, 1], "precision": [1, 0], "iou": 0.5}}),
    ],
)
def test_masks_and_boxes_are_drawn_once(tmp_path, kind, curve):
    write_result(tmp_path, _tuned(kind, curve, "m"))
    assert _text(tmp_path).count("<img") == 1
    parser = _Links()
    parser.feed(_text(tmp_path))
    assert parser.open == []

"""The table of a benchmark: means over seeds as they were scored, one encoder less another with the same patients drawn."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from imitate_ds.evaluation.benchmark_table import Entry, write_benchmark
from imitate_ds.evaluation.predictions import write_predictions
from imitate_ds.evaluation.report import load_results, write_result
from imitate_ds.evaluation.task_scores import figures_of, measure
from tests.evaluation.test_comparison import N, annotations, answers

KINDS = ("classification", "segmentation", "detection")


def write_run(folder, kind, shift, seed):
    """A run that was scored; the larger the shift, the better."""
    known = annotations(kind)
    given = answers(kind, known, shift, seed)
    folder.mkdir(parents=True)
    write_predictions(folder / "predictions.test.parquet", kind, known, given)
    data = {"source": "phantom", "synthetic": True, "split": "test", "samples": N, "patients": N // 2}
    settings = {"targets": list(known.targets), "train": data, "run": {"task": {"exclusive": False}}}
    settings["global_batch_size"] = 16
    figures = figures_of(measure(kind, known, given), known, draws=0)
    model = {"head": "linear"}
    result = {
        "task": kind,
        "protocol": "strict",
        "model": model,
        "data": data,
        "settings": settings,
        "metrics": figures,
    }
    write_result(folder, result | {"curves": {}})


@pytest.mark.parametrize("kind", KINDS)
def test_means_over_seeds_and_paired_differences(tmp_path, kind):
    entries = []
    for encoder, shift in (("plain", 0.5), ("better", 1.5)):
        for seed in (1, 2):
            entries.append(Entry("task", encoder, "frozen", 1.0, seed, tmp_path / "runs" / f"{encoder}-{seed}"))
            write_run(entries[-1].folder, kind, shift, seed)
    write_benchmark(tmp_path, "table", "strict", entries, {})
    values = json.loads((tmp_path / "results.json").read_text())
    main = {"classification": "auroc_macro", "segmentation": "dice_macro", "detection": "ap_macro"}[kind]
    means = {}
    for row in values["rows"]:
        of_runs = [load_results(e.folder)[0]["metrics"][main]["value"] for e in entries if e.encoder == row["encoder"]]
        found = row["metrics"][main]
        assert row["seeds"] == [1, 2]
        assert found["value"] == pytest.approx(np.mean(of_runs), abs=2e-6)
        assert found["std"] == pytest.approx(np.std(of_runs, ddof=1), abs=2e-6)
        assert found["low"] < found["value"] < found["high"]
        means[row["encoder"]] = found["value"]
    (difference,) = values["differences"]
    assert (difference["a"], difference["b"]) == ("plain", "better")
    found = difference["metrics"][main]
    assert found["value"] == pytest.approx(means["better"] - means["plain"], abs=3e-6)
    assert 0 < found["low"] < found["value"] < found["high"]
    assert found["p"] < 0.01
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert (table.num_rows, set(table["run"].to_pylist())) == (4 * N, {entry.folder.name for entry in entries})
    page = (tmp_path / "report.html").read_text()
    assert "better - plain" in page
    assert '<a href="runs/better-2/report.html">' in page
    assert "Synthetic data" in page


def test_a_run_without_results_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match=r"run: no results.json; has data.test_split"):
        write_benchmark(tmp_path, "x", "strict", [Entry("t", "e", "frozen", 1.0, 0, tmp_path / "run")], {})

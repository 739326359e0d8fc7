"""A benchmark of real runs: prepared, run, gone on with, and what it says of a run that fails."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

from imitate_ds.benchmark import benchmark
from imitate_ds.benchmark_config import load_benchmark_config
from imitate_ds.finetune_config import load_finetune_config

pytestmark = pytest.mark.slow


@pytest.fixture
def plan(tmp_path, phantom_shards):
    """Two encoders and two tasks, of which one asks for a label that is not there."""
    run = {
        "data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0},
        "task": {"kind": "classification", "targets": ["device", "nodule"]},
        "train": {"micro_batch_size": 64, "epochs": 1},
    }
    values = {
        "name": "table",
        "output_dir": str(tmp_path),
        "seeds": [3],
        "encoders": {"small": {"model": {"image_encoder": "resnet10t"}}},
        "tasks": {
            "labels": {"run": run, "shares": [0.5], "val_share": 0.2},
            "broken": {"run": {**run, "task": {"kind": "classification", "targets": ["hernia"]}}},
        },
    }

    def write(**changes):
        path = tmp_path / "benchmark.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    return write


def test_a_run_that_fails_is_named_and_the_others_stand_in_the_table(plan, tmp_path):
    said = []
    assert benchmark(plan(), jobs=2, say=said.append) == ["broken-small-frozen-1-3"]
    assert any("broken-small-frozen-1-3: failed with status 2; see" in line for line in said)
    assert "no 'hernia' among its labels" in (tmp_path / "table/runs/broken-small-frozen-1-3.log").read_text()
    results = json.loads((tmp_path / "table/results.json").read_text())
    (row,) = results["rows"]
    assert (row["task"], row["encoder"], row["train"], row["share"], row["seeds"]) == (
        "labels",
        "small",
        "frozen",
        0.5,
        [3],
    )
    assert row["training"]["samples"] < 120  # half of four fifths of the training split
    assert row["metrics"]["auroc_macro"]["value"] is not None
    predictions = pq.read_table(tmp_path / "table/predictions.parquet")
    assert set(predictions["run"].to_pylist()) == {"labels-small-frozen-0.5-3"}
    assert "score/device" in predictions.column_names
    page = (tmp_path / "table/report.html").read_text()
    assert "small, frozen" in page
    assert "Synthetic data" in page

    # Gone on with: what has finished is not run again.
    state = tmp_path / "table/runs/labels-small-frozen-0.5-3/state.json"
    before, said = state.stat().st_mtime_ns, []
    assert benchmark(plan(), say=said.append) == ["broken-small-frozen-1-3"]
    assert state.stat().st_mtime_ns == before
    assert not any("labels-small-frozen-0.5-3" in line for line in said)
    with pytest.raises(ValueError, match="was run with other settings"):
        benchmark(plan(seeds=[3]), ["tasks.labels.run.optim.lr=0.5"])


def test_prepared_for_an_array_of_jobs(plan, tmp_path):
    said = []
    assert benchmark(plan(seeds=[0, 1]), prepare=True, say=said.append) == []
    listed = (tmp_path / "table/runs.txt").read_text().split()
    assert f"RUNS={tmp_path}/table/runs.txt sbatch --array=0-3" in said[0]
    configs = [load_finetune_config(path) for path in map(type(tmp_path), listed)]
    assert [config.seed for config in configs] == [0, 1, 0, 1]
    assert configs[2].data.val_list != configs[3].data.val_list  # in alphabetical order, the last two are of "labels"
    assert {config.run_dir.parent for config in configs} == {tmp_path / "table/runs"}
    assert not any(config.run_dir.exists() for config in configs)


def test_two_cells_of_one_name_are_refused(plan):
    model = {"model": {"image_encoder": "resnet10t"}}
    run = {"data": {"shards": "x"}, "task": {"kind": "detection"}}
    tasks = {"a": {"run": run}, "a-b": {"run": run}}
    with pytest.raises(ValueError, match=r"two cells of the table would be called a-b-c-frozen-1-3"):
        benchmark(plan(tasks=tasks, encoders={"b-c": model, "c": model}), prepare=True)


def test_refusals_name_the_cell_and_the_key(plan):
    for changes, message in (
        ({"encoders": {"small": {}}}, r"must have init .* or model"),
        ({"tasks": {"x": {"run": {"task": {"kind": "detection"}}}}}, r"tasks\.x, encoders\.small: data: must be given"),
        ({"tasks": {}}, "must name at least one task"),
        ({"tasks": {"x": {"run": {}, "shares": [0]}}}, r"tasks\.x\.shares"),
        ({"sedes": [1]}, "did you mean seeds?"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            load_benchmark_config(plan(**changes))

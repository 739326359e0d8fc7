"""A scaling sweep of real runs: run, gone on with, and what it says of a run that fails."""

import csv
import json
import time
from pathlib import Path

import pytest
import yaml

from imitate_ds.config import load_run_config
from imitate_ds.run_file import merged
from imitate_ds.scale import scale
from imitate_ds.scale_config import load_scale_config
from imitate_ds.training.run_state import write_run_state

pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(tmp_path, phantom_shards):
    values = {
        "name": "sweep",
        "output_dir": str(tmp_path),
        "axes": {"encoders": ["test_resnet"], "batch_sizes": [16], "shares": [0.5], "seeds": [3]},
        "probe": {"split": "val"},
        "run": {
            "data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0},
            "model": {"joint_dim": 16, "text_hidden": 16, "aggregation": {"pool": 2, "heads": 2}},
            "train": {"epochs": 1, "max_steps": 2, "log_every": 1, "images_every": 0},
        },
    }

    def write(**changes):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(merged(values, changes)))
        return path

    return write


def test_a_run_that_fails_is_named_with_its_reason_and_the_other_stands_on_the_page(sweep, tmp_path):
    broken = {"model": {"image_encoder": "test_resnet", "weights": "lost.safetensors"}}
    encoders = {"broken": broken, "small": {"model": {"image_encoder": "test_resnet"}}}
    said = []
    assert scale(sweep(axes={"encoders": encoders}), jobs=2, say=said.append) == ["broken-b16-global-d0.5-s3"]
    assert said[0] == "sweep: 2 runs of 64 studies together"
    assert any("broken-b16-global-d0.5-s3: failed with status 2; see" in line for line in said)
    failed, done = csv.DictReader((tmp_path / "sweep/scaling.csv").open())
    assert failed["state"] == "failed"
    assert "model.weights = 'lost.safetensors': no such file" in failed["reason"]
    assert (done["state"], done["steps"], done["studies_seen"]) == ("finished", "2", "32")
    assert 80 < int(done["train_studies"]) < 110  # half of the patients of four fifths of 240 studies
    assert float(done["val_loss"]) > 0
    assert 0 < float(done["auroc"]) < 1
    found = json.loads((tmp_path / "sweep/scaling.json").read_text())
    assert found["synthetic"] is True
    assert found["lines"] == []  # of a single size there is no law
    page = (tmp_path / "sweep/scaling.html").read_text()
    assert "1 of 2 runs have finished" in page
    assert "lost.safetensors" in page
    assert "Synthetic data" in page

    # Gone on with: what has finished is not run, nor probed, again. The list for Slurm holds all runs, the array what is left.
    folder, said = tmp_path / "sweep/runs/small-b16-global-d0.5-s3", []
    before = [(folder / name).stat().st_mtime_ns for name in ("state.json", "results.json")]
    assert scale(sweep(axes={"encoders": encoders}), slurm=True, say=said.append) == []
    assert before == [(folder / name).stat().st_mtime_ns for name in ("state.json", "results.json")]
    assert said[0] == "sweep: 2 runs of 64 studies together; 1 have finished, 32 studies are left"
    files = [f"{tmp_path}/sweep/runs/{name}-b16-global-d0.5-s3.yaml" for name in ("broken", "small")]
    assert (tmp_path / "sweep/runs.txt").read_text().split() == files
    assert "--array=0 ... launch/pretrain.sbatch --set train.resume=true" in said[1]
    with pytest.raises(ValueError, match=r"was run with other settings.*another name for the sweep"):
        scale(sweep(axes={"encoders": encoders}), ["run.optim.lr=0.5"], slurm=True)


def test_every_combination_is_planned_to_its_length(sweep, tmp_path):
    axes = {"negatives": ["global", "local"], "shares": [0.5, 1.0], "studies": [64, 400], "seeds": [0, 1]}
    said = []
    assert scale(sweep(axes=axes), slurm=True, say=said.append) == []
    runs = [load_run_config(tmp_path / line) for line in (tmp_path / "sweep/runs.txt").read_text().split()]
    assert len({run.name for run in runs}) == 16
    assert said[0] == f"sweep: 16 runs of {8 * 64 + 8 * 400:,} studies together"
    for run in runs:
        assert run.train.global_batch_size == 16
        assert run.train.max_steps == (4 if "-n64-" in run.name else 25)
        assert run.objective.negatives.scope == ("local" if "-local-" in run.name else "global")
        assert f"-d{run.data.share:g}-" in run.name
        assert run.name.endswith(f"-s{run.seed}")
    half = next(run for run in runs if run.name == "test_resnet-b16-global-d0.5-n400-s0")
    assert half.train.epochs >= 4  # about 90 studies make five steps of 16
    assert "16 of 16" not in (tmp_path / "sweep/scaling.html").read_text()
    assert [row["state"] for row in csv.DictReader((tmp_path / "sweep/scaling.csv").open())] == ["not begun"] * 16


def test_a_run_keeps_its_line_and_what_goes_on_is_not_submitted_again(sweep, tmp_path):
    """A task of an array that waits in the queue reads its line when it begins."""
    said = []
    scale(sweep(axes={"seeds": [0, 1, 2]}), slurm=True, say=said.append)
    first, *others = (tmp_path / "sweep/runs.txt").read_text().split()
    assert "sbatch --array=0-2 ... " in said[1]
    going, done = (Path(path).with_suffix("") for path in (first, others[1]))
    write_run_state(going, "running", step=1)
    (going / "heartbeats").mkdir()
    beat = {
        "rank": 0,
        "host": "another",
        "pid": 1,
        "step": 1,
        "doing": "step",
        "since": time.time(),
        "time": time.time(),
    }
    (going / "heartbeats/rank-0.json").write_text(json.dumps(beat))
    write_run_state(done, "finished", step=2)
    scale(sweep(axes={"seeds": [4, 0, 1, 2, 3]}), slurm=True, say=said.append)
    lines = (tmp_path / "sweep/runs.txt").read_text().split()
    assert lines[:3] == [first, *others]
    assert [line[-7:] for line in lines[3:]] == ["s4.yaml", "s3.yaml"]
    assert "sbatch --array=1,3-4 ... " in said[-2]


def test_shares_that_differ_little_are_different_runs_and_a_weight_makes_no_more_studies(
    sweep, tmp_path, phantom_shards
):
    twice = [{"shards": str(phantom_shards), "weight": 2.0}]
    scale(sweep(axes={"shares": [0.3333333, 0.33333334, 1.0]}, run={"data": {"shards": twice}}), slurm=True)
    table = {row["run"]: row for row in csv.DictReader((tmp_path / "sweep/scaling.csv").open())}
    assert [name.split("-")[3] for name in table] == ["d0.3333333", "d0.33333334", "d1"]
    assert table["test_resnet-b16-global-d1-s3"]["train_studies"] == "182"


def test_what_is_wrong_is_said_at_the_door(sweep):
    for changes, message in (
        ({"axes": {"encoder": ["x"]}}, r"axes\.encoder is not a setting \(did you mean encoders\?\)"),
        ({"axes": {"shares": []}}, r"axes\.shares = \[\]: must name at least one; leave the axis out"),
        ({"axes": {"encoders": []}}, r"axes\.encoders = \[\]: must name at least one"),
        ({"axes": {"encoders": ["resnet10t", "resnet10t"]}}, r"axes\.encoders = .*: names resnet10t twice"),
        ({"axes": {"seeds": [1, 2, 1]}}, r"axes\.seeds = .*: names 1 twice"),
        ({"axes": {"studies": [0]}}, r"axes\.studies\.0 = 0: must be greater than 0"),
        ({"axes": {"batch_sizes": [1]}}, r"axes\.batch_sizes\.0 = 1: must be greater than or equal to 2"),
        ({"axes": {"negatives": ["none"]}}, r"axes\.negatives\.0 = 'none': must be 'global' or 'local'"),
        ({"run": {"optim": {"lrr": 1}}}, r"run, axes\.encoders\.test_resnet: optim\.lrr is not a setting"),
    ):
        with pytest.raises(ValueError, match=message):
            load_scale_config(sweep(**changes))
    for changes, message in (
        (
            {"axes": {"encoders": ["resnet19t"]}},
            r"axes\.encoders\.resnet19t: model\.image_encoder = 'resnet19t': not a backb",
        ),
        ({"probe": {"split": "valid"}}, r"probe\.split = 'valid': .* has train, val, test; name one of them"),
        ({"probe": {"train_split": "trian"}}, r"probe\.train_split = 'trian': .* has train, val, test"),
        ({"axes": {"shares": [2.0]}}, r"run, axes\.encoders\.test_resnet: data\.share = 2\.0"),
        ({"axes": {"shares": [0.01]}}, r"fewer than one global batch of 16 .*data\.share"),
    ):
        with pytest.raises(ValueError, match=message):
            scale(sweep(**changes))


def test_an_encoder_may_have_settings_of_its_own(sweep):
    encoders = {"resnet18": {"optim": {"lr": 5e-4}}, "resnet10t": {}, "a": {"model": {"image_encoder": "b"}}}
    path = sweep(axes={"encoders": encoders})
    config = load_scale_config(path)
    runs = {name: config.run_of(name) for name in encoders}
    assert {name: (run.model.image_encoder, run.optim.lr) for name, run in runs.items()} == {
        "resnet18": ("resnet18", 5e-4),
        "resnet10t": ("resnet10t", 2e-4),
        "a": ("b", 2e-4),
    }
    assert load_scale_config(path, ["run.model.image_encoder=c"]).run_of("resnet18").model.image_encoder == "c"


def test_an_encoder_that_is_named_twice_is_not_lost(sweep):
    path = sweep()
    path.write_text(path.read_text() + "axes: {encoders: {a: {model: {image_encoder: resnet10t}}, a: {}}}\n")
    with pytest.raises(ValueError, match=r"sweep\.yaml: not valid YAML: a is said twice"):
        load_scale_config(path)

"""Fine-tuning, for real: DeepSpeed ranks on phantom shards, every kind of task, stopped and resumed, exported and loaded."""

import json
import signal
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from imitate_ds import load_predictor
from imitate_ds.data.shard_index import read_samples
from imitate_ds.data.shards import load_index
from imitate_ds.data.split_lists import Part, make_split_lists
from imitate_ds.data.stored_images import decode_stored
from imitate_ds.finetune import finetune
from imitate_ds.finetune_config import load_finetune_config
from imitate_ds.flight import flight
from imitate_ds.training.drain import Drain
from imitate_ds.training.run_state import read_run_state
from tests.launching import finish, run, start

pytestmark = pytest.mark.slow

TASKS = {
    "classification": {"kind": "classification", "targets": ["cardiomegaly", "nodule"], "head": "mlp", "hidden": 16},
    "segmentation": {"kind": "segmentation", "targets": ["lungs", "heart"]},
    "detection": {"kind": "detection"},
}
STAGES = {"classification": "zero2", "segmentation": "zero3", "detection": "zero2"}
METRICS = {"classification": "auroc_macro", "segmentation": "dice_macro", "detection": "ap_macro"}


@pytest.fixture
def run_file(tmp_path, phantom_shards):
    """Write a run file for six quick steps in two epochs; keyword arguments override settings."""

    def write(name, kind="classification", **settings):
        values = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "encoder": {"model": {"image_encoder": "resnet10t"}, "train": "frozen"} | settings.get("encoder", {}),
            "data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0} | settings.get("data", {}),
            "task": TASKS[kind] | settings.get("task", {}),
            "optim": {"lr": 1e-3},
            "report_images": settings.get("report_images", 0),
            "train": {"global_batch_size": 61, "epochs": 2, "log_every": 1, **settings.get("train", {})},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path, tmp_path / "runs" / name

    return write


@pytest.fixture
def alone(process_group):
    """Runs a run file in here, as one rank."""

    def train(path, *overrides):
        return finetune(load_finetune_config(path, list(overrides)))

    return train


def records(folder, split="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def test_two_ranks_with_unlike_shares_equal_one(run_file, alone):
    """61 samples a step are 31 and 30; whole encoder, in a model whose steps do not depend on how a batch is cut."""
    settings = {"encoder": {"train": "full"}, "train": {"batch_norm": "freeze", "eval_every": 2}}
    pairs = {}
    for kind, stage in STAGES.items():
        train = {**settings["train"], "deepspeed": stage}
        drawn = 0 if kind == "classification" else 2
        pairs[kind] = run_file(f"two-{kind}", kind, **{**settings, "train": train, "report_images": drawn})
    run("tests.finetune_worker", *(str(path) for path, _ in pairs.values()))
    for kind, (_, folder) in pairs.items():
        path, one = run_file(f"one-{kind}", kind, **settings)
        found = alone(path)
        for two, expected in zip(records(folder), records(one), strict=True):
            for name in ("loss", "gradient_norm"):
                assert two[name] == pytest.approx(expected[name], rel=1e-3), kind
        assert [r["step"] for r in records(folder, "val")] == [6]
        (result,) = json.loads((folder / "results.json").read_text())["results"]
        drawn = 0 if kind == "classification" else 2
        overlays = sorted(path.stem for path in folder.glob("overlays/*.png"))
        assert overlays == sorted(result["worst"]["keys"][:drawn])
        assert len(result["worst"]["keys"]) == result["data"]["samples"] < 10
        assert result["curves"]
        metrics = result["metrics"]
        value = metrics[METRICS[kind]]["value"]
        assert value == pytest.approx(found[f"test/{METRICS[kind]}"], abs=0.02), kind
        assert metrics[METRICS[kind]]["low"] <= value <= metrics[METRICS[kind]]["high"]
        assert (folder / "report.html").stat().st_size > 5_000
        assert read_run_state(folder)["state"] == "finished"


@pytest.mark.parametrize("kind", TASKS)
def test_what_comes_back_from_the_export_says_what_was_scored(run_file, alone, kind, phantom_shards):
    path, folder = run_file("exported", kind, encoder={"train": "lora", "lora_rank": 2}, data={"input_size": 64})
    alone(path)
    table = pq.read_table(folder / "predictions.test.parquet").to_pydict()
    index = load_index(phantom_shards)
    stored = {member.key: decode_stored(image, side=64) for member, image, _ in read_samples(index, "test")}
    assert list(table["key"]) == list(stored)
    predictor = load_predictor(folder / "export")
    said = predictor.predict(torch.stack(list(stored.values())), batch_size=5)
    if kind == "classification":
        columns = np.stack([table[f"score/{name}"] for name in predictor.targets], axis=1)
        np.testing.assert_allclose(said, columns, atol=1e-5)
    elif kind == "segmentation":
        pixels = np.stack([table[f"predicted_pixels/{name}"] for name in predictor.targets], axis=1)
        np.testing.assert_allclose((said >= 0.5).sum((2, 3)), pixels, atol=2)
    else:
        for found, rows in zip(said, table["detections"], strict=True):
            assert len(rows) == min(100, len(found.scores))
            scores = [row["score"] for row in rows]
            np.testing.assert_allclose(found.scores.sort(descending=True)[0][:100], scores, atol=1e-5)
    assert not any("parametrizations" in name for name in predictor.model.state_dict())
    card = (folder / "export" / "README.md").read_text()
    assert "Not for clinical use" in card
    assert "**synthetic**" in card


def test_stopped_and_resumed_equals_undisturbed(run_file, alone):
    """Ranks that hear a signal, and other numbers of them, are the matter of test_pretrain.py and tests/cluster."""
    longer = {"epochs": 4, "save_every": 100}
    path, undisturbed = run_file("undisturbed", encoder={"train": "last_n"}, train=longer)
    alone(path)
    path, folder = run_file("drained", encoder={"train": "last_n"}, train=longer)
    drain = Drain()

    def ask_to_end():
        while not (folder / "metrics.jsonl").exists() or len(records(folder)) < 4:
            time.sleep(0.01)
        drain.signal = signal.SIGUSR1

    threading.Thread(target=ask_to_end, daemon=True).start()
    finetune(load_finetune_config(path), drain)
    assert read_run_state(folder)["state"] == "drained"
    assert 4 <= read_run_state(folder)["step"] < 12
    assert not (folder / "export").exists()
    alone(path, "train.resume=true")
    assert [r["loss"] for r in records(folder)] == [r["loss"] for r in records(undisturbed)]
    one, other = (json.loads((f / "results.json").read_text())["results"][0]["metrics"] for f in (folder, undisturbed))
    assert one == other


class AskedWhileScoring(Drain):
    """As if SIGTERM came while the first batch of a validation is scored."""

    asked = 0

    @property
    def signal(self) -> int:
        if flight.doing == "scoring":
            self.asked = signal.SIGTERM
        return self.asked

    @signal.setter
    def signal(self, _: int) -> None:
        pass


def test_a_validation_that_was_broken_off_is_made_up_for_and_can_be_the_best(run_file, alone):
    """The first validation, which stays the best since nothing is learned."""
    path, folder = run_file("due", train={"patience": 0, "keep_last": 1})
    flight.begin("starting", 0)
    finetune(load_finetune_config(path, ["optim.lr=1e-30"]), AskedWhileScoring())
    assert read_run_state(folder)["state"] == "drained"
    assert records(folder, "val") == []
    alone(path, "optim.lr=1e-30", "train.resume=true")
    assert [r["step"] for r in records(folder, "val")] == [3, 6]
    assert json.loads((folder / "results.json").read_text())["results"][0]["settings"]["step"] == 3


def test_training_ends_when_it_no_longer_gets_better_and_the_best_is_scored(run_file, alone):
    path, folder = run_file("patient", train={"epochs": 30, "patience": 2, "keep_last": 1})
    alone(path, "optim.lr=1e-30")  # nothing is learned, so the first validation stays the best
    assert [r["step"] for r in records(folder, "val")] == [3, 6, 9]
    assert json.loads((folder / "results.json").read_text())["results"][0]["settings"]["step"] == 3
    assert sorted(p.name for p in (folder / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000009"]
    state = read_run_state(folder)
    assert (state["state"], state["step"], state["total_steps"]) == ("finished", 9, 90)


def test_lists_give_a_validation_part_and_fewer_labels(run_file, alone, phantom_shards, tmp_path):
    index = load_index(phantom_shards)
    parts = {"fit": Part(0, 0.4), "choose": Part(0.8, 1), "overlapping": Part(0.3, 1)}
    make_split_lists(index, "train", parts, tmp_path)
    lists = {"train_list": str(tmp_path / "fit.txt"), "val_split": "train", "val_list": str(tmp_path / "choose.txt")}
    path, folder = run_file("few", data=lists)
    alone(path)
    settings = json.loads((folder / "results.json").read_text())["results"][0]["settings"]
    assert settings["train"]["samples"] < settings["val"]["samples"] * 3
    with pytest.raises(
        ValueError, match=r"data\.train_split, data\.val_split: \d+ samples and \d+ patients are in both"
    ):
        alone(path, f"data.val_list={tmp_path}/overlapping.txt", "name=other")
    with pytest.raises(ValueError, match=r"are in both; .*'imitate-ds splits make'$"):
        alone(path, "data.val_list=", "name=other")


def test_refusals_name_key_value_and_what_to_do(run_file, alone, phantom_shards, tmp_path):
    path, folder = run_file("refused")

    def refused(error, match, *overrides):
        with pytest.raises(error, match=match):
            alone(path, *overrides)

    refused(FileNotFoundError, "imitate-ds shards build", f"data.shards={tmp_path}/none")
    refused(
        ValueError,
        r"data\.train_split = 'train': task\.targets: .* no 'hernia' among its labels",
        "task.targets=[hernia]",
    )
    refused(ValueError, r"data\.val_split = 'vall': .*it has: train, val, test", "data.val_split=vall")
    refused(ValueError, r"task\.head|head = 'unet': must be one of linear, mlp", "task.head=unet")
    refused(ValueError, r"must have init .* or model", "encoder.init=x")
    refused(ValueError, r"report_images = 3: .* must be 0 for classification", "report_images=3")
    refused(ValueError, r"train\.keep_best = 1: needs validation", "data.val_split=")
    refused(FileNotFoundError, "no such folder", "encoder={init: runs/none/export}")
    assert not folder.exists()
    ((status, output),) = finish(start("imitate_ds.finetune", "--config", str(path), "--set", "task.kindd=x", ranks=1))
    assert status == 2
    assert "did you mean kind?" in output
    assert "Traceback" not in output

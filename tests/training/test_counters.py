"""counters.json, and the rates that are made of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from imitate_ds.training.counters import Counters, peak_flops
from imitate_ds.training.loop import StepOutput
from tests.launching import run
from tests.training.counters_worker import STUDIES, WORDS

KINDS = {"parameters", "gradients", "buckets", "optimizer", "activations", "loss"}


def test_the_first_step_is_counted_and_told_once_the_optimizer_has_its_state(tmp_path):
    model = nn.Sequential(nn.Linear(4, 600), nn.Linear(600, 1))
    model[1].requires_grad_(False)
    counters = Counters(
        tmp_path,
        SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters())),
        "bf16",
        loss_flops=10.0,
    )

    def step(batch):
        loss = model(torch.randn(batch.rows, 4)).sum()
        loss.backward()
        return StepOutput(loss.detach(), {}, dict)

    counted = counters.around(step)
    memory = {f"memory_mib/{kind}" for kind in KINDS}
    counted(SimpleNamespace(keys=["a", "b"], rows=2))
    rates = counters.rates(1e12)
    assert rates["tflops"] == pytest.approx(12010)
    assert rates.keys() - {"tflops"} == memory
    counted(SimpleNamespace(keys=["a", "b", "c"], rows=3))
    counters.engine.optimizer.zero_grad()  # its gradient overflowed
    counters.engine.optimizer.step()
    assert counters.rates(1e12)["memory_mib/optimizer"] == 0
    counted(SimpleNamespace(keys=["a", "b", "c"], rows=3))
    counters.engine.optimizer.step()
    assert counters.rates(1e12).keys() == rates.keys()
    assert counters.rates(2e12) == {"tflops": pytest.approx(24020)}
    record = json.loads((tmp_path / "counters.json").read_text())
    (memory,) = record.pop("memory_mib")
    assert set(memory) == KINDS
    assert memory["optimizer"] == pytest.approx(2 * 4 * 3000 / 2**20, abs=0.001)
    assert record == {
        "format": "imitate_ds.counters/1",
        "flops_per_study": 12010.0,
        "flops_by_part": {"0": 9600.0, "1": 2400.0, "loss": 10.0},
        "recomputed_flops_per_study": 0.0,
        "parameters": 3601,
        "trainable_parameters": 3000,
        "device": "cpu",
        "precision": "bf16",
        "peak_flops": None,
    }


def test_operations_are_of_a_study_of_all_ranks(tmp_path):
    said = run("tests.training.counters_worker", str(tmp_path))
    record = json.loads((tmp_path / "counters.json").read_text())
    image = 2 * 2 * 4 * 6  # forward, and the gradient of the weight
    assert record["flops_by_part"] == {"image": image, "text": image * sum(WORDS) / sum(STUDIES), "loss": 10.0}
    assert float(said) == pytest.approx(record["flops_per_study"] / 2e12)
    assert len(record["memory_mib"]) == 2


def test_no_peak_is_made_up():
    assert peak_flops("bf16", 0.5) is None

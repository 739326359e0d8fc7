"""counters.json, and the rates that are made of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from imitate_ds.training.counters import Counters, peak_flops
from imitate_ds.training.loop import StepOutput

KINDS = {"parameters", "gradients", "buckets", "optimizer", "activations", "loss"}


def test_the_first_step_is_counted_and_told_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
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
    counted(SimpleNamespace(keys=["a", "b"], rows=2))
    counted(SimpleNamespace(keys=["a", "b", "c"], rows=3))
    rates = counters.rates(1e12)
    assert rates["tflops"] == pytest.approx(130)
    assert rates.keys() - {"tflops"} == {f"memory_mib/{kind}" for kind in KINDS}
    assert counters.rates(2e12) == {"tflops": pytest.approx(260)}
    record = json.loads((tmp_path / "counters.json").read_text())
    (memory,) = record.pop("memory_mib")
    assert set(memory) == KINDS
    assert record == {
        "format": "imitate_ds.counters/1",
        "flops_per_study": 130.0,
        "flops_by_part": {"0": 96.0, "1": 24.0, "loss": 10.0},
        "recomputed_flops_per_study": 0.0,
        "parameters": 37,
        "trainable_parameters": 30,
        "device": "cpu",
        "precision": "bf16",
        "peak_flops": None,
    }


def test_no_peak_is_made_up():
    assert peak_flops("bf16", 0.5) is None

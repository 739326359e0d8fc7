"""The loop's own arithmetic, around a plain PyTorch engine (around DeepSpeed: test_engine.py, tests/test_pretrain.py)."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from imitate_ds.training.loop import LoopSettings, StepOutput, train_steps
from imitate_ds.training.monitor import Monitor


class PlainEngine:
    """One process, no ZeRO: what the loop asks of an engine."""

    torch_autocast_z0_gradscaler = None

    def __init__(self):
        self.module = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def zero_optimization_stage(self):
        return 0

    def get_global_grad_norm(self):
        return None


class Steps(list):
    """Batches that know their step, their keys, and how to go to a device."""

    def __init__(self, count, bad=None):
        super().__init__(Step(i, i == bad) for i in range(count))


class Step:
    def __init__(self, step, bad):
        self.step, self.keys, self.bad = step, ["a", "b"], bad

    def to(self, device):
        return self


def train(tmp_path, batches, pauses_at, **settings):
    engine, pauses = PlainEngine(), []

    def step_fn(batch):
        loss = engine.module(torch.ones(2, 2)).square().mean() * (float("nan") if batch.bad else 1.0)
        loss.backward()
        return StepOutput(loss.detach(), {"loss": loss.detach()}, lambda: {"x": torch.zeros(1, 2, 2)})

    monitor = Monitor(tmp_path, start_step=0, total_steps=10, speaks=True, console=Console(file=io.StringIO()))
    values = {
        "seed": 0,
        "total_steps": 10,
        "batch_norm": "mean",
        "skips_overflow": False,
        "log_every": 4,
        "images_every": 0,
    }
    settings = LoopSettings(**{**values, **settings}, pauses_at=pauses_at)
    try:
        train_steps(engine, batches, step_fn, lambda step: 0.1 * (step + 1), monitor, settings, pauses.append)
    finally:
        monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return engine, pauses, lines


def test_logs_every_few_steps_and_at_the_end_and_pauses_when_asked(tmp_path):
    engine, pauses, lines = train(tmp_path, Steps(10), lambda done: done in (3, 10))
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert pauses == [3, 10]
    assert lines[0]["learning_rate"] == pytest.approx(0.4)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    assert 0 <= lines[-1]["data_wait_share"] <= 1
    assert lines[-1]["gradient_norm"] > 0


def test_nothing_is_saved_after_a_loss_that_is_not_finite(tmp_path):
    saved = []

    def pauses_at(done):
        saved.append(done)
        return done == 7

    with pytest.raises(FloatingPointError, match="step 7"):  # between two logged steps, and before the pause at 7
        train(tmp_path, Steps(10, bad=5), pauses_at)
    assert saved[-1] == 7

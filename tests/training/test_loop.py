"""The loop's own arithmetic, around a plain PyTorch engine (around DeepSpeed: test_engine.py, tests/test_pretrain.py)."""

import io
import json
import signal
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from torch import nn

from imitate_ds.flight import flight
from imitate_ds.training.drain import Drain
from imitate_ds.training.loop import Calls, LoopSettings, StepOutput, Stopped, train_steps
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


def train(
    tmp_path, batches, pauses_at, *, engine=None, drain=None, on_step=lambda step: None, infinite_loss=None, **settings
):
    engine, pauses, skipped = engine or PlainEngine(), [], []

    def step_fn(batch):
        on_step(batch.step)
        loss = engine.module(torch.ones(2, 2)).square().mean() * (float("nan") if batch.bad else 1.0)
        loss.backward()
        if batch.step == infinite_loss:
            loss = loss * float("inf")
        return StepOutput(loss.detach(), {"loss": loss.detach()}, lambda: {"x": torch.zeros(1, 2, 2)})

    monitor = Monitor(tmp_path, start_step=0, total_steps=10, speaks=True, console=Console(file=io.StringIO()))
    values = {
        "seed": 0,
        "total_steps": 10,
        "global_batch_size": 2,
        "batch_norm": "mean",
        "skips_overflow": False,
        "log_every": 4,
        "images_every": 0,
        "lowest_temperature": 0.0,
    }
    settings = LoopSettings(**{**values, **settings})
    calls = Calls(pauses_at, pauses.append, lambda rate: {"more": 7.0}, lambda step, *_: skipped.append(step))
    rate = lambda step: 0.1 * (step + 1)  # noqa: E731
    try:
        ended = train_steps(engine, batches, step_fn, rate, monitor, settings, calls, drain or Drain())
    finally:
        monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return Trained(engine, pauses, lines, skipped, ended)


class Trained(NamedTuple):
    engine: PlainEngine
    pauses: list[int]
    lines: list[dict]
    skipped: list[int]
    ended: Stopped | None


def test_logs_every_few_steps_and_at_the_end_and_pauses_when_asked(tmp_path):
    engine, pauses, lines, _, ended = train(tmp_path, Steps(10), lambda done: done in (3, 10))
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert pauses == [3, 10]
    assert ended is None
    assert lines[0]["learning_rate"] == pytest.approx(0.4)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    assert 0 <= lines[-1]["data_wait_share"] <= 1
    assert lines[-1]["gradient_norm"] > 0
    assert lines[-1]["more"] == 7


def test_what_it_waits_for_is_data_from_the_first_batch_on(tmp_path):
    doing = []

    def batches():
        for step in Steps(2):
            doing.append(flight.doing)
            yield step

    flight.begin("building the model")
    train(tmp_path, batches(), lambda done: False)
    assert doing == ["waiting for data"] * 2


def test_a_step_without_a_finite_gradient_is_skipped_and_told(tmp_path):
    engine, weights = PlainEngine(), []
    trained = train(
        tmp_path,
        Steps(10, bad=5),
        lambda done: False,
        engine=engine,
        on_step=lambda step: weights.append(engine.module.weight.detach().clone()),
    )
    assert trained.skipped == [5]
    assert not torch.equal(weights[4], weights[5])
    assert torch.equal(weights[5], weights[6])
    assert engine.module.weight.isfinite().all()


def test_nothing_is_saved_after_a_loss_that_is_not_finite_though_its_gradient_is(tmp_path):
    with pytest.raises(FloatingPointError, match="step 7"):  # between two logged steps, and before the pause at 7
        train(tmp_path, Steps(10), lambda done: done == 7, infinite_loss=5)


def test_all_stop_one_step_after_one_is_asked_to(tmp_path):
    drain = Drain()
    trained = train(
        tmp_path, Steps(10), lambda done: False, drain=drain, on_step=lambda s: s == 4 and drain.hear(signal.SIGUSR1)
    )
    assert trained.ended == Stopped(6, 0, "SIGUSR1")


def test_asked_in_the_last_steps_the_run_ends_as_it_would_have(tmp_path):
    drain = Drain()
    trained = train(
        tmp_path, Steps(10), lambda done: False, drain=drain, on_step=lambda s: s == 9 and drain.hear(signal.SIGTERM)
    )
    assert trained.ended is None

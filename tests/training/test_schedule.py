"""The learning rate over a run."""

import itertools

import pytest

from imitate_ds.config import OptimConfig
from imitate_ds.training.schedule import learning_rate, restart_period


def test_published_period():
    assert restart_period(213_384, 128, 20) == 33_341


def test_warm_up_then_cosine_to_the_floor():
    optim = OptimConfig(lr=1.0, warmup_share=0.1, final_lr_share=0.01)
    rates = [learning_rate(step, 100, optim) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.505)  # half-way down
    assert rates[100] == pytest.approx(0.01)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates[9:]))


def test_restarts_begin_again_at_the_full_rate():
    optim = OptimConfig(lr=1.0, warmup_share=0.0, final_lr_share=0.0, schedule="cosine_restarts")
    assert learning_rate(0, 100, optim, period=30) == 1.0
    assert learning_rate(30, 100, optim, period=30) == 1.0
    assert learning_rate(29, 100, optim, period=30) < 0.01
    with pytest.raises(ValueError, match="period"):
        learning_rate(0, 100, optim)

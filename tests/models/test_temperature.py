"""The learned temperature: its gradient, its floor, and how it travels."""

import pytest
import torch
from torch.nn.functional import normalize

from imitate_ds.config import TemperatureConfig
from imitate_ds.models.temperature import LearnableTemperature
from imitate_ds.ops.contrastive import clinical_contrastive_loss

LEARNABLE = TemperatureConfig(init=0.07, learnable=True, min=0.01)


def test_it_begins_where_it_is_told_and_has_one_dimension():
    temperature = LearnableTemperature(LEARNABLE)
    assert temperature().item() == pytest.approx(0.07)
    assert [list(p.shape) for p in temperature.parameters()] == [[1]]
    assert temperature.bfloat16()().dtype == torch.float32


def test_its_gradient_is_that_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    query, keys = (normalize(torch.randn(12, 8, generator=generator, dtype=torch.float64), dim=1) for _ in "qk")
    prior = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    temperature = LearnableTemperature(LEARNABLE)
    clinical_contrastive_loss(query, keys, prior, temperature=temperature()).backward()
    tau = torch.tensor([0.07], dtype=torch.float64, requires_grad=True)
    clinical_contrastive_loss(query, keys, prior, temperature=tau).backward()
    expected = tau.grad * (0.07 - 0.01)  # d tau / d p at p = 0
    torch.testing.assert_close(temperature.exponent.grad.double(), expected, rtol=1e-5, atol=0)


def test_it_stays_above_its_floor_and_comes_back():
    temperature = LearnableTemperature(LEARNABLE)
    optimizer = torch.optim.Adam(temperature.parameters(), lr=0.02)
    reached = []
    for direction in (1.0, -1.0):
        for _ in range(1000):
            optimizer.zero_grad()
            tau = temperature()
            (direction * tau).sum().backward()
            assert tau > LEARNABLE.min
            assert temperature.exponent.grad.abs() > 0
            optimizer.step()
        reached.append(tau.item())
    assert reached[0] < 0.012
    assert reached[1] > LEARNABLE.init


def test_however_low_the_parameter_falls_the_floor_holds():
    temperature = LearnableTemperature(LEARNABLE)
    torch.nn.init.constant_(temperature.exponent, -1e4)
    assert temperature().item() == pytest.approx(0.01)

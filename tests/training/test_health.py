import pytest
import torch

from imitate_ds.training import health
from imitate_ds.training.health import Watch, straggler


def steady(watch, count=20):
    return [watch.warnings({"loss": 10 + 0.1 * (step % 3), "temperature": 0.07}) for step in range(count)]


def test_a_loss_that_jumps_is_said_and_noise_is_not():
    watch = Watch()
    assert not any(steady(watch))
    (said,) = watch.warnings({"loss": 14.0})
    assert "jumped to 14, from about 10.1" in said
    assert not watch.warnings({"loss": 10.3})
    assert not watch.warnings({"loss": float("nan")})  # that is not for this one to say
    assert not watch.warnings({"loss": 10.1})


def test_early_losses_are_no_jump():
    assert not Watch().warnings({"loss": 1e9})


def test_a_temperature_at_its_floor_is_said_once():
    watch = Watch(lowest_temperature=0.01)
    assert not watch.warnings({"loss": 1.0, "temperature": 0.05})
    assert "at its floor" in watch.warnings({"loss": 1.0, "temperature": 0.0101})[0]
    assert not watch.warnings({"loss": 1.0, "temperature": 0.01})
    assert not Watch().warnings({"loss": 1.0, "temperature": 0.01})  # a constant one


def test_a_rank_that_lags_three_times_in_a_row_is_named():
    watch = Watch()
    lagging = {"loss": 1.0, "lag_share": 0.4, "slowest_rank": 3, "slowest_rank_data_wait_share": 0.35}
    assert [len(watch.warnings(lagging)) for _ in range(5)] == [0, 0, 1, 0, 0]
    assert not watch.warnings({**lagging, "lag_share": 0.01})
    assert [len(watch.warnings(lagging)) for _ in range(3)] == [0, 0, 1]


def test_the_slowest_rank_is_the_one_that_waits_least_for_others(monkeypatch):
    monkeypatch.setattr(health, "world", lambda: type("World", (), {"size": 3}))
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    now = torch.tensor([[5.0, 0.0], [2.0, 6.0], [6.0, 1.0]])
    found = straggler(before, now, seconds=10.0)
    assert found == {
        "lag_share": pytest.approx(0.4),
        "slowest_rank": 1,
        "slowest_rank_data_wait_share": pytest.approx(0.6),
    }


def test_alone_nobody_lags():
    assert straggler(torch.zeros(1, 2), torch.ones(1, 2), 1.0) == {}

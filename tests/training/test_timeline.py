"""Where the time goes, by what flight.begin says."""

import time

import pytest
import torch

from imitate_ds.flight import flight
from imitate_ds.training.timeline import Timeline


def test_seconds_by_kind_without_what_is_no_step():
    began = time.perf_counter()
    with Timeline(torch.device("cpu")) as timeline:
        for doing, seconds in [("forward", 0.02), ("loss", 0.01), ("validation", 0.03), ("between steps", 0)]:
            flight.begin(doing)
            time.sleep(seconds)
            with flight.collective("sum"):
                time.sleep(seconds / 2)
        spent = timeline.read()
    assert spent["forward"] >= 0.02
    assert spent["loss"] >= 0.01
    assert spent["communication"] >= 0.015
    assert sum(spent.values()) <= time.perf_counter() - began - 0.045  # the validation, with its collective
    flight.begin("forward")
    assert timeline.read()["forward"] == 0  # no longer listening


def test_shares_add_up_to_the_whole():
    with Timeline(torch.device("cpu")) as timeline:
        for doing in ("waiting for data", "forward", "loss", "backward", "optimizer step", "between steps"):
            flight.begin(doing)
            time.sleep(0.002)
        shares = timeline.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for kind, share in shares.items() if kind != "time/communication")

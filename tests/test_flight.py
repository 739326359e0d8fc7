import pytest

from imitate_ds.flight import KEPT, Flight


def test_a_collective_is_recorded_with_its_step_and_ends():
    flight = Flight()
    flight.begin("forward and backward", 7)
    with flight.collective("gather rows"):
        assert flight.doing == "forward and backward: gather rows"
    assert flight.doing == "forward and backward"
    (entry,) = flight.collectives
    assert (entry["number"], entry["name"], entry["step"]) == (1, "gather rows", 7)
    assert entry["ended"] >= entry["began"]
    assert flight.waited == pytest.approx(entry["ended"] - entry["began"])


def fail_in(flight):
    with flight.collective("sum"):
        raise RuntimeError


def test_one_that_fails_stays_unfinished():
    flight = Flight()
    with pytest.raises(RuntimeError):
        fail_in(flight)
    assert flight.collectives[-1]["ended"] is None
    assert flight.doing == "starting: sum"


def test_only_the_last_ones_are_kept():
    flight = Flight()
    for _ in range(KEPT + 5):
        with flight.collective("sum"):
            pass
    assert len(flight.collectives) == KEPT
    assert flight.collectives[0]["number"] == 6

"""Power laws through figures whose law is known."""

import itertools

import numpy as np
import pytest

from imitate_ds.evaluation.power_law import fit_power_law

X = np.geomspace(1e12, 1e15, 6)


def _runs(law, *, seeds, noise, rng):
    """x, y and settings of so many seeds at each x, with errors that are shares of y."""
    x = np.repeat(X, seeds)
    return x, law(x) * np.exp(noise * rng.normal(size=len(x))), np.repeat(np.arange(len(X)), seeds)


def test_a_law_without_noise_is_found_as_it_is():
    plain = fit_power_law(X, 30 * X**-0.12, range(6))
    assert plain is not None
    assert (plain.floor, plain.exponent) == (0, pytest.approx(0.12))
    assert plain.scale == pytest.approx(30)
    floored = fit_power_law(X, 1.7 + 4e4 * X**-0.4, range(6))
    assert floored is not None
    assert (floored.floor, floored.scale, floored.exponent) == (
        pytest.approx(1.7, rel=1e-4),
        pytest.approx(4e4, rel=1e-2),
        pytest.approx(0.4, rel=1e-3),
    )
    np.testing.assert_allclose(floored.at(X), 1.7 + 4e4 * X**-0.4, rtol=1e-5)


def test_what_falls_and_what_rises():
    rises = fit_power_law(X, X**0.05, range(6))
    assert rises is not None
    assert rises.exponent == pytest.approx(-0.05)
    level = fit_power_law(X, np.full(6, 3.0), range(6))
    assert level is not None
    assert level.exponent == pytest.approx(0, abs=1e-6)


def test_intervals_cover_an_exponent_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    trials, covered, in_band = 300, 0, 0
    for _ in range(trials):
        law = fit_power_law(*_runs(lambda x: 30 * x**-0.12, seeds=2, noise=0.03, rng=rng))
        assert law is not None
        assert law.intervals is not None
        low, high = law.intervals["exponent"]
        covered += low <= 0.12 <= high
        lower, upper = law.band(X)  # type: ignore[misc]
        in_band += lower[2] <= 30 * X[2] ** -0.12 <= upper[2]
    assert 0.88 <= covered / trials <= 0.99
    assert 0.88 <= in_band / trials <= 0.99


def test_intervals_cover_a_floor_that_the_runs_tell_of():
    rng = np.random.default_rng(1)
    found = [fit_power_law(*_runs(lambda x: 1.7 + 4e4 * x**-0.4, seeds=3, noise=0.02, rng=rng)) for _ in range(60)]
    floors = [law.intervals["floor"] for law in found if law and law.floor and law.intervals]
    assert len(floors) > 55, "a floor of two thirds of the last loss is seen through errors of 2 %"
    assert sum(low <= 1.7 <= high for low, high in floors) / len(floors) > 0.85


def test_no_floor_is_told_of_where_there_is_none():
    rng = np.random.default_rng(2)
    laws = [fit_power_law(*_runs(lambda x: 30 * x**-0.12, seeds=2, noise=0.03, rng=rng)) for _ in range(60)]
    assert sum(bool(law and law.floor) for law in laws) < 20


def test_few_runs_and_one_seed_give_no_interval_and_say_so():
    three = fit_power_law(X[:3], [3, 2, 1.5], range(3))
    assert three is not None
    assert three.intervals is None
    assert three.band(X) is None
    assert three.why_no_interval == "3 runs; an interval needs at least 4"
    one_seed = fit_power_law(X, [6, 5, 4, 3.3, 2.6, 2.2], range(6))
    assert one_seed is not None
    assert one_seed.why_no_interval.startswith("one seed")
    assert one_seed.as_dict()["intervals"] is None


def test_two_settings_are_no_law_whatever_the_number_of_seeds():
    assert fit_power_law([1, 1, 2, 2], [4, 4.1, 3, 3.1], [0, 0, 1, 1]) is None
    assert fit_power_law([5, 5, 5, 5], [4, 3, 2, 1], range(4)) is None
    assert fit_power_law([5, 5.01, 9, 9, 9], [4, 4.1, 3, 2, 1], range(5)) is None, "as of two budgets at many shares"


def test_what_has_no_logarithm_is_refused():
    for x, y in itertools.product((X[:3], [0, 1, 2]), ([1, 2, np.nan], [1, -1, 2])):
        with pytest.raises(ValueError, match="must be positive"):
            fit_power_law(x, y, range(3))

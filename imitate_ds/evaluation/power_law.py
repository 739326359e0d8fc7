"""Power laws through the figures of several runs, y = a + b x^-c, with what is known of their parameters.

Fitted in logarithms, so that errors are shares of y: "Scaling Laws for Neural Language Models" (Kaplan et al., 2020) has the law
without a floor a, "Scaling Laws for Autoregressive Generative Modeling" (Henighan et al., 2020) the law with one.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import t as student

LEAST_RUNS = 4  # of an interval
LEAST_SIZES = 3  # of a law: through two points there is always one
ALIKE = 0.01  # sizes that differ by a smaller share are one
FLOOR_STARTS = (0.3, 0.7, 0.9, 0.98)  # shares of the smallest y that the search for a floor begins at

Interval = tuple[float, float]


class PowerLaw(NamedTuple):
    """y = floor + scale x^-exponent, within the x that it was fitted to."""

    floor: float  # a; 0 where the runs tell of none
    scale: float  # b
    exponent: float  # c
    intervals: dict[str, Interval] | None  # 95 %, of floor, scale and exponent
    why_no_interval: str
    runs: int
    low: float  # smallest x
    high: float
    spread: float  # standard deviation of the residuals of log y
    fit: "_Fit"

    def at(self, x: np.ndarray) -> np.ndarray:
        return np.exp(self.fit.predict(np.log(x)))

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The 95 % interval of the law, not of a single run, at every x; None where none can be given."""
        if self.intervals is None:
            return None
        middle, width = self.fit.predict(np.log(x)), self.fit.half_width(np.log(x))
        return np.exp(middle - width), np.exp(middle + width)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        names = ("floor", "scale", "exponent", "intervals", "why_no_interval", "runs", "low", "high", "spread")
        return {"form": "a + b x^-c" if self.floor else "b x^-c", **{name: getattr(self, name) for name in names}}


def fit_power_law(x: ArrayLike, y: ArrayLike, settings: Iterable[Any]) -> PowerLaw | None:
    """The law with a floor where that is worth its parameter (AICc), else without; None for too few settings, or too few x.

    x, y > 0 of each run; settings: equal for runs that differ in their seed alone. The intervals are those of least squares
    (Student's t), which takes the scatter of the runs about the law, between seeds and because it is not quite a law, for
    noise. Raises ValueError where a value is not positive.
    """
    values = np.array([x, y], dtype=float)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("x, y: must be positive numbers, to stand in a power law")
    log_x, log_y = np.log(values)
    distinct = len(set(settings))
    ordered = np.sort(log_x)
    sizes = min(distinct, 1 + int((ordered[1:] - ordered[:-1] > ALIKE).sum()))
    if sizes < LEAST_SIZES:
        return None
    plain = _Fit.of(_line, log_x, log_y, (log_y.mean(), 0.0))
    floored = _with_floor(log_x, log_y) if sizes > LEAST_SIZES else None
    best = floored if floored and floored.aicc < plain.aicc else plain
    return _law(best, np.exp(log_x), why_not=_why_no_interval(len(log_x), distinct))


def _why_no_interval(runs: int, distinct: int) -> str:
    if runs < LEAST_RUNS:
        return f"{runs} runs; an interval needs at least {LEAST_RUNS}"
    return "one seed; what a run owes to chance is not known" if distinct == runs else ""


def _line(u: np.ndarray, height: float, exponent: float) -> np.ndarray:
    return height - exponent * u


def _line_on_floor(u: np.ndarray, height: float, exponent: float, log_floor: float) -> np.ndarray:
    return np.logaddexp(log_floor, height - exponent * u)


class _Fit(NamedTuple):
    """Least squares of log y against u = log x - middle, which keeps height and exponent apart."""

    form: Callable[..., np.ndarray]
    middle: float
    parameters: np.ndarray  # height at the middle, exponent, and the logarithm of the floor if there is one
    covariance: np.ndarray
    runs: int
    squares: float

    @staticmethod
    def of(form: Callable[..., np.ndarray], log_x: np.ndarray, log_y: np.ndarray, start: Sequence[float]) -> "_Fit":
        """Raises RuntimeError where the search finds no end."""
        middle = float(log_x.mean())
        with warnings.catch_warnings(action="ignore", category=OptimizeWarning):  # the covariance is then infinite
            parameters, covariance = curve_fit(form, log_x - middle, log_y, p0=start, maxfev=5000)
        squares = float(((form(log_x - middle, *parameters) - log_y) ** 2).sum())
        return _Fit(form, middle, parameters, covariance, len(log_x), squares)

    @property
    def freedom(self) -> int:
        return self.runs - len(self.parameters)

    @property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few points; infinite where there are too few for it."""
        count = len(self.parameters) + 1
        if self.runs - count - 1 <= 0:
            return np.inf
        penalty = 2 * count + 2 * count * (count + 1) / (self.runs - count - 1)
        return self.runs * np.log(max(self.squares, 1e-30) / self.runs) + penalty

    @property
    def quantile(self) -> float:
        return float(student.ppf(0.975, self.freedom))

    def predict(self, log_x: np.ndarray) -> np.ndarray:
        return self.form(log_x - self.middle, *self.parameters)

    def half_width(self, log_x: np.ndarray) -> np.ndarray:
        """Of the 95 % interval of log y, by the gradient with respect to the parameters."""
        slopes = []
        for number in range(len(self.parameters)):
            step = np.zeros(len(self.parameters))
            step[number] = 1e-5
            up, down = (self.form(log_x - self.middle, *(self.parameters + sign * step)) for sign in (1, -1))
            slopes.append((up - down) / 2e-5)
        gradient = np.stack(slopes, axis=-1)
        variance = np.einsum("...i,ij,...j->...", gradient, self.covariance, gradient)
        return self.quantile * np.sqrt(np.maximum(variance, 0))


def _with_floor(log_x: np.ndarray, log_y: np.ndarray) -> _Fit | None:
    """The best of several searches; None where the runs tell of no floor."""
    found = []
    for share in FLOOR_STARTS:
        floor = log_y.min() + np.log(share)
        above = np.log(np.exp(log_y) - np.exp(floor))
        slope = np.polyfit(log_x, above, 1)[0]
        try:
            found.append(_Fit.of(_line_on_floor, log_x, log_y, (above.mean(), -slope, floor)))
        except RuntimeError:
            continue  # no end within the calls that curve_fit is given: of this start there is none
    found = [fit for fit in found if np.isfinite(fit.covariance).all() and fit.parameters[1] > 0]
    return min(found, key=lambda fit: fit.squares, default=None)


def _law(fit: _Fit, x: np.ndarray, *, why_not: str) -> PowerLaw:
    height, exponent, *log_floor = fit.parameters
    # log b, the height at log x = 0
    at_one = np.array([1.0, fit.middle, *(0.0 for _ in log_floor)])
    widths = {
        "scale": fit.quantile * float(np.sqrt(at_one @ fit.covariance @ at_one)) if fit.freedom else 0.0,
        "exponent": fit.quantile * float(np.sqrt(fit.covariance[1, 1])) if fit.freedom else 0.0,
    }
    log_scale = height + exponent * fit.middle
    intervals: dict[str, Interval] = {
        "scale": (float(np.exp(log_scale - widths["scale"])), float(np.exp(log_scale + widths["scale"]))),
        "exponent": (float(exponent - widths["exponent"]), float(exponent + widths["exponent"])),
    }
    if log_floor:
        width = fit.quantile * float(np.sqrt(fit.covariance[2, 2]))
        intervals["floor"] = (float(np.exp(log_floor[0] - width)), float(np.exp(log_floor[0] + width)))
    return PowerLaw(
        floor=float(np.exp(log_floor[0])) if log_floor else 0.0,
        scale=float(np.exp(log_scale)),
        exponent=float(exponent),
        intervals=None if why_not else intervals,
        why_no_interval=why_not,
        runs=fit.runs,
        low=float(x.min()),
        high=float(x.max()),
        spread=float(np.sqrt(fit.squares / max(1, fit.freedom))),
        fit=fit,
    )

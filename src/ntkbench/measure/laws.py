"""Passes and seconds at which a method reaches an error: a law fitted to all measured budgets, with a bootstrap band.

The fastest budget whose median error happens to be small enough is chosen by luck, and its time is biased low. So no
single median is compared with an error. The law uses all budgets of a method: its median error falls at least as fast
as the inverse root of the passes, and its seconds grow with the passes. Both curves are isotonic regressions of
logarithms (Barlow et al. 1972), linear between budgets, and are not extrapolated beyond the largest one.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

RATE = 0.5
"""Errors fall at least as fast as ``passes**-RATE``, the rate of a mean of independent probes."""
RERUNS = 200
"""Reruns of the bootstrap."""
CONFIDENCE = 0.95
"""Confidence level of bands."""
FLOOR = 1e-9
"""Smaller errors count as this one; float32 does not resolve them."""
FEWEST_CALLS = 3
"""Minimum number of timed calls whose quartiles give the spread of seconds."""
DRIFT = 0.1
"""Minimum standard deviation of the logarithm of median seconds. Rows are timed one after another, in processes of
their own, on machines whose speed drifts, and more calls in the same process do not average that out."""
SLACK = 1 / 3
"""If the error at the smallest budget is below this share of a tolerance, its seconds are an upper bound."""
HALF_NORMAL = math.log(1.1503 / 0.3186) / 1.3490
"""Standard deviation of the logarithm of a lognormal number whose ratio of quartiles is that of |x|, x normal."""
COLUMNS = ("passes", "error", "error_q25", "error_q75", "seeds", "seconds", "seconds_q25", "seconds_q75")
"""Columns of measured budgets that a law is fitted to. ``calls``, if present, is the number of timed calls, and
``first_seed`` says whether budgets had the same seeds."""


class Reached(NamedTuple):
    """Passes and seconds to an error, each with the ends of its 95 % band; ``nan`` where the budgets do not tell."""

    passes: float
    passes_low: float
    passes_high: float
    seconds: float
    seconds_low: float
    seconds_high: float


@dataclass(frozen=True)
class Law:
    """Median errors and seconds of one method against passes, with bootstrap reruns of the measurement.

    Attributes:
        passes: measured budgets ``[K]``, increasing.
        errors: fitted median errors ``[1 + RERUNS, K]``; those of the measurement first.
        times: fitted seconds, likewise.
    """

    passes: np.ndarray
    errors: np.ndarray
    times: np.ndarray

    def budgets(self, error: float) -> np.ndarray:
        """Passes at which the median error is ``error``, ``[1 + RERUNS]``; ``nan`` where no budget reaches it.

        Any error that the smallest budget reaches gets that budget; see :meth:`at_most`.
        """
        within = self.errors <= error
        after = within.argmax(1)
        before, rows = np.maximum(after - 1, 0), np.arange(len(within))
        high, low = np.log(self.errors[rows, before]), np.log(self.errors[rows, after])
        share = np.where(after > 0, (high - math.log(error)) / np.where(after > 0, high - low, 1), 0)
        x = np.log(self.passes)
        return np.where(within[:, -1], np.exp(x[before] + share * (x[after] - x[before])), np.nan)

    def at_most(self, error: float) -> bool:
        """Whether even the smallest budget is far too large for an error, so that its seconds are an upper bound."""
        return bool(self.errors[0, 0] < SLACK * error)

    def seconds(self, budgets: np.ndarray) -> np.ndarray:
        """Seconds of each rerun at its budget, ``[1 + RERUNS]``; ``nan`` where the budget is ``nan``."""
        x = np.log(self.passes)
        pairs = zip(np.log(budgets), np.log(self.times), strict=True)
        return np.exp([np.interp(at, x, times) if at == at else np.nan for at, times in pairs])

    def error(self, passes: float) -> np.ndarray:
        """Median error at a budget, ``[1 + RERUNS]``; outside the measured range, that of the nearest budget."""
        x, at = np.log(self.passes), math.log(max(passes, self.passes[0]))
        return np.exp([np.interp(at, x, errors) for errors in np.log(self.errors)])

    def reached(self, error: float) -> Reached:
        """Passes and seconds to an error, with their bands."""
        budgets = self.budgets(error)
        return Reached(*banded(budgets), *banded(self.seconds(budgets)))


def banded(draws: np.ndarray) -> tuple[float, float, float]:
    """The first of some numbers, and its 95 % band from the others; a rerun without a number counts as infinite.

    The band's ends are bias-corrected quantiles (Efron 1981): if more than half of the reruns are below the number, the
    number itself is assumed to be biased low by as much.
    """
    if math.isnan(draws[0]):
        return math.nan, math.nan, math.nan
    others = np.where(np.isnan(draws[1:]), np.inf, draws[1:])
    below = float((others < draws[0]).mean() + (others == draws[0]).mean() / 2)
    bias = ndtri(np.clip(below, 0.5 / len(others), 1 - 0.5 / len(others)))
    tails = ndtr(2 * bias + ndtri([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    low, high = (float(end) for end in np.quantile(others, tails, method="nearest"))
    return float(draws[0]), low if math.isfinite(low) else math.nan, high if math.isfinite(high) else math.nan


def fit(points: pd.DataFrame, seed: int = 0, *, typical: float | None = None, drift: float = DRIFT) -> Law:
    """The law of one method on one problem.

    The bootstrap is parametric: the median of k errors varies like that of k lognormal numbers with the same quartiles,
    or with those of |x|, x normal, if these are further apart. The error of a method with one seed and
    without passes does not vary. Seconds vary like medians of lognormal numbers with the same quartiles; with fewer
    than :data:`FEWEST_CALLS` calls their spread is at least the typical one. Unless ``first_seed`` shows that budgets
    have different seeds, all their errors may be low together, and the bootstrap varies them together.

    Args:
        points: a row for each measured budget (a single one without passes), with :data:`COLUMNS`.
        seed: seed of the bootstrap.
        typical: what :func:`typical_spread` gives for the table; by default for these points.
        drift: minimum standard deviation of the logarithm of median seconds.
    """
    points = points.sort_values("passes", kind="stable")
    passes = points["passes"].fillna(1.0).clip(lower=1.0).to_numpy(float)
    errors, deviations = median_errors(points)
    seconds, of_seconds = median_seconds(points, typical=typical, drift=drift)
    seeds, calls = points["seeds"].fillna(1).clip(lower=1).to_numpy(float), _calls(points)

    rng = np.random.default_rng(seed)
    x, place = np.unique(np.log(passes), return_inverse=True)
    of_errors = functools.partial(_fitted, x, place, power=-RATE)
    of_times = functools.partial(_fitted, x, place, power=0.0)
    noise = rng.standard_normal((2, 1 + RERUNS, len(passes)))
    noise[:, 0] = 0
    if "first_seed" not in points or points["first_seed"].duplicated().any():
        noise[0] = noise[0, :, :1]
    return Law(
        np.exp(x),
        np.exp([of_errors(errors + row, seeds) for row in noise[0] * deviations]),
        np.exp([of_times(seconds + row, calls) for row in noise[1] * of_seconds]),
    )


def median_errors(points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of median errors, and their standard deviations over seeds.

    The deviation is 0 for deterministic methods, which have no passes and at most one seed.

    Args:
        points: as for :func:`fit`.
    """
    middle, spread = _logarithms(points, "error", FLOOR)
    seeds = points["seeds"].fillna(1).clip(lower=1).to_numpy(float)
    deterministic = points["passes"].isna() & (seeds <= 1)
    return middle, np.where(deterministic, 0.0, _of_median(np.maximum(spread, HALF_NORMAL), seeds))


def median_seconds(
    points: pd.DataFrame, *, typical: float | None = None, drift: float = DRIFT
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of median seconds, and their standard deviations over calls.

    Args:
        points: as for :func:`fit`.
        typical, drift: as for :func:`fit`.
    """
    middle, spread = _logarithms(points, "seconds", 1e-12)
    typical = typical_spread(points) if typical is None else typical
    spread = np.where(_spread_is_known(points), spread, np.maximum(spread, typical))
    return middle, np.maximum(_of_median(spread, _calls(points)), drift)


def smallest(middle: np.ndarray, deviations: np.ndarray, seed: int = 0) -> np.ndarray:
    """The probability of each of some independent normal numbers that it is the smallest, by 4,000 draws.

    Args:
        middle: means, ``[K]``.
        deviations: standard deviations, ``[K]``.
        seed: seed of the draws.
    """
    draws = middle + np.random.default_rng(seed).standard_normal((4000, len(middle))) * deviations
    return np.bincount(draws.argmin(1), minlength=len(middle)) / len(draws)


def typical_spread(points: pd.DataFrame) -> float:
    """Median spread of seconds over the rows of a table whose spread is known; 0 if there are none.

    Args:
        points: as for :func:`fit`, of any number of methods.
    """
    _, spread = _logarithms(points, "seconds", 1e-12)
    known = spread[_spread_is_known(points)]
    return float(np.median(known)) if len(known) else 0.0


def _spread_is_known(points: pd.DataFrame) -> np.ndarray:
    quartiles = points[["seconds_q25", "seconds_q75"]].notna().all(axis=1).to_numpy(bool)
    return quartiles & (_calls(points) >= FEWEST_CALLS)


def _calls(points: pd.DataFrame) -> np.ndarray:
    return points.get("calls", points["seeds"]).fillna(1).clip(lower=1).to_numpy(float)


def _of_median(spread: np.ndarray, count: np.ndarray) -> np.ndarray:
    return spread * np.sqrt(math.pi / 2 / count)


def fits(points: pd.DataFrame, keys: Sequence[str], drift: float = DRIFT) -> dict[tuple[object, ...], Law]:
    """The laws of all methods in a table, by the values of the columns ``keys``."""
    typical = typical_spread(points) if len(points) else 0.0
    return {
        case: fit(rows, zlib.crc32(repr(case).encode()), typical=typical, drift=drift)
        for case, rows in points.groupby(list(keys), sort=False)
    }


def _logarithms(points: pd.DataFrame, name: str, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of a column, and standard deviations of the logarithms of lognormal numbers with its quartiles."""
    middle, low, high = (
        np.log(points[column].fillna(points[name]).clip(lower=floor).to_numpy(float))
        for column in (name, f"{name}_q25", f"{name}_q75")
    )
    return middle, (high - low) / 1.3490


def _fitted(x: np.ndarray, place: np.ndarray, y: np.ndarray, weights: np.ndarray, *, power: float) -> np.ndarray:
    """The weighted least-squares curve ``y(x)`` with slopes at most ``power`` < 0, or at least 0 (``power`` 0)."""
    from scipy.optimize import isotonic_regression

    total = np.bincount(place, weights)
    mean = np.bincount(place, weights * y) / total - power * x
    return isotonic_regression(mean, weights=total, increasing=power == 0).x + power * x

"""Estimates over seeds against the exact value: the one loop that computes all errors of the suite."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ntkbench.errors import NtkbenchError
from ntkbench.estimate import RANGES, VISIBLE, Estimate
from ntkbench.measure.timing import Timed, quartiles


class BadEstimate(NtkbenchError):
    """A method returned something that is not a valid estimate."""


def checked(found: object, metric: str | None = None) -> Estimate:
    """The return value of a method, checked, as an estimate of plain floats.

    Args:
        found: the return value.
        metric: metric that the estimate should be of; any if not given.

    Raises:
        BadEstimate: it is not an :class:`Estimate`, is of another metric, or has a number that is not real and finite,
            or is out of range (a standard error may be ``nan``, which means that the budget was too small to tell).
    """
    if not isinstance(found, Estimate):
        raise BadEstimate(f"the method returned {_described(found)}, not an Estimate")
    if metric and found.metric != metric:
        raise BadEstimate(f"the estimate is of {found.metric!r}, not of {metric!r}")
    value = _real("value", found.value)
    low, high = RANGES.get(found.metric, (-math.inf, math.inf))
    if not low - VISIBLE <= value <= high + VISIBLE:
        raise BadEstimate(f"the estimate's value is {value:g}; possible for {found.metric}: {low:g} to {high:g}")
    passes = None if found.passes is None else _real("passes", found.passes, least=0)
    error = None if found.standard_error is None else _real("standard_error", found.standard_error, nan=True, least=0)
    # There may be 0 degrees of freedom where the error is not known.
    least = 0 if error is None or math.isnan(error) else math.ulp(0)
    degrees = _real("degrees", found.degrees, infinite=True, least=least)
    if found.certificate is not None:
        _real("certificate", found.certificate, infinite=True, least=0)
    notes = tuple(" ".join(str(note).split()) for note in found.notes)
    return replace(found, value=value, passes=passes, standard_error=error, degrees=degrees, notes=notes)


def _real(name: str, value: object, *, nan: bool = False, infinite: bool = False, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadEstimate(f"the estimate's {name} is {_described(value)}, not a number")
    number = float(value)
    if (math.isnan(number) and not nan) or (math.isinf(number) and not infinite):
        raise BadEstimate(f"the estimate's {name} is {number}")
    if number < least:
        raise BadEstimate(f"the estimate's {name} is {number:g}; possible: {'more than' if least else 'at least'} 0")
    return number


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    size = f" of shape {tuple(shape)}" if shape is not None else ""
    return "None" if value is None else f"a {type(value).__name__}{size}"


def relative_error(value: float, exact: float) -> float:
    """|value - exact| / |exact|; 0 where both are 0.

    Raises:
        BadEstimate: the exact value is 0 and the estimate is not.
    """
    if value == exact:
        return 0.0
    if exact == 0:
        raise BadEstimate(f"the exact value is 0, and the relative error of {value:g} is not defined")
    return abs(value - exact) / abs(exact)


@dataclass
class Reruns:
    """Estimates of one quantity with different seeds.

    Attributes:
        exact: the exact value, in float64.
        dtype: precision of the estimates, which determines how much rounding may widen an interval.
        power: errors are reported for this power of estimate and exact value; 2 for the square of a norm.
        estimates: estimates so far.
        seconds: seconds of each estimate that :meth:`run` made.
    """

    exact: float
    dtype: str
    power: int = 1
    estimates: list[Estimate] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, estimate: Callable[[int], object], seeds: Sequence[int]) -> Reruns:
        """Add an estimate for each seed.

        Args:
            estimate: computes the estimate of a seed; ends with a number on the host.
            seeds: seeds, in order.

        Raises:
            BadEstimate: one of them is not a valid estimate; see :func:`checked`.
        """
        for seed in seeds:
            start = time.perf_counter()
            found = estimate(seed)
            self.seconds.append(time.perf_counter() - start)
            self.estimates.append(checked(found))
        return self

    @property
    def errors(self) -> list[float]:
        """Relative errors, one per seed."""
        return [relative_error(e.value**self.power, self.exact**self.power) for e in self.estimates]

    @property
    def timed(self) -> Timed:
        """Seconds of the estimates; the first one, which traces and compiles, is not among the timed ones."""
        return Timed(self.seconds[0], self.seconds[1:], self.estimates[0])

    def columns(self) -> dict[str, Any]:
        """Columns of a row: values, errors, coverage, passes and the number of seeds."""
        first = self.estimates[0]
        known = [e.standard_error for e in self.estimates if e.standard_error is not None]
        covered = [e.covers(self.exact, self.dtype) for e in self.estimates]
        return {
            **quartiles("value", [e.value for e in self.estimates]),
            "reference": self.exact,
            **quartiles("error", self.errors),
            "standard_error": float(np.median(known)) if known else None,
            "covered": float(np.mean(covered)) if known else None,
            "certificate": max((e.certificate for e in self.estimates if e.certificate is not None), default=None),
            "passes_spent": first.passes,
            "seeds": len(self.estimates),
            "notes": "; ".join(first.notes),
        }

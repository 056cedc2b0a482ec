"""The result of a method: a value, its standard error and interval, and its cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

Scale = tuple[Callable[[float], float], Callable[[float], float], Callable[[float], float]]
"""A monotone map, its derivative and its inverse."""

LOG: Scale = (math.log, lambda value: 1 / value, lambda x: math.exp(min(x, 700.0)))
ATANH: Scale = (math.atanh, lambda value: 1 / (1 - value**2), math.tanh)

SCALES = {"trace": LOG, "norm": LOG, "effective_rank": LOG, "alignment": ATANH}
"""Scale on which the errors of each metric are symmetric: log for positive metrics, Fisher's z for a correlation."""

ROUNDING = 100
"""Machine epsilons, relative to the exact value, by which an interval may miss it and still cover it."""


@dataclass(frozen=True)
class Estimate:
    """One metric of the NTK as one method computed it.

    Attributes:
        value: the metric.
        standard_error: standard error of ``value``; ``None`` for a deterministic method, ``nan`` if the budget of a
            stochastic method was too small to estimate it.
        passes: passes spent, from the operator's counter; one pass is one JVP or one VJP over the whole batch. ``None``
            for a method whose cost is not a number of passes.
        method: the method's name.
        notes: remarks on how the value was computed, such as parameters that had no fast rule.
        metric: the metric's name.
        degrees: degrees of freedom of the standard error.
        certificate: the largest relative difference between a gradient that the method used and that of plain autograd;
            ``None`` where there is no network to compare with.
    """

    value: float
    standard_error: float | None
    passes: float | None
    method: str
    notes: tuple[str, ...] = ()
    metric: str = ""
    degrees: float = math.inf
    certificate: float | None = None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval for the exact value; a single point for a deterministic method.

        It is value +- t * standard_error, with the quantile t of Student's distribution for the degrees of freedom, on
        the scale on which the metric's errors are symmetric: log for trace, norm and effective rank, atanh for the
        alignment. The delta method transforms the standard error to that scale. With few probes on a steep spectrum
        this raises the coverage from 75 % to 90 %. The interval is unbounded if the standard error is not known.
        """
        if not self.standard_error:
            return self.value, self.value
        if math.isnan(self.standard_error) or self.degrees <= 0:
            return -math.inf, math.inf
        spread = float(stdtrit(self.degrees, 0.5 + confidence / 2)) * self.standard_error
        scale = SCALES.get(self.metric)
        in_domain = self.value > 0 if scale is LOG else abs(self.value) < 1
        if scale is None or not in_domain:
            return self.value - spread, self.value + spread
        transform, derivative, inverse = scale
        centre, spread = transform(self.value), derivative(self.value) * spread
        return inverse(centre - spread), inverse(centre + spread)

    def covers(self, exact: float, dtype: str, confidence: float = 0.95) -> bool:
        """Whether the interval covers the exact value, up to rounding in ``dtype``."""
        rounding = ROUNDING * float(np.finfo(dtype).eps) * abs(exact)
        low, high = self.interval(confidence)
        return low - rounding <= exact <= high + rounding

    def relative_width(self, confidence: float = 0.95) -> float:
        """The larger distance from the value to an end of the interval, relative to the value."""
        low, high = self.interval(confidence)
        reach = max(self.value - low, high - self.value)
        if reach == 0:
            return 0.0
        return reach / abs(self.value) if self.value else math.inf

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        cost = "" if self.passes is None else f", {self.passes:g} passes"
        if self.standard_error is None:
            return f"{self.value:.6g} ({self.method}{cost})"
        low, high = self.interval()
        if math.isinf(low):
            return f"{self.value:.6g}, error unknown ({self.method}{cost})"
        return f"{self.value:.6g}, 95 % in [{low:.6g}, {high:.6g}] ({self.method}{cost})"

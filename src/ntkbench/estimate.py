"""What a method answers: a value, how far to trust it, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

Scale = tuple[Callable[[float], float], Callable[[float], float], Callable[[float], float]]
"""A map, its derivative and its inverse."""

LOG: Scale = (math.log, lambda value: 1 / value, lambda x: math.exp(min(x, 700.0)))
ATANH: Scale = (math.atanh, lambda value: 1 / (1 - value**2), math.tanh)

SCALES = {"trace": LOG, "norm": LOG, "effective_rank": LOG, "alignment": ATANH}
"""On which the errors of a metric are symmetric: what is positive errs by factors, a correlation as Fisher's z does."""


ROUNDING = 100
"""Units in the last place by which an interval may miss and still count as holding the exact value."""


@dataclass(frozen=True)
class Estimate:
    """One metric of the NTK as one method computed it.

    Attributes:
        value: the metric.
        standard_error: standard error of ``value``; ``None`` when the method is deterministic, ``nan`` when it is
            random but the budget was too small to tell.
        passes: Jacobian passes really spent (one pass is one JVP or one VJP over the whole batch), read off the
            operator's counter; ``None`` for methods that are not made of passes.
        method: the method's name.
        notes: what the user should know about how it was computed, such as parameters that had no fast rule.
        metric: the metric's name.
        degrees: degrees of freedom of the standard error.
    """

    value: float
    standard_error: float | None
    passes: float | None
    method: str
    notes: tuple[str, ...] = ()
    metric: str = ""
    degrees: float = math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """An interval that holds the exact value with about this probability; a point for deterministic methods.

        It is value +- t * standard_error, with Student's t for the error's degrees of freedom, on the scale on which
        the metric's errors are symmetric: log for trace, norm and effective rank, atanh for the alignment. The error
        is carried over to that scale by the delta method. With few probes on a steep spectrum that makes the
        difference between a coverage of 75 % and one of 90 %. Everything is possible where the error is not known.
        """
        if not self.standard_error:
            return self.value, self.value
        if math.isnan(self.standard_error) or self.degrees <= 0:
            return -math.inf, math.inf
        spread = float(stdtrit(self.degrees, 0.5 + confidence / 2)) * self.standard_error
        forth, slope, back = SCALES.get(self.metric, (None, None, None))
        inside = self.value > 0 if forth is math.log else abs(self.value) < 1
        if forth is None or not inside:
            return self.value - spread, self.value + spread
        centre, spread = forth(self.value), slope(self.value) * spread
        return back(centre - spread), back(centre + spread)

    def covers(self, exact: float, dtype: str, confidence: float = 0.95) -> bool:
        """Whether the interval holds the exact value, but for rounding in ``dtype``, which is in no standard error."""
        rounding = ROUNDING * float(np.finfo(dtype).eps) * abs(exact)
        low, high = self.interval(confidence)
        return low - rounding <= exact <= high + rounding

    def relative_width(self, confidence: float = 0.95) -> float:
        """How far the interval reaches from the value, as a share of the value."""
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

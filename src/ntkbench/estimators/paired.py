"""Paired comparison of operators: all are applied to the same probes.

For positive semi-definite M_0, M_1, ... and shared random signs u, u^T M u, ||M u||^2 and <M_0 u, M u> have the means
tr M, ||M||_F^2 and tr(M_0 M). The estimates of similar operators are strongly correlated, so the standard error of a
ratio, by the jackknife over probes, is below that of independent estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkbench.estimators import standard_errors
from ntkbench.metrics import METRICS, Moments
from ntkbench.operators import arrays


@dataclass(frozen=True)
class Comparison:
    """A metric of an operator, and its ratio to that of the first operator.

    Attributes:
        quantity: trace, norm, effective_rank, or alignment with the first operator.
        value: its estimate.
        standard_error: of the value.
        ratio: the value over that of the first operator, whose alignment with itself is 1.
        ratio_standard_error: of the ratio, from paired probes.
    """

    quantity: str
    value: float
    standard_error: float
    ratio: float
    ratio_standard_error: float


class SharedProbes:
    """Compares operators on k shared probes, one operator after the other.

    Args:
        u: random signs ``[k, n]`` of either backend.
    """

    def __init__(self, u: Any) -> None:
        self._u = u
        self._first: Any = None

    def compare(self, image: Any) -> list[Comparison]:
        """The four metrics of an operator, and their ratios to those of the first operator.

        Args:
            image: M u for each probe, ``[k, n]``.
        """
        if self._first is None:
            self._first = image
        pairs = ((self._u, image), (image, image), (self._u, self._first), (self._first, self._first))
        columns = [arrays.gather([(a * b).sum(1)]) for a, b in (*pairs, (image, self._first))]
        return [_comparison(quantity, columns) for quantity in METRICS]


def _comparison(quantity: str, columns: list[np.ndarray]) -> Comparison:
    def value(trace: float, square: float, trace_0: float, square_0: float, cross: float) -> float:
        return Moments(trace, square, square_0, cross).metric(quantity)

    def ratio(trace: float, square: float, trace_0: float, square_0: float, cross: float) -> float:
        first = 1.0 if quantity == "alignment" else Moments(trace_0, square_0).metric(quantity)
        return value(trace, square, trace_0, square_0, cross) / first

    own, relative = (standard_errors.jackknife(f, *columns) for f in (value, ratio))
    return Comparison(quantity, own.value, own.standard_error, relative.value, relative.standard_error)

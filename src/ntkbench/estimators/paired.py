"""Operators compared by what the same probes say of each of them, so that what sets them apart is paired.

For positive semi-definite M_0, M_1, ... and random signs u that they share, u^T M u, ||M u||^2 and <M_0 u, M u> have
the means tr M, ||M||_F^2 and tr(M_0 M). What two operators have in common moves both estimates alike, so the standard
error of a difference, which is the jackknife's over probes, is below that of independent estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkbench.estimators import standard_errors
from ntkbench.metrics import Moments

QUANTITIES = ("trace", "norm", "effective_rank", "alignment")


@dataclass(frozen=True)
class Compared:
    """A metric of an operator against the first one.

    Attributes:
        quantity: trace, norm, effective_rank, or alignment with the first operator.
        value: its estimate.
        standard_error: of the value by itself.
        ratio: the value over that of the first operator (whose alignment with itself is 1).
        ratio_standard_error: of the ratio, from pairs.
    """

    quantity: str
    value: float
    standard_error: float
    ratio: float
    ratio_standard_error: float


class Probes:
    """What k common probes say of one operator after the other.

    Args:
        u: random signs ``[k, n]`` of either backend, the same for all operators.
    """

    def __init__(self, u: Any) -> None:
        self._u = u
        self._first: Any = None

    def compare(self, image: Any) -> list[Compared]:
        """The four metrics of an operator, against the first that was given.

        Args:
            image: M u for each probe, ``[k, n]``.
        """
        if self._first is None:
            self._first = image
        pairs = ((self._u, image), (image, image), (self._u, self._first), (self._first, self._first))
        columns = [standard_errors.by_probe([(a * b).sum(1)]) for a, b in (*pairs, (image, self._first))]
        return [_compared(quantity, columns) for quantity in QUANTITIES]


def _compared(quantity: str, columns: list[np.ndarray]) -> Compared:
    def value(trace: float, square: float, trace_0: float, square_0: float, cross: float) -> float:
        return Moments(trace, square, square_0, cross).metric(quantity)

    def ratio(trace: float, square: float, trace_0: float, square_0: float, cross: float) -> float:
        first = 1.0 if quantity == "alignment" else Moments(trace_0, square_0).metric(quantity)
        return value(trace, square, trace_0, square_0, cross) / first

    own, relative = (standard_errors.jackknife(f, *columns) for f in (value, ratio))
    return Compared(quantity, own.value, own.error, relative.value, relative.error)

"""What a method answers: a value, how far to trust it, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    """

    value: float
    standard_error: float | None
    passes: float | None
    method: str
    notes: tuple[str, ...] = ()

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """The normal-theory interval ``value +- z * standard_error``; a point for deterministic methods."""
        spread = z * (self.standard_error or 0.0)
        return self.value - spread, self.value + spread

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        cost = "" if self.passes is None else f", {self.passes:g} passes"
        if self.standard_error is None:
            return f"{self.value:.6g} ({self.method}{cost})"
        if math.isnan(self.standard_error):
            return f"{self.value:.6g} +- unknown ({self.method}{cost})"
        return f"{self.value:.6g} +- {1.96 * self.standard_error:.2g} (95 %, {self.method}{cost})"

"""Predicted costs of methods as a table, and the line of Python that uses the best one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ntkbench.units import aligned, bytes_label, percent_label, seconds_label


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one method for one metric.

    Attributes:
        method: its name.
        kind: ``exact``, ``approximate`` or ``stochastic``.
        passes: expected number of passes; ``None`` if its cost is not a number of passes.
        seconds: seconds of one estimate, after the network has been checked and traced.
        bytes: peak bytes, besides the network.
        error: relative error: the bias of an approximate method, the standard error of a stochastic one, 0 for an exact
            one; ``None`` if it is not known.
        within: the relative half-width of its interval, or its bias; ``None`` if it is not known.
        budget: passes to give to a stochastic method; ``None`` for the others.
        accepts_rtol: whether the method takes a tolerance itself.
        operations: those of the passes and of products of gradients and kernels, counted from shapes; a multiplication
            with its addition counts as two. ``None`` if the cost is not a number of passes.
        reason: why it does not apply; empty if it does.
        samples: the largest number of samples of the network on which the method ran for the prediction; if these are
            all samples, ``seconds`` are measured, and at most scaled to the budget. ``None`` if it ran on a stand-in.
    """

    method: str
    kind: str
    passes: float | None = None
    seconds: float | None = None
    bytes: int | None = None
    error: float | None = None
    within: float | None = None
    budget: int | None = None
    accepts_rtol: bool = False
    operations: float | None = None
    reason: str = ""
    samples: int | None = None


HEADER = ("method", "kind", "passes", "operations", "seconds", "memory", "error", "")


class Costs(list[Cost]):
    """Predicted costs of all methods for one metric: those within the tolerance first, the fastest of them on top.

    Attributes:
        metric: the metric.
        rtol: the tolerance.
        notes: how the numbers were obtained.
        confidence: confidence level of the intervals.
    """

    def __init__(
        self, costs: Iterable[Cost], metric: str, rtol: float, notes: tuple[str, ...] = (), confidence: float = 0.95
    ) -> None:
        self.metric, self.rtol, self.notes, self.confidence = metric, rtol, notes, confidence
        super().__init__(sorted(costs, key=self._order))

    @property
    def best(self) -> Cost | None:
        """The fastest method within the tolerance; ``None`` if there is none."""
        return self[0] if self and self.meets(self[0]) else None

    def meets(self, cost: Cost) -> bool:
        """Whether a method is within the tolerance; a biased one never is, whatever its error on a few samples."""
        return cost.kind != "approximate" and cost.within is not None and cost.within <= self.rtol

    def code(self, *more: str) -> str:
        """The line of Python that uses the best method; empty if there is none.

        Args:
            more: further arguments as source text, such as ``call=call``, which are not known here.
        """
        if (best := self.best) is None:
            return ""
        given = [f'method="{best.method}"']
        if best.kind == "stochastic":
            given.append(f"rtol={self.rtol:g}" if best.accepts_rtol else f"passes={best.budget}")
            given += [f"confidence={self.confidence:g}"] * (best.accepts_rtol and self.confidence != 0.95)
        networks = "model, other, inputs" if self.metric == "alignment" else "model, inputs"
        return f"ntkbench.{self.metric}({', '.join((networks, *given, *more))})"

    def __repr__(self) -> str:
        return "\n".join([aligned([HEADER, *map(self._cells, self)]), *self.notes])

    def _order(self, cost: Cost) -> tuple[bool, bool, float, str]:
        seconds = math.inf if cost.seconds is None else cost.seconds
        return bool(cost.reason), not self.meets(cost), seconds, cost.method

    def _cells(self, cost: Cost) -> tuple[str, ...]:
        if cost.reason:
            return cost.method, cost.kind, "", "", "", "", "", cost.reason
        error = "exact" if cost.kind == "exact" else "unknown"
        if error == "unknown" and cost.error is not None:
            error = percent_label(cost.error)
        return (
            cost.method,
            cost.kind,
            "" if cost.passes is None else f"{cost.passes:.0f}",
            "" if cost.operations is None else f"{cost.operations:.1e}",
            "" if cost.seconds is None else seconds_label(cost.seconds),
            "" if cost.bytes is None else bytes_label(cost.bytes),
            error,
            "" if self.meets(cost) else "has a bias" if cost.kind == "approximate" else f"over rtol={self.rtol:g}",
        )

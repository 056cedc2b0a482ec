"""Base classes of methods that draw random probes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from ntkbench import metrics
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate, rounding_bound
from ntkbench.estimators.accumulators import Accumulator
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base.method import Method, PreparedProblem, certificate, notes
from ntkbench.operators import JacobianOperator, Rng
from ntkbench.options import Target
from ntkbench.problem import Problem


class Stochastic(Method):
    """A method that draws as many probes as a budget of passes allows.

    Attributes:
        fewest_probes: the fewest that give a standard error.
        default_passes: the budget if the user gives none.
    """

    kind = "stochastic"
    fewest_probes: ClassVar[int] = 2
    default_passes: ClassVar[int] = 256

    @abstractmethod
    def passes_per_probe(self, metric: str) -> int:
        """Passes that each probe of the method's nominal number takes."""

    @abstractmethod
    def spend(self, prepared: Any, metric: str, passes: int, seed: int) -> Estimate:
        """:meth:`estimate`, with a budget that is large enough."""

    def default_max_passes(self, problem: Problem) -> int | None:
        """Upper limit on the budget if the user gives none; ``None`` for no limit."""
        return None

    def least_passes(self, problem: Problem, metric: str) -> int:
        """The smallest budget for a problem."""
        return self.cost(metric, self.fewest_probes)

    def cost(self, metric: str, probes: int) -> int:
        """Passes that a nominal number of probes takes, as long as it is less than n."""
        return probes * self.passes_per_probe(metric)

    def probes(self, metric: str, passes: int) -> int:
        """The largest nominal number of probes within a budget."""
        return passes // self.passes_per_probe(metric)

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        if reason is None and passes is not None and passes < (least := self.least_passes(problem, metric)):
            return _takes(metric, least)
        return reason

    def estimate(self, prepared: Any, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        if passes is None:
            raise BadInput(f"{self.name} is stochastic and needs passes, a positive number; got none")
        if passes < (least := self.cost(metric, self.fewest_probes)):
            raise BadInput(f"{self.name}: {_takes(metric, least)}; got {passes}")
        return self.spend(prepared, metric, passes, seed)


def _takes(metric: str, least: int) -> str:
    return f"{metric} takes at least {least} passes"


class FixedBudget(Stochastic):
    """A stochastic method that has to know its budget in advance, for example to size a sketch.

    Attributes:
        gradients_held: vectors of length P that are in memory at a time, for each probe.
    """

    gradients_held: ClassVar[float] = 0

    @abstractmethod
    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        """The metric from a nominal number of probes."""

    def spend(self, prepared: PreparedProblem, metric: str, passes: int, seed: int) -> Estimate:
        jacobians = prepared.jacobians(metric)
        value, error, degrees = self.draw(metric, jacobians, self.probes(metric, passes), jacobians[0].rng(seed))
        spent = sum(j.passes for j in jacobians)
        found = certificate(jacobians)
        terms = max(jacobians[0].n, *(j.P for j in jacobians))
        return Estimate(
            value,
            error,
            spent,
            self.name,
            notes(jacobians),
            metric,
            degrees,
            found,
            rounding=rounding_bound(metric, jacobians[0].itemsize, terms, found),
        )

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        probes = self.probes(metric, self.default_passes if passes is None else passes)
        held = self.gradients_held * problem.P + 2 * problem.n  # the probes and their images have length n
        return int(min(probes, problem.n) * held * target.itemsize) * len(metrics.parameter_sets(metric))


Ledger = Callable[[], tuple[float, tuple[str, ...], float | None]]
"""Returns the passes spent so far, the notes, and the certificate."""


class Incremental(Stochastic):
    """A stochastic method with an accumulator: the same probes serve several metrics, and a tolerance can be reached.

    Attributes:
        first_batch: probes before the first look at the standard error, if there is a tolerance.
        order: power of the number of probes by which errors fall at best; a half for means, one for pairs.
    """

    first_batch: ClassVar[int] = 16
    order: ClassVar[float] = 0.5

    @abstractmethod
    def begin(self, prepared: Any, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        """An empty accumulator for several metrics, and a ledger of its cost."""

    def spend(self, prepared: Any, metric: str, passes: int, seed: int) -> Estimate:
        return self.estimates(prepared, (metric,), passes, seed)[metric]

    def estimates(
        self,
        prepared: Any,
        names: Sequence[str],
        passes: int,
        seed: int = 0,
        rtol: float | None = None,
        confidence: float = 0.95,
        *,
        exact_passes: float = math.inf,
    ) -> dict[str, Estimate]:
        """Several metrics from the same probes. Each estimate has the cost of all of them together.

        Args:
            prepared: the result of :meth:`prepare`.
            names: the metrics.
            passes: upper limit on the passes.
            seed: of the probes.
            rtol: tolerance; probes are drawn until the interval of every metric reaches no further from its value than
                ``rtol`` times the value, on either side.
            confidence: of the interval.
            exact_passes: what exact values cost; a tolerance is given up as soon as what it still needs costs more.
        """
        accumulator, ledger = self.begin(prepared, names, seed)
        most = passes // max(self.passes_per_probe(name) for name in names)
        fewest = max(self.fewest_probes, accumulator.least)
        looks: list[tuple[int, float]] = []
        drawn, batch = 0, most if rtol is None else min(most, max(self.first_batch, fewest))
        while True:
            accumulator.extend(batch)
            drawn += batch
            points = {name: accumulator.estimate(name) for name in names}
            spent, remarks, certified = ledger()
            found = {
                name: Estimate(
                    value,
                    error,
                    spent,
                    self.name,
                    remarks,
                    name,
                    degrees,
                    certified,
                    complement=accumulator.complement() if name == "alignment" else None,
                )
                for name, (value, error, degrees) in points.items()
            }
            if rtol is None:
                return found
            widths = {name: estimate.relative_width(confidence) for name, estimate in found.items()}
            excess = max(widths.values()) / rtol
            if excess <= 1 or drawn == most:
                break
            looks.append((drawn, excess))
            total = _probes_needed(looks, 0.5 if tuple(names) == ("trace",) else self.order) * spent / drawn
            if total > exact_passes and spent + exact_passes <= passes:
                break
            # Errors fall at least as the square root of the number of probes. Small steps waste few passes. Large steps
            # mean few looks at the error, each of which is a chance to stop too early.
            wanted = drawn * (min(excess, 2.0) ** 2 - 1)
            batch = min(most - drawn, max(fewest, drawn // 4, min(drawn, round(wanted))))
        for name, width in widths.items():
            if not width <= rtol:
                note = f"{passes} passes did not reach rtol={rtol:g} at confidence {confidence:g}: {width:.2g}"
                found[name] = replace(found[name], notes=(*found[name].notes, note))
        return found


def _probes_needed(looks: Sequence[tuple[int, float]], order: float) -> float:
    """Probes to a tolerance, by the law that the errors so far follow.

    Args:
        looks: numbers of probes, and errors over the tolerance.
        order: power of the number of probes by which errors fall at best; a half at worst.
    """
    (first, at_first), (drawn, excess) = looks[0], looks[-1]
    if not math.isfinite(excess):
        return 0.0
    if drawn > first and math.isfinite(at_first):
        order = min(max(math.log(at_first / excess) / math.log(drawn / first), 0.5), order)
    return float(drawn * excess ** (1 / order))


class Accumulating(Incremental):
    """An incremental method that needs Jacobian operators only."""

    @abstractmethod
    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Accumulator:
        """An empty accumulator for several metrics."""

    def begin(self, prepared: PreparedProblem, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        jacobians = prepared.jacobians("alignment" if "alignment" in names else names[0])
        accumulator = self.accumulator(names, jacobians, jacobians[0].rng(seed))
        return accumulator, lambda: (sum(j.passes for j in jacobians), notes(jacobians), certificate(jacobians))

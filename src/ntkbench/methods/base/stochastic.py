"""Base classes of methods that draw random probes."""

from __future__ import annotations

import bisect
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from scipy.special import chdtri

from ntkbench import metrics, progress_bar
from ntkbench.errors import BadInput, NtkbenchError, Undefined
from ntkbench.estimate import Estimate, rounding_note
from ntkbench.estimators.accumulators import Accumulator
from ntkbench.estimators.standard_errors import ALIKE, PointEstimate, is_rounding
from ntkbench.methods.base.method import Method, PreparedProblem, certificate, notes, rounding
from ntkbench.operators import JacobianOperator, Rng
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.units import counted


class Stochastic(Method):
    """A method that draws as many probes as a budget of passes allows.

    Attributes:
        fewest_probes: smallest number of probes that gives a standard error.
        default_passes: the budget if the user gives none.
        few_degrees: degrees of freedom below which an estimate with a given budget has a note that there are too few.
    """

    kind = "stochastic"
    fewest_probes: ClassVar[int] = 2
    default_passes: ClassVar[int] = 256
    few_degrees: ClassVar[float] = 0

    def too_few(self, error: float, degrees: float) -> tuple[str, ...]:
        """A note if the standard error has too few degrees of freedom."""
        if not error > 0 or degrees >= self.few_degrees:
            return ()
        said = f"{degrees:.2g} degrees of freedom are too few for a 95 % interval if the batch is uneven"
        return (f"few probes: {said}",)

    @abstractmethod
    def passes_per_probe(self, metric: str) -> int:
        """Passes per probe of the method's nominal number of probes."""

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

    def jvp_share(self, metric: str) -> float:
        """The largest share of :meth:`cost` that are JVPs, which take two passes on a network without forward mode."""
        return 0.0

    def passes_per_jvp(self, j: JacobianOperator) -> int:
        """Passes of a JVP of the kind that the method takes."""
        return j.passes_per_jvp()

    def affordable(self, prepared: Any, names: Sequence[str], passes: int) -> int:
        """The largest :meth:`cost` that a budget covers on a network whose JVPs may take more than one pass.

        Raises:
            BadInput: it is less than the cost of the fewest probes.
        """
        share = max(map(self.jvp_share, names))
        if not share:
            return passes
        widest = "alignment" if "alignment" in names else names[0]
        each = max(map(self.passes_per_jvp, prepared.jacobians(widest)))
        factor = 1 + share * (each - 1)
        found = int(passes / factor + ROUNDING)
        for metric in names:
            if found < (least := self.cost(metric, self.fewest_probes)):
                needed = _takes(metric, math.ceil(least * factor - ROUNDING))
                raise BadInput(f"{self.name}: {needed}, as a JVP of this network takes {each}; got passes={passes}")
        return found

    def signs(self, problem: Problem, metric: str) -> int:
        """Random signs in an independent part of a probe; 0 if probes are not signs, or if an error of 0 is exact."""
        return 0

    def strata(self, problem: Problem, metric: str) -> int:
        """Independent parts of a probe that have degrees of freedom of their own; 0 if a probe is taken as a whole."""
        return 0

    def with_unknown_error(
        self,
        prepared: Any,
        metric: str,
        point: PointEstimate,
        pairs: Callable[[], float],
        complement: float | None = None,
    ) -> PointEstimate:
        """The estimate, with an unknown error if this is rounding and may be due to chance; see :data:`ALIKE`.

        An error of 0 is exact with a single sign, on which squares do not depend, and for ratios that are always 1:
        those of a kernel of rank one, or of two equal networks.

        Args:
            prepared: the result of :meth:`prepare`.
            metric: the metric.
            point: the estimate.
            pairs: returns the effective number of pairs of independent probes.
            complement: 1 - alignment, if it is available.
        """
        problem = getattr(prepared, "problem", None)
        if problem is None:
            return point
        size, epsilon = abs(point.value), float(np.finfo(prepared.target.dtype).eps)
        if metric == "alignment" and complement is not None and not is_rounding(complement, 1.0, epsilon):
            size = min(size, complement)
        if not is_rounding(point.standard_error, size, epsilon) or self.signs(problem, metric) < 2:
            return point
        if (agree := pairs()) >= ALIKE:
            return point
        if metric in ("alignment", "effective_rank") and min(problem.n, problem.P) == 1:
            return point
        if metric == "alignment" and _does_not_differ(problem):
            return point
        return PointEstimate(point.value, math.nan, min(point.degrees, agree))

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        if reason is None and passes is not None and passes < (least := self.least_passes(problem, metric)):
            return _takes(metric, least)
        return reason

    def estimate(self, prepared: Any, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        if passes is None:
            raise BadInput(f"{self.name} is stochastic and needs a positive number of passes; got none")
        if passes < (least := self.cost(metric, self.fewest_probes)):
            raise BadInput(f"{self.name}: {_takes(metric, least)}; got passes={passes}")
        return self.spend(prepared, metric, passes, seed)


def _takes(metric: str, least: int) -> str:
    return f"the {metrics.words(metric)} takes at least {counted(least, 'pass', 'passes')}"


def _does_not_differ(problem: Problem) -> bool:
    """Whether the two networks of an alignment have the same parameters and buffers."""
    if problem.other is not None or problem.theta_f is None:
        return False
    start, end = {**problem.fixed_0, **problem.theta_0}, {**problem.fixed_f, **problem.theta_f}
    return start.keys() == end.keys() and all(np.array_equal(start[name], end[name]) for name in start)


def check_enough(names: Sequence[str], probes: int) -> None:
    """Check that probes whose products are all zero are enough to show that Theta is zero."""
    if probes <= ALIKE:
        shown = f"all products of {probes} probes are zero, and these are too few to show that Theta is zero"
        raise Undefined(f"the {metrics.words(*names)} cannot be estimated: {shown}")


ROUNDING = 1e-9
"""Rounding error allowed for in a number of passes."""


class FixedBudget(Stochastic):
    """A stochastic method that must know its budget in advance, for example to size a sketch.

    On uneven batches, the few degrees of freedom of ``hutchpp`` (2), ``nystrompp`` (4) and ``hutchpp_paper`` (5) make
    intervals contain the norm too rarely; a note says so.

    Attributes:
        gradients_held: number of vectors of length P in memory at a time, for each probe.
    """

    few_degrees = 6
    gradients_held: ClassVar[float] = 0

    @abstractmethod
    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        """The metric from a nominal number of probes."""

    def remarks(self, error: float, degrees: float, probes: int) -> tuple[str, ...]:
        """Notes on the interval of an estimate."""
        return self.too_few(error, degrees)

    def spend(self, prepared: PreparedProblem, metric: str, passes: int, seed: int) -> Estimate:
        jacobians = prepared.jacobians(metric)
        probes = self.probes(metric, self.affordable(prepared, (metric,), passes))
        try:
            value, error, degrees = self.draw(metric, jacobians, probes, jacobians[0].rng(seed))
        except Undefined:
            check_enough((metric,), probes)
            raise
        if value == error == 0 and jacobians[0].n > 1 and probes <= ALIKE:
            error, degrees = math.nan, 0.0
        spent = sum(j.passes for j in jacobians)
        found = certificate(jacobians)
        return Estimate(
            value,
            error,
            spent,
            self.name,
            (*notes(jacobians), *self.remarks(error, degrees, probes)),
            metric,
            degrees,
            found,
            rounding=rounding(jacobians, metric, found),
        )

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        """Operations of an orthonormal basis of the probes' images, and of its Gram matrix."""
        return 4 * problem.n * (passes / self.passes_per_probe(metric)) ** 2

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        probes = self.probes(metric, self.default_passes if passes is None else passes)
        held = self.gradients_held * problem.P + 2 * problem.n  # the probes and their images have length n
        return int(min(probes, problem.n) * held * target.itemsize) * len(metrics.parameter_sets(metric))


Ledger = Callable[[], tuple[float, tuple[str, ...], float | None]]
"""Returns the passes spent so far, the notes, and the certificate."""


class GivenUp(NtkbenchError):
    """The remaining probes for a tolerance cost more than an alternative.

    Attributes:
        passes: spent so far.
        cheaper: the alternative.
    """

    cheaper: ClassVar[str]

    def __init__(self, passes: float) -> None:
        """See the attributes."""
        super().__init__(f"after {counted(passes, 'pass', 'passes')} {self.cheaper} are cheaper")
        self.passes = passes


class ExactIsCheaper(GivenUp):
    """Exact values are cheaper."""

    cheaper = "exact values"


class OthersAreCheaper(GivenUp):
    """Methods whose cost is linear in the number of probes are cheaper.

    Attributes:
        probes: number of probes that the tolerance is expected to take: between that for errors that fall as the square
            root, and that for errors that fall as fast as possible.
    """

    cheaper = "methods without inner products of gradients"

    def __init__(self, passes: float, probes: float) -> None:
        """See the attributes."""
        super().__init__(passes)
        self.probes = probes


def _nothing(probes: float) -> float:
    return 0.0


@dataclass(frozen=True)
class Stopping:
    """When a method gives up on a tolerance.

    Attributes:
        exact_passes: passes of exact values.
        exact_cost: passes of the method that take as long as exact values. The method gives up as soon as the remaining
            probes cost more than :data:`WORTH` times as many.
        most_probes: number of probes beyond which the method gives up; see :meth:`Incremental.worthwhile_probes`.
        products: passes of the method that take as long as the products of a number of probes.
    """

    exact_passes: float = math.inf
    exact_cost: float = math.inf
    most_probes: float = math.inf
    products: Callable[[float], float] = _nothing


class Incremental(Stochastic):
    """A stochastic method that accumulates probes, which serve several metrics and can reach a tolerance.

    Attributes:
        first_batch: smallest number of probes before the first check of the standard error, if there is a tolerance.
        order: the error falls at best as this power of the number of probes; a half for means, one for pairs.
    """

    first_batch: ClassVar[int] = 16
    order: ClassVar[float] = 0.5

    def probes_to_decide(self, problem: Problem, metric: str) -> int:
        """Fewest probes whose error usually has enough degrees of freedom to decide on a tolerance."""
        strata = self.strata(problem, metric)
        enough = 1 + math.ceil(EXPECTED_DEGREES / strata) if strata else 0
        return max(self.first_batch, self.fewest_probes, enough)

    def probes_to_reach(self, problem: Problem, metric: str, error: float) -> float:
        """Probes that a relative standard error of a metric takes at best; 0 if not known."""
        return 0.0

    def worthwhile_probes(self, problem: Problem) -> float:
        """Probes beyond which methods whose cost is linear in their number are cheaper."""
        return math.inf

    def _first_check(self, prepared: Any, names: Sequence[str], rtol: float) -> int:
        """Probes before the first check of the errors: :meth:`probes_to_decide` if these may reach the tolerance."""
        problem = getattr(prepared, "problem", None)
        if problem is None or rtol < WIDE:
            return self.first_batch
        return _rounded(max(self.probes_to_decide(problem, name) for name in names), self.first_batch)

    @abstractmethod
    def begin(self, prepared: Any, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        """An empty accumulator for several metrics, and a ledger of its cost."""

    def rounding(self, prepared: Any, names: Sequence[str], metric: str, certified: float | None) -> float | None:
        """A bound on the rounding error of a metric; ``None`` if it is not known."""
        return None

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
        stopping: Stopping = Stopping(),
    ) -> dict[str, Estimate]:
        """Several metrics from the same probes. Each estimate states the cost of all of them together.

        Args:
            prepared: the result of :meth:`prepare`.
            names: the metrics.
            passes: upper limit on the passes.
            seed: seed of the probes.
            rtol: tolerance; probes are drawn until the interval of every metric extends at most ``rtol`` times the
                value to either side. The interval is checked only a few times; see :func:`_growth`. If rounding takes
                more than half of the tolerance, a note says so; more probes would not reduce it.
            confidence: confidence level of the interval.
            stopping: when to give up on the tolerance.

        Raises:
            GivenUp: the tolerance is given up. The estimates so far are not returned, as their errors did not meet the
                stopping rule.
            Undefined: a metric is a ratio to the norm of a kernel that is zero, as far as the probes show.
        """
        accumulator, ledger = self.begin(prepared, names, seed)
        most = self.affordable(prepared, names, passes) // max(self.passes_per_probe(name) for name in names)
        fewest = max(self.fewest_probes, accumulator.least)
        checks: list[tuple[int, float]] = []
        drawn, batch = 0, most if rtol is None else min(most, max(self._first_check(prepared, names, rtol), fewest))
        while True:
            accumulator.extend(batch)
            drawn += batch
            try:
                points = {name: accumulator.estimate(name) for name in names}
            except Undefined:
                if rtol is None or drawn == most or drawn > ALIKE:
                    check_enough(names, drawn)
                    raise
                batch = min(most, max(ALIKE + 1, drawn + fewest)) - drawn
                continue
            complement = accumulator.complement() if "alignment" in names else None
            pairs = functools.partial(accumulator.pairs, drawn)
            points = {
                name: self.with_unknown_error(prepared, name, point, pairs, complement)
                for name, point in points.items()
            }
            spent, remarks, certified = ledger()
            found = {
                name: Estimate(
                    value,
                    error,
                    spent,
                    self.name,
                    remarks if rtol is not None else (*remarks, *self.too_few(error, degrees)),
                    name,
                    degrees,
                    certified,
                    complement=complement if name == "alignment" else None,
                    rounding=self.rounding(prepared, names, name, certified),
                )
                for name, (value, error, degrees) in points.items()
            }
            if rtol is None:
                return found
            least = LEAST_DEGREES / (2 if checks else 1)
            deciding = [_deciding(each, rtol, confidence) for each in found.values()]
            far = math.inf if accumulator.uneven else FAR_WITHIN
            further = math.ceil(drawn * (_growth(deciding, rtol, confidence, most / drawn, least, far) - 1))
            if not further:
                found = {name: _widened(estimate, least) for name, estimate in found.items()}
            if not further or drawn == most:
                break
            width = max(each.relative_width(confidence) for each in deciding)
            progress_bar.say(f", within {100 * width:.2g} %, target {100 * rtol:.2g} %")
            checks.append((drawn, _excess(deciding, rtol, confidence)))
            needed = max(_probes_needed(checks, 0.5 if tuple(names) == ("trace",) else self.order), drawn + further)
            remaining = spent * (needed / drawn - 1) + stopping.products(needed) - stopping.products(drawn)
            if needed > stopping.most_probes:
                slowly = max(needed, drawn * checks[-1][1] ** 2)
                raise OthersAreCheaper(spent, math.sqrt(needed * slowly) if math.isfinite(slowly) else needed)
            if remaining > WORTH * stopping.exact_cost and spent + stopping.exact_passes <= passes:
                raise ExactIsCheaper(spent)
            batch = min(most - drawn, _rounded(max(fewest, further), self.first_batch))
        for name, estimate in found.items():
            if not (width := _deciding(estimate, rtol, confidence).relative_width(confidence)) <= rtol:
                given = counted(passes, "pass", "passes")
                note = f"{given} did not reach rtol={rtol:g} at confidence {confidence:g}: {width:.2g}"
            elif not estimate.relative_width(confidence) <= rtol:
                note = rounding_note(rtol, prepared.target.dtype)
            else:
                continue
            found[name] = replace(found[name], notes=(*found[name].notes, note))
        return found


def _deciding(estimate: Estimate, rtol: float, confidence: float) -> Estimate:
    """An estimate as it counts for a tolerance: without its rounding if that takes more than half of it."""
    share = replace(estimate, standard_error=None).relative_width(confidence)
    return replace(estimate, rounding=None) if share > rtol / 2 else estimate


STEP = 4
"""Numbers of probes after the first check are multiples of this, so that few programs are traced or compiled."""


def _rounded(probes: int, first: int) -> int:
    """A number of probes, rounded up: by at most a quarter from 16 on, by less where the first check is smaller."""
    step = min(STEP, first) * 2 ** max(0, int(math.log2(probes / (4 * STEP))) if probes > 4 * STEP else 0)
    return step * math.ceil(probes / step)


WORTH = 0.5
"""Largest cost of the remaining probes, relative to that of exact values.

It is below 1 because the number of probes that are needed is uncertain, and the cost of exact values is not.
"""
WIDE = 0.05
"""Smallest tolerance that the first check may reach. For smaller ones it is early, because it only tells how many
probes are needed, or that exact values are cheaper."""
MOST_EXCESS = 1e4
"""Ratio of error to tolerance beyond which larger ratios make no difference."""


def _excess(found: Collection[Estimate], rtol: float, confidence: float) -> float:
    """Ratio of the errors to those that a tolerance allows, accurate to a tenth; 1 if the tolerance is reached.

    The ratio is for many degrees of freedom: few of them widen the interval now, but not after more probes.
    """
    if not all(math.isfinite(each.standard_error or 0.0) for each in found):
        return math.inf
    sure = [replace(each, degrees=math.inf) for each in found]
    return _first(1.0, 1.1, MOST_EXCESS, lambda excess: _is_within(sure, excess**2, None, rtol, confidence))


def _first(start: float, ratio: float, most: float, enough: Callable[[float], bool]) -> float:
    """The first of ``start``, ``start ratio``, ``start ratio^2``, ... that is enough, or is not less than ``most``.

    All that follow one that is enough are also enough, so bisection tries only a few.
    """
    steps = max(0, math.ceil(math.log(most / start) / math.log(ratio)))
    return start * ratio ** bisect.bisect_left(range(steps), True, key=lambda i: enough(start * ratio**i))


def _is_within(
    found: Collection[Estimate], factor: float, safety: float | None, rtol: float, confidence: float
) -> bool:
    """Whether a tolerance is expected to be reached with ``factor`` times the probes; see :func:`_after`."""
    return all(_after(each, factor, safety).relative_width(confidence) <= rtol for each in found)


def _probes_needed(checks: Sequence[tuple[int, float]], order: float) -> float:
    """Probes that a tolerance takes, extrapolated from the errors so far.

    Args:
        checks: numbers of probes, and ratios of error to tolerance.
        order: the error falls at best as this power of the number of probes; at worst it falls as the square root.
    """
    (first, at_first), (drawn, excess) = checks[0], checks[-1]
    if not math.isfinite(excess):
        return 0.0
    if drawn > first and math.isfinite(at_first):
        order = min(max(math.log(at_first / excess) / math.log(drawn / first), 0.5), order)
    return float(drawn * excess ** (1 / order))


LEAST_DEGREES = 60
"""Fewest degrees of freedom at which a standard error decides at the first check whether a tolerance is reached.

The next check comes when :data:`EXPECTED_DEGREES` are expected, and then half of :data:`LEAST_DEGREES` is enough, so
the number of probes hardly depends on the degrees of freedom that are found. This matters because a skewed sample
without large values has many degrees of freedom, and its mean is too small.
"""
EXPECTED_DEGREES = 1.5 * LEAST_DEGREES
"""Degrees of freedom that a second check should have."""
FAR_WITHIN = 10
"""Ratio of the tolerance to the width of an interval that decides with any degrees of freedom.

It does not decide if a few strata have most of the estimated quantity: their first probes may agree by chance.
"""
SAFETY = 0.9
"""Probability that a variance is at most the upper limit that the last step to a tolerance allows for."""


def _growth(
    found: Collection[Estimate], rtol: float, confidence: float, most: float, least: float, far: float = FAR_WITHIN
) -> float:
    """The factor by which to multiply the probes before the next check of the errors; 1 to stop.

    A rule that stops as soon as the estimated error is small stops where the error is underestimated, especially with
    few degrees of freedom and skewed probes. The error is therefore checked only a few times, as in triple sampling
    (Hall 1981). The first check takes enough probes for a reliable error. If more than four times as many are expected
    to be needed, the next check is at half of the expected number. The last one is at a number that is enough even if
    the variance is at its upper confidence limit. Errors fall at least as the square root of the number of probes.

    Args:
        found: estimates of all metrics, from the probes so far.
        rtol, confidence: the tolerance, and the confidence level of its interval.
        most: the largest factor.
        least: degrees of freedom of a reliable error.
        far: as :data:`FAR_WITHIN`.
    """

    def needed(safety: float | None) -> float:
        return _first(1.25, 1.05, most, lambda factor: _is_within(found, factor, safety, rtol, confidence))

    widest = max(e.relative_width(confidence) for e in found)
    if (degrees := min(e.degrees for e in found)) < least and not widest * far <= rtol:
        return max(2.0, EXPECTED_DEGREES / max(degrees, 1.0))
    if widest <= rtol:
        return 1.0
    expected = needed(None)
    return max(4.0, expected / 2) if expected > 4 else needed(SAFETY)


def _widened(estimate: Estimate, least: float) -> Estimate:
    """The final estimate of a run; an error with few degrees of freedom is replaced by its upper limit.

    A run stops early if its error is underestimated, so the intervals of such runs would contain the exact value too
    rarely.
    """
    if estimate.degrees >= least or not estimate.standard_error:
        return estimate
    note = f"far within the tolerance after few probes: the interval uses the upper {SAFETY:.0%} limit of the error"
    return replace(_after(estimate, 1.0, SAFETY), notes=(*estimate.notes, note))


def _after(estimate: Estimate, factor: float, safety: float | None) -> Estimate:
    """The expected estimate with ``factor`` times the probes, and ``safety`` as :data:`SAFETY`."""
    error, degrees = estimate.standard_error or 0.0, estimate.degrees
    if safety is not None and math.isfinite(degrees):
        error *= math.sqrt(degrees / chdtri(degrees, safety))
    return replace(estimate, standard_error=error / math.sqrt(factor), degrees=degrees * factor)


class Accumulating(Incremental):
    """An incremental method that needs only Jacobian operators."""

    @abstractmethod
    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Accumulator:
        """An empty accumulator for several metrics."""

    def begin(self, prepared: PreparedProblem, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        jacobians = prepared.jacobians("alignment" if "alignment" in names else names[0])
        accumulator = self.accumulator(names, jacobians, jacobians[0].rng(seed))

        def ledger() -> tuple[float, tuple[str, ...], float | None]:
            spent = sum(j.passes for j in jacobians)
            return spent, (*notes(jacobians), *accumulator.notes), certificate(jacobians)

        return accumulator, ledger

    def rounding(self, prepared: PreparedProblem, names: Sequence[str], metric: str, certified: float | None) -> float:
        return rounding(prepared.jacobians(metric), metric, certified)

"""Predictions for all methods, from rates, a pilot, stand-ins and rehearsals."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ntkbench import errors, methods, metrics, operations
from ntkbench.cost import samples
from ntkbench.cost.costs import Cost, Costs
from ntkbench.cost.machine import speeds
from ntkbench.cost.pilot import Pilot, pilot
from ntkbench.cost.rates import Rates
from ntkbench.cost.stand_in import PreparedStandIn
from ntkbench.errors import OverMemory
from ntkbench.estimate import rounding_bound, rounding_note
from ntkbench.ladder import TOLERANCE_PASSES
from ntkbench.methods.base import FixedBudget, Incremental, Method, PreparedProblem, Stochastic
from ntkbench.options import Options, Target
from ntkbench.problem import Problem
from ntkbench.units import over_memory

MOST_ROWS, MOST_COLUMNS = 1024, 512
"""Rows and columns of a stand-in."""
WIDE, OPERATIONS = 2**14, 1e9
"""Columns of a wider stand-in, which shows how times grow with P, and the maximum operations of its products."""
FEWEST_SAMPLES = 16
"""Minimum number of samples of a stand-in; the outputs of each are reduced instead."""
FIRST = 16
"""First budget of stochastic methods."""
STEPS = 5
"""Number of budgets that are tried."""
SEEDS = 3
"""Number of estimates with each budget."""
LONG = 0.3
"""Maximum seconds of these estimates; larger budgets are extrapolated."""
STEEPEST = 3.0
"""Largest power of the budget with which seconds grow."""
CLOSE = 2.0
"""Ratio of a sufficient to an insufficient budget at which the search between them stops."""
LESS = 0.9
"""Share of a budget below which a method's passes are assumed not to depend on it."""
EXACT = 1e-3
"""An interval narrower than this share of the tolerance shows that the stand-in is too small; its width is unknown."""


def predict(
    problem: Problem,
    metric: str,
    target: Target,
    *,
    rtol: float = 0.01,
    confidence: float = 0.95,
    names: Collection[str] | None = None,
) -> Costs:
    """Predicted cost of each method for a tolerance.

    Seconds are those of one estimate after the first one, which also checks, traces and certifies the network. A method
    that traces the network runs on up to 128 samples; if these are all of them, its seconds are measured, and at most
    scaled to the budget. Errors of stochastic methods are those on a random J with the effective ranks of the network,
    and with the spectrum of a power law; those of approximate methods are their biases on these samples. Errors are
    therefore rough, as are the budgets that follow from them.

    Cost: some products of each kind, up to two passes for each of :data:`ntkbench.cost.pilot.PROBES` probes of a pilot
    at each set of weights, and for each method that traces the network some estimates on these samples. A few seconds
    for small networks; the time of some dozens of passes for large ones.

    Args:
        problem: network and inputs.
        metric: the metric.
        target: where it is computed.
        rtol: relative half-width of the interval; the bias of an approximate method.
        confidence: confidence level of the interval.
        names: methods; all if not given.

    Raises:
        BadInput: there is no such metric or method, or the tolerance is invalid; or the network has no VJPs.
        Unavailable: the device is not available.
    """
    metrics.check(metric)
    Options(rtol=rtol, confidence=confidence)
    chosen = [methods.get(name) for name in (methods.names() if names is None else names)]
    work = _Work(problem, metric, target, rtol, confidence)
    epsilon = float(np.finfo(target.dtype).eps)
    inexact = rounding_bound(metric, epsilon, max(problem.n, problem.P), None) > rtol
    notes = (str(work.known), *[rounding_note(rtol, target.dtype)] * inexact)
    return Costs(map(work.cost, chosen), metric, rtol, notes, confidence)


def of_budgets(
    problem: Problem, metric: str, target: Target, wanted: Iterable[tuple[str, int | None]]
) -> dict[tuple[str, int | None], Cost]:
    """Predicted costs of methods with given budgets, by pairs of a method's name and its passes.

    Like :func:`predict`, without a search for the budget that a tolerance needs. A method that does not apply has a
    reason and no seconds.

    Args:
        problem: network and inputs.
        metric: the metric.
        target: where it is computed.
        wanted: names with passes; ``None`` for methods that take no budget.

    Raises:
        BadInput: there is no such metric or method.
    """
    metrics.check(metric)
    work = _Work(problem, metric, target, rtol=1.0, confidence=0.95)
    return {(name, passes): work.cost(methods.get(name), passes) for name, passes in wanted}


@dataclass(frozen=True)
class _Trial:
    """Estimates with one budget on a stand-in.

    Attributes:
        budget: given passes; ``None`` for a method that takes none.
        passes: passes spent by one estimate.
        width: relative half-width of the interval.
        error: relative standard error.
        products: numbers of products of one estimate, by kind and size.
        seconds: seconds of one estimate, minus those of its products.
        took: seconds of all estimates.
    """

    budget: int | None
    passes: float
    width: float
    error: float
    products: Mapping[tuple[str, float], float]
    seconds: float
    took: float

    def times(self, factor: float, before: _Trial | None, order: float) -> _Trial:
        """The trial with a larger budget, extrapolated.

        Args:
            factor: factor on the budget; at least 1.
            before: trial with a smaller budget, which gives the growth of passes and seconds; proportional if ``None``.
            order: power of the budget by which errors fall.
        """
        budget, more, power = math.ceil(factor * (self.budget or 0)), factor, 1.0
        if before is not None and before.budget and self.budget:
            more = 1.0 if before.passes == self.passes else factor
            power = _power(self.seconds, before.seconds, self.budget / before.budget, most=STEEPEST)
        products = {(kind, more * size): count for (kind, size), count in self.products.items()}
        width, error = self.width / factor**order, self.error / factor**order
        return _Trial(budget, more * self.passes, width, error, products, factor**power * self.seconds, self.took)


class _Work:
    """All measurements for the methods of one problem."""

    def __init__(self, problem: Problem, metric: str, target: Target, rtol: float, confidence: float) -> None:
        self._problem, self._metric, self._target = problem, metric, target
        self._rtol, self._confidence = rtol, confidence
        self._ends = len(metrics.parameter_sets(metric))
        self._operators = PreparedProblem(problem, target).jacobians(metric)
        self._j = self._operators[0]
        self._machine = speeds(target)
        self._rates = Rates(self._j, self._prior)
        self._rehearsals = samples.Rehearsals(problem, metric, target)
        self._shape = _reduced(problem)
        self._is_reduced = math.prod(self._shape) < problem.n * problem.P
        self._stand_ins: dict[tuple[int, int, int], PreparedStandIn] = {}

    @functools.cached_property
    def known(self) -> Pilot:
        """The result of the pilot."""
        return pilot(self._operators, independent=not self._problem.samples_interact)

    def cost(self, method: Method, passes: int | None = None) -> Cost:
        """The cost of a method with a budget or for the tolerance, or the reason why it does not apply."""
        try:
            if reason := method.unsupported_reason(self._problem, self._metric, self._target, passes):
                return Cost(method.name, method.kind, reason=reason)
            predicted = self._rehearsed if samples.needs_network(method) else self._stood_in_for
            return predicted(method, passes)
        except Exception as error:  # whatever a method does to the network
            return Cost(method.name, method.kind, reason=errors.reason(error))

    def _stood_in_for(self, method: Method, given: int | None) -> Cost:
        """The cost of a method that needs only products, from a stand-in."""
        problem, metric = self._problem, self._metric
        if not isinstance(method, Stochastic):
            self._check_memory(method, None)
            trial = tried = self._trial(method, None, self._shape)
            needed = method.passes_needed(problem, metric, self._target)
            passes = trial.passes * problem.n / (self._shape[0] * self._shape[1]) if needed is None else needed
        else:
            if given is None:
                tried, trial = self._search(method)
            else:
                tried = trial = self._trial(method, given, self._shape, 1)
            self._check_memory(method, trial.budget)
            passes = trial.passes if trial.passes == tried.passes else self._spent(method, trial.budget)
        share = passes / trial.passes if trial.passes else 1.0
        products = share * sum(self._rates.seconds(*each) * count for each, count in trial.products.items())
        forward = self._ends * self._rates.forward() if {kind for kind, _ in trial.products} & {"vjp", "row"} else 0.0
        return self._found(
            method,
            passes,
            products + forward + self._host(method, tried, trial),
            self._block_bytes(trial.products),
            trial.error,
            trial.width,
            trial.budget,
        )

    def _rehearsed(self, method: Method, given: int | None) -> Cost:
        """The cost of a method that needs the network, from runs on a few samples."""
        problem, metric = self._problem, self._metric
        budget = samples.budget(method, problem, metric) if given is None else given
        for again in (given is None, False):
            self._check_memory(method, budget)
            passes = method.passes_needed(problem, metric, self._target) if budget is None else budget
            slow = 0.0 if passes is None else self._prior(passes)
            if passes is not None and slow <= samples.PATIENCE:  # the prior does not count calls of small operations
                slow = max(slow, self._rates.seconds("vjp", passes))
            found = self._rehearsals.run(method, budget, slow)
            # Assumes that errors average over samples as if these were independent.
            fewer = (found.samples / problem.N) ** 0.5
            width = fewer * found.estimate.relative_width(self._confidence)
            if not (again and isinstance(method, Stochastic) and budget is not None and math.isfinite(width)):
                break
            wanted = self._next(method, budget, width)
            if width <= self._rtol and budget < CLOSE * wanted:
                break
            budget = wanted
        error, value, more = found.estimate.standard_error, found.estimate.value, 1.0
        relative = fewer * error / abs(value) if error and value else 0.0
        if method.kind == "approximate":
            relative = width = abs(value / found.exact - 1) if found.exact else math.nan
        elif given is None and passes and self._rtol < width < math.inf:
            more = min(self._factor(method, width), max(TOLERANCE_PASSES / passes, 1.0))
            width, relative = width / more ** self._order(method), relative / more ** self._order(method)
        if isinstance(method, Stochastic) and budget is not None:
            of_samples = found.estimate.passes or 0.0
            fixed, budget = of_samples < LESS * budget, math.ceil(more * budget)
            passes = of_samples if fixed else self._spent(method, budget)
        made = self._found(method, passes, more * found.seconds, found.bytes, relative, width, budget)
        return replace(made, samples=found.samples)

    def _found(
        self,
        method: Method,
        passes: float | None,
        seconds: float,
        held: int,
        error: float,
        width: float,
        budget: int | None,
    ) -> Cost:
        problem, target, exact = self._problem, self._target, method.kind == "exact"
        needed = method.bytes_needed(problem, self._metric, target, budget)
        if exact and self._metric != "trace":
            held += min(problem.n**2 * target.itemsize, target.memory // 4)
        return Cost(
            method.name,
            method.kind,
            passes,
            seconds,
            int(max(needed, min(held, target.memory))) or None,
            0.0 if exact else error if math.isfinite(error) else None,
            0.0 if exact else width if math.isfinite(width) else None,
            budget,
            isinstance(method, Incremental),
            None if passes is None else method.operations(problem, self._metric, passes),
        )

    def _prior(self, passes: float) -> float:
        """Seconds of products expected from operation counts and the speeds of the machine; 0 if these are not known.

        A pass reads the weights and writes as many numbers.
        """
        if self._machine is None:
            return 0.0
        moved = 2 * self._problem.P * self._target.itemsize
        return self._machine.seconds(passes * operations.of_pass(self._problem), passes * moved)

    def _check_memory(self, method: Method, passes: int | None) -> None:
        needed, memory = method.bytes_needed(self._problem, self._metric, self._target, passes), self._target.memory
        if needed > memory:
            raise OverMemory(f"needs {over_memory(needed, memory)}")

    def _search(self, method: Stochastic) -> tuple[_Trial, _Trial]:
        """A trial, and the same extrapolated to about the smallest sufficient budget, or to the largest one."""
        least = method.least_passes(self._problem, self._metric)
        most, begun = max(TOLERANCE_PASSES, least), time.perf_counter()
        before: _Trial | None = None
        enough: _Trial | None = None
        short, budget = 0, max(least, FIRST)
        for _ in range(STEPS):
            self._check_memory(method, budget)
            trial = self._trial(method, budget, self._shape)
            if trial.width <= self._rtol:
                enough = trial
            else:
                short = budget
            largest = math.inf if enough is None else enough.budget or 0
            if budget == most or largest <= max(least, FIRST, CLOSE * short):
                break
            if enough is not None:
                budget = math.ceil(math.sqrt(short * largest))
                continue
            wanted = self._next(method, budget, trial.width)
            spent = time.perf_counter() - begun
            if spent + trial.took * wanted / budget > LONG and math.isfinite(trial.width):
                factor = max(min(self._factor(method, trial.width), most / budget), 1.0)
                return trial, trial.times(factor, before, self._order(method))
            before, budget = trial, wanted
        trial = enough or trial
        if trial.width < EXACT * self._rtol and self._is_reduced:
            trial = replace(trial, width=math.nan, error=math.nan)
        return trial, trial

    def _spent(self, method: Stochastic, budget: int | None) -> float:
        """Passes that a method spends of a budget; a sketch has no more columns than there are outputs."""
        probes = method.probes(self._metric, budget or 0)
        if isinstance(method, FixedBudget):
            probes = min(probes, self._problem.n)
        return float(method.cost(self._metric, probes))

    def _next(self, method: Stochastic, budget: int, width: float) -> int:
        """A budget that is expected to suffice."""
        factor = self._factor(method, width) if math.isfinite(width) else 2.0
        least = method.least_passes(self._problem, self._metric)
        return int(min(max(math.ceil(1.05 * factor * budget), least), max(TOLERANCE_PASSES, least)))

    def _order(self, method: Method) -> float:
        """The power of the budget by which a method's errors fall."""
        return method.order if isinstance(method, Incremental) and self._metric != "trace" else 0.5

    def _factor(self, method: Method, width: float) -> float:
        """The factor on the budget that the tolerance needs, given an interval of this relative half-width.

        Intervals of few probes can be so wide that the power overflows; no budget exceeds :data:`TOLERANCE_PASSES`.
        """
        return float(min(width / self._rtol, TOLERANCE_PASSES) ** (1 / self._order(method)))

    def _trial(self, method: Method, budget: int | None, shape: tuple[int, int, int], seeds: int = SEEDS) -> _Trial:
        stand_in = self._stand_in(shape)
        found, times, begun = [], [], time.perf_counter()
        for seed in range(seeds if budget is not None else 1):
            stand_in.asked.clear()
            start = time.perf_counter()
            found.append(method.estimate(stand_in, self._metric, budget, seed))
            times.append(time.perf_counter() - start - stand_in.asked.seconds)
        widths = [each.relative_width(self._confidence) for each in found]
        relative = [(each.standard_error or 0.0) / abs(each.value) for each in found if each.value]
        return _Trial(
            budget,
            found[-1].passes or 0.0,
            statistics.median(widths),
            statistics.median(relative) if relative else math.nan,
            Counter(stand_in.asked.products),
            max(0.0, statistics.median(times)),
            time.perf_counter() - begun,
        )

    def _stand_in(self, shape: tuple[int, int, int]) -> PreparedStandIn:
        if shape not in self._stand_ins:
            import torch

            from ntkbench.operators.torch import place

            of_torch = self._target.backend == "torch"  # for JAX the rest of a method is timed on the host
            device = place(self._target) if of_torch else torch.device("cpu")
            dtype = getattr(torch, self._target.dtype)
            self._stand_ins[shape] = PreparedStandIn(self._j, shape, self.known, self._ends, dtype, device)
        return self._stand_ins[shape]

    def _host(self, method: Method, trial: _Trial, larger: _Trial) -> float:
        """Seconds of a trial except its products, extrapolated from other stand-ins if this one is reduced.

        They grow linearly in P, or as a power if that is faster, and as a power of the number of rows.
        """
        N, O, P = self._shape  # noqa: E741 - the field's symbol
        found = trial.seconds
        if self._problem.P > P:
            most = int(OPERATIONS / (2 * N * O * max(trial.passes, 1)))
            wide = min(self._problem.P, max(2 * P, min(WIDE, most)))
            more = self._trial(method, trial.budget, (N, O, wide), 1).seconds
            line = found + max(0.0, more - found) * (self._problem.P - P) / (wide - P)
            found = max(line, found * (self._problem.P / P) ** _power(more, found, wide / P))
        if self._problem.n > N * O:
            half = (N // 2, O, P) if N > 1 else (N, O // 2, P)
            fewer = self._trial(method, trial.budget, half, 1).seconds
            found *= (self._problem.n / (N * O)) ** _power(trial.seconds, fewer, 2)
        return found * larger.seconds / trial.seconds if trial.seconds else found

    def _block_bytes(self, products: Mapping[tuple[str, float], float]) -> int:
        """Bytes of the largest block of a product, or of all rows together, since rows are kept."""
        j, held = self._j, 0
        for (kind, size), count in products.items():
            each = j.bytes_per_probe()
            if kind in ("sample_vjp", "sample_jvp"):
                each += 2 * j.N * j.P * j.itemsize
            elif kind == "row":
                size, each = count, 2 * j.P * j.itemsize
            held = max(held, min(math.ceil(size * each), j.memory))
        return held


def _power(seconds: float, fewer: float, factor: float, most: float = 2.0) -> float:
    """Power of a size with which seconds grow, given ``fewer`` at a size smaller by ``factor``; from 0 to ``most``."""
    return min(max(math.log(seconds / fewer) / math.log(factor), 0.0), most) if min(seconds, fewer) > 0 else 1.0


def _reduced(problem: Problem) -> tuple[int, int, int]:
    """Sizes of the stand-in for a problem; if samples interact, it has one sample with all outputs.

    It has at most as many rows as columns if the problem does, since some methods depend on which are fewer.
    """
    most = MOST_ROWS if problem.n > problem.P else min(problem.P, MOST_COLUMNS)
    N, O = (1, problem.n) if problem.samples_interact else (problem.N, problem.O)  # noqa: E741
    N = min(N, max(FEWEST_SAMPLES, most // O))
    return N, min(O, max(1, most // N)), min(problem.P, MOST_COLUMNS)

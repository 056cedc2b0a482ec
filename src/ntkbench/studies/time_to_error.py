"""Seconds to a given error: each method on each backend at the smallest budget that reaches it, timed in turn.

The smallest budget is where the law of :mod:`ntkbench.measure.laws`, fitted to the errors at all budgets that were
tried, reaches the goal. Errors are relative to the exact value (or to its substitute in :class:`Goal`). The budget
counts if fresh seeds do not contradict it: a two-sided sign test at 95 % finds the median neither above the goal nor
below it. So no method benefits from a lucky budget, or pays for one that is larger than necessary. A method's other
backends take the budget of its first one, if their own errors do not contradict it. Methods without a budget take part
if their error is within the goal; if the seed changes their value, the median over seeds. A method that does not reach
the goal with the largest budget, or takes too long, gets a row with the reason.

A method's preparation is freed after its search and made again for its turns. ``limits.memory_mb``, which is for the
whole process, therefore applies to each search alone. The turns hold the preparations of all methods of a goal at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt
from scipy.special import stdtrit
from scipy.stats import binom

from ntkbench import methods, problems
from ntkbench.cost.machine import speeds
from ntkbench.errors import NtkbenchError, Unavailable
from ntkbench.estimate import Estimate
from ntkbench.measure import laws, outcomes, timing
from ntkbench.measure.schema import MetricName, ProblemLabel, Strict
from ntkbench.measure.seeds import Reruns
from ntkbench.methods.base import Incremental, Stochastic
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base import reference
from ntkbench.studies import base
from ntkbench.units import counted

TIMED = True
PLUGINS = (*base.methods_and_problems(), *base.JAX)
TOO_LONG = 5
"""Multiple of a goal's patience after which a method is abandoned."""
LOOK = 10
"""Estimates between two checks of whether a budget can still be close to the smallest one."""
HOPELESS = 1e-3
"""P-value of the one-sided sign test (median equal to the goal) below which no more errors are drawn."""
CONTRADICTED = 0.025
"""P-value of the same test, on either side, below which fresh seeds contradict a budget."""
FEWEST_ESTIMATES = 6
"""With fewer errors the p-value is at least 2^-5, so that no budget could be contradicted."""
FEWEST_CALLS = 3
"""With fewer calls the interval of a ratio is not known."""
ROUNDS = 6
"""Number of budgets tested with fresh seeds before a method is abandoned."""
REFERENCE, REFERENCE_PASSES, REFERENCE_SEED = "group_u_statistics", 2**15, 2**31
"""The method whose estimates replace exact values, its largest budget, and a seed that no other method uses."""
NARROWER = 3
"""Factor by which such an estimate's interval, to either side, must be narrower than the goal."""


class Goal(Strict):
    """A metric of a problem, and the relative error to reach.

    If the exact value is not available (a Gram matrix that does not fit in memory, or takes hours), errors are relative
    to an estimate in float64 whose 95 % interval extends at most a third of the goal to either side.

    Attributes:
        problem, metric, error: label of the problem, metric, and relative error to reach.
        exact: whether the exact value is available.
        patience_s: seconds of one estimate, instead of ``limits.patience_s``. A method that takes longer is not tried
            with a larger budget, and does not take part; one that takes five times as long at its first calls with a
            budget is abandoned at once, and its other backends as well if it takes 25 times as long.
    """

    problem: ProblemLabel
    metric: MetricName
    error: PositiveFloat
    exact: bool = True
    patience_s: PositiveFloat | None = None


def _goal(problem: str, metric: str, error: float, **more: Any) -> Goal:
    # Not validated while this file is imported: that would import all problems.
    return Goal.model_construct(problem=problem, metric=metric, error=error, **more)


GOALS = [
    _goal("gru_hazelden", "trace", 0.003, patience_s=0.6),
    _goal("digits_mlp", "alignment", 0.01),
    _goal("digits_conv[N=64]", "trace", 0.01),
    _goal("digits_conv[N=64]", "norm", 0.01),
    _goal("mlp_he", "alignment", 0.03, patience_s=0.5),
    _goal("rnn_flipflop[H=128,N=100]", "alignment", 0.08, exact=False, patience_s=0.5),
]


class Settings(base.Settings):
    """The goals, and the search for the smallest budgets.

    Attributes:
        goals: metrics of problems with their errors.
        seeds: number of fresh seeds that confirm a budget.
        looks: maximum number of estimates with any other budget, and on any other backend.
        calls: calls of each method at its budget, made in turn.
        most_passes: the largest budget of a stochastic method.
    """

    USES = (*base.OF_TARGET, "seeds", "calls", "limits.passes", "limits.patience_s")

    seeds: int = Field(51, ge=FEWEST_ESTIMATES)
    looks: int = Field(21, ge=FEWEST_ESTIMATES)
    calls: PositiveInt = 15
    goals: list[Goal] = Field(default=GOALS, min_length=1)
    most_passes: PositiveInt = 4096


def run(settings: Settings) -> pd.DataFrame:
    """One row for each goal, method that gives its metric, and backend.

    ``passes_low`` and ``passes_high`` are the ends of the 95 % band of ``passes``, from ``law_seeds`` estimates;
    ``error`` is that of ``seeds`` fresh estimates. ``ratio`` is the ratio of seconds to those of the fastest published
    method, the ``rival``, in the same round. Its quartiles are over calls; ``ratio_low`` to ``ratio_high`` is a 95 %
    interval over calls and both budgets' bands, in which seconds are taken as proportional to passes.
    """
    return base.table(row for goal in settings.goals for row in _rows(settings, goal))


def _rows(settings: Settings, goal: Goal) -> list[base.Row]:
    truth = Truth(settings, goal)
    goal_columns = {"problem": goal.problem, "metric": goal.metric, "goal": goal.error}
    rows, turns = [], []
    for method in map(methods.get, methods.names()):
        known: Known | None = None
        for backend in method.backends if goal.metric in method.metrics else ():
            entrant = Entrant(settings, goal, truth, method.name, backend, known)
            case = {**goal_columns, "method": method.name, "backend": backend, "title": method.title}
            case |= {"kind": method.kind, "published": not method.is_own}
            rows.append(row := base.row(case, entrant.search))
            entrant.forget()
            known = known or entrant.known(row)
            if row["status"] == outcomes.OK:
                name = f"{method.name}, {backend}, {_said(row['passes'])}"
                turns.append(base.Turn(name, row, *entrant.calls(row["passes"])))
    times = base.in_turn(goal_columns, turns, settings.calls)
    _add_ratios([turn.row for turn in turns], times)
    return rows


def _add_ratios(rows: list[base.Row], times: list[list[float]]) -> None:
    """Add the rival, and the columns of the ratio to it, to rows that were timed in turn."""
    timed = [(row, own) for row, own in zip(rows, times, strict=True) if own]
    published = [(row, own) for row, own in timed if row["published"]]
    if published:
        rival, rival_times = min(published, key=lambda pair: pair[0]["seconds"])
        for row, own in timed:
            ratios = [a / b for a, b in zip(own, rival_times, strict=True)]
            row.update({"rival": rival["method"], "rival_backend": rival["backend"]})
            row.update(timing.quartiles("ratio", ratios))
            row["ratio_low"], row["ratio_high"] = (1.0, 1.0) if row is rival else _interval(row, rival, ratios)


def _interval(row: base.Row, rival: base.Row, ratios: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of a median ratio, by Student's t in the logarithm.

    An end is ``None`` if a budget's band has none. Both are if there are fewer than :data:`FEWEST_CALLS`.
    """
    if len(ratios) < FEWEST_CALLS:
        return None, None
    deviation = float(np.std(np.log(ratios), ddof=1)) * math.sqrt(math.pi / 2 / len(ratios))
    reach = float(stdtrit(len(ratios) - 1, 0.975)) * deviation
    ends = []
    for own, other, sign in (("passes_low", "passes_high", -1), ("passes_high", "passes_low", 1)):
        parts = [reach]
        for side, end in ((row, own), (rival, other)):
            if side["passes"] is not None:
                parts.append(math.log(side[end] / side["passes"]) if side[end] else math.nan)
        far = float(np.median(ratios)) * math.exp(sign * math.hypot(*parts))
        ends.append(far if math.isfinite(far) else None)
    return ends[0], ends[1]


class Known(NamedTuple):
    """The result of a method's first backend.

    Attributes:
        passes: its budget, or the last one that was tried.
        band: columns of the budget's band; empty if no budget was found.
        seconds: seconds of the call for which it was abandoned; 0 if it was not abandoned for its first calls.
    """

    passes: int
    band: dict[str, Any]
    seconds: float = 0.0


class Truth:
    """The value that errors are relative to."""

    def __init__(self, settings: Settings, goal: Goal) -> None:
        """Does not compute anything yet."""
        self._settings, self._goal = settings, goal
        self.problem: base.Once[Problem] = base.Once(lambda: problems.load(goal.problem))
        self._found = base.Once(self._find)

    @property
    def value(self) -> float:
        """The value.

        Raises:
            NtkbenchError: it replaces an exact value, and is not precise enough.
        """
        return self._found()[0]

    def columns(self) -> dict[str, Any]:
        """Sizes of the problem, the value as ``reference``, and its relative standard error."""
        value, error = self._found()
        return {**base.sizes(self.problem()), "reference": value, "reference_error": error}

    def _find(self) -> tuple[float, float]:
        goal, problem = self._goal, self.problem()
        if goal.exact:
            return reference.exact(problem)[goal.metric], 0.0
        method = methods.get(REFERENCE)
        assert isinstance(method, Incremental)
        prepared = method.prepare(problem, self._settings.target(dtype="float64"))
        metric, rtol = goal.metric, goal.error / NARROWER
        (found,) = method.estimates(prepared, (metric,), REFERENCE_PASSES, REFERENCE_SEED, rtol=rtol).values()
        if not found.relative_width() <= rtol:
            raise NtkbenchError(f"no reference for {goal.problem}: {'; '.join(found.notes)}")
        return found.value, (found.standard_error or 0.0) / abs(found.value)


class Entrant:
    """A method on one backend, and the search for its smallest budget for a goal."""

    def __init__(
        self,
        settings: Settings,
        goal: Goal,
        truth: Truth,
        name: str,
        backend: str = "torch",
        known: Known | None = None,
    ) -> None:
        """Does not prepare anything yet."""
        self._settings, self._goal, self._truth, self._name = settings, goal, truth, name
        self._patience = goal.patience_s or settings.limits.patience_s
        self._backend = backend
        self._known = known
        self.forget()
        self._last, self._too_long = 0, 0.0
        self._seeds = itertools.count()  # no two budgets share one, so that their errors are independent

    def forget(self) -> None:
        """Free the preparation, which takes memory. It is made again at the next call."""
        self._prepared = base.Once(lambda: methods.get(self._name).prepare(self._truth.problem(), self._target))

    @property
    def _target(self) -> Target:
        """Where it runs.

        Raises:
            Unavailable: the device is not present.
        """
        return self._settings.target(self._backend)

    def known(self, row: base.Row) -> Known | None:
        """The starting point of the method's other backends, from the row of :meth:`search`."""
        if row["status"] == outcomes.OK:
            band = {key: row.get(key) for key in ("passes_low", "passes_high", "law_seeds")}
            return Known(row["passes"], band) if row["passes"] else None
        return Known(self._last, {}, self._too_long) if self._last else None

    def search(self) -> dict[str, Any]:
        """Columns of the method at the smallest budget that is enough.

        Raises:
            Unavailable: it does not support the problem, takes too long, or does not reach the goal.
            OverMemory: it would take more memory than the limits allow.
        """
        method, problem, goal = methods.get(self._name), self._truth.problem(), self._goal
        reason = method.unsupported_reason(problem, goal.metric, self._target) or method.unscored_reason(problem)
        if reason:
            raise Unavailable(reason)
        if self._known and self._known.seconds > (most := TOO_LONG**2 * self._patience):
            taken = f"its first backend takes {self._known.seconds:.2g} s for {_said(self._known.passes)}"
            raise Unavailable(f"{taken}, over {most / self._patience:g} times patience_s ({self._patience:g})")
        if isinstance(method, Stochastic):
            least = method.least_passes(problem, goal.metric)
            if least > (most := self._settings.most_passes):
                raise Unavailable(f"takes at least {least:,} passes, and no more than {most:,} are tried")
            columns = self._smallest_budget(least)
        else:
            self._settings.limits.check_passes(method.passes_needed(problem, goal.metric, self._target))
            found = self._tried(None, self._settings.seeds if method.draws else 1)
            self._check_patience(found, None)
            if _error(found) > goal.error:
                raise Unavailable(f"error {_error(found):.2g}, over the goal")
            columns = {"passes": None, **found.columns(), "seeds": len(found.errors)}
        return {**self._truth.columns(), **columns}

    def calls(self, passes: int | None) -> tuple[Callable[[], Estimate], Callable[[], Any]]:
        """The timed call, with another seed each time, and a warm-up call."""
        seeds = itertools.count()
        return lambda: self._estimate(passes, next(seeds)), lambda: self._estimate(passes, 0)

    def _smallest_budget(self, least: int) -> dict[str, Any]:
        """Columns of the smallest budget that is enough, no smaller than ``least``."""
        if self._known and self._known.band:
            passes = self._known.passes
            found = self._tried(passes, self._settings.looks)
            if not self._is_too_small(found) and (passes == least or not self._is_too_large(found)):
                self._check_patience(found, passes)
                return {"passes": passes, **self._known.band, **found.columns()}
        points = self._around(self._known.passes if self._known else least, least)
        enough: dict[int, Reruns] = {}
        for _ in range(ROUNDS):
            wanted = self._law(points).budgets(self._goal.error)[0]
            largest = max(passes for passes, _ in points)
            passes = max(least, math.ceil(wanted)) if math.isfinite(wanted) else self._more(largest, 2**0.5, points)
            if passes in enough:
                found = enough[passes]
            else:
                found = self._tried(passes, self._settings.seeds)
                points.append((passes, found))
                if self._is_too_small(found):
                    continue
                if passes > least and self._is_too_large(found):
                    enough[passes] = found  # counts if the refitted law gives it again: passes are whole numbers
                    continue
            self._check_patience(found, passes)
            reached, low, high, *_ = self._law(points).reached(self._goal.error)
            if math.isnan(reached):  # according to all errors together, no budget is enough yet
                continue
            behind = sum(len(each.errors) for _, each in points)
            band = {"passes_low": min(low, passes), "passes_high": max(high, passes), "law_seeds": behind}
            return {"passes": passes, **band, **found.columns()}
        raise Unavailable(f"fresh seeds confirmed none of {ROUNDS} budgets, {passes} passes the last one")

    def _around(self, passes: int, least: int) -> list[tuple[int, Reruns]]:
        """Errors at insufficient budgets, and at twice the first sufficient one.

        Errors at the first sufficient budget are left out, since they selected it and may be low by luck; unless it is
        the smallest budget of all, which they did not select.
        """
        points: list[tuple[int, Reruns]] = []
        while True:
            found = self._tried(passes, self._settings.looks)
            points.append((passes, found))
            error = _error(found)
            if error > self._goal.error:
                self._check_patience(found, passes)
            enough = [tried for tried, each in points if _error(each) <= self._goal.error]
            if enough and (len(enough) < len(points) or min(enough) == least):
                short = [point for point in points if _error(point[1]) > self._goal.error]
                if float(np.median(found.seconds[1:] or found.seconds)) > self._patience:
                    return points
                beyond = min(self._settings.most_passes, 2 * min(enough))
                # The smallest budget of all was not chosen by its errors.
                return [*(short or points), (beyond, self._tried(beyond, self._settings.looks))]
            if enough:
                passes = max(least, passes // 2)
            else:
                # Errors fall at least as fast as budget^-1/2; steps are large while the goal is far.
                passes = self._more(passes, min(max((error / self._goal.error) ** 1.5, 2**0.5), 4.0), points)

    def _more(self, passes: int, step: float, points: Sequence[tuple[int, Reruns]]) -> int:
        """A larger budget."""
        most = self._settings.most_passes
        if passes >= most:
            error = _error(points[-1][1])
            raise Unavailable(f"error {error:.2g} with {passes} passes, and no more than {most} are tried")
        return min(most, math.ceil(passes * step))

    def _law(self, points: Sequence[tuple[int, Reruns]]) -> laws.Law:
        return laws.fit(
            pd.DataFrame(
                {"passes": passes, "first_seed": i, **each.columns(), **each.timed.columns()}
                for i, (passes, each) in enumerate(points)  # each has its own seeds
            )
        )

    def _is_too_small(self, found: Reruns) -> bool:
        return float(binom.sf(self._over(found) - 1, len(found.errors), 0.5)) < CONTRADICTED

    def _is_too_large(self, found: Reruns) -> bool:
        return float(binom.cdf(self._over(found), len(found.errors), 0.5)) < CONTRADICTED

    def _over(self, found: Reruns) -> int:
        return sum(error > self._goal.error for error in found.errors)

    def _tried(self, passes: int | None, seeds: int) -> Reruns:
        """Estimates over fresh seeds with a budget.

        Raises:
            Unavailable: the first calls take too long.
        """
        method, goal, settings = methods.get(self._name), self._goal, self._settings
        problem = self._truth.problem()
        settings.limits.check_memory(method.bytes_needed(problem, goal.metric, self._target, passes))
        found = Reruns(self._truth.value, settings.dtype)
        self._prepared()
        self._last = passes or 0
        longest = TOO_LONG * self._patience
        spent = f"over {TOO_LONG} times patience_s ({self._patience:g})"
        if (predicted := self._least_seconds(passes)) > TOO_LONG * longest:
            raise Unavailable(f"{_said(passes)} are predicted to take at least {predicted:.2g} s, {spent}")
        # The very first call may trace and compile, so the second one decides.
        for _ in range(2):
            self._add(found, passes, 1)
            if found.seconds[-1] <= longest:
                break
        else:
            self._too_long = found.seconds[-1]
            raise Unavailable(f"{_said(passes)} take {self._too_long:.2g} s, {spent}")
        while len(found.seconds) < seeds and (seeds == settings.seeds or not self._is_clear(found)):
            self._add(found, passes, min(LOOK, seeds - len(found.seconds)))
        return found

    def _least_seconds(self, passes: int | None) -> float:
        """Seconds of the counted operations of an estimate at the speed of large products; 0 if this is not known."""
        machine = speeds(self._target)
        if machine is None or passes is None:
            return 0.0
        count = methods.get(self._name).operations(self._truth.problem(), self._goal.metric, passes)
        return machine.seconds(count)

    def _add(self, found: Reruns, passes: int | None, count: int) -> None:
        found.run(lambda seed: self._estimate(passes, seed), [next(self._seeds) for _ in range(count)])

    def _is_clear(self, found: Reruns) -> bool:
        """Whether the estimates so far suffice: the goal is far from the median, or all take too long."""
        over, count = self._over(found), len(found.errors)
        too_long = count >= LOOK and min(found.seconds[1:]) > self._patience
        return too_long or float(binom.cdf(min(over, count - over), count, 0.5)) < HOPELESS

    def _check_patience(self, found: Reruns, passes: int | None) -> None:
        seconds = found.seconds[1:] or [self._again(passes)]
        if (median := float(np.median(seconds))) > self._patience:
            spent = f"over patience_s ({self._patience:g})"
            raise Unavailable(f"error {_error(found):.2g} after {median:.2g} s with {_said(passes)}, {spent}")

    def _again(self, passes: int | None) -> float:
        return timing.timed(lambda: self._estimate(passes, 0), 0).first_seconds

    def _estimate(self, passes: int | None, seed: int) -> Estimate:
        return methods.get(self._name).estimate(self._prepared(), self._goal.metric, passes, seed)


def _error(found: Reruns) -> float:
    return float(np.median(found.errors))


def _said(passes: int | None) -> str:
    return "all passes" if passes is None else counted(passes, "pass", "passes")

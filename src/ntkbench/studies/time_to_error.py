"""Seconds to a given error: each method at the smallest budget that reaches it, all in turn.

The smallest budget is one whose median relative error over seeds, against the exact value (or what :class:`Goal` has
stand for it), is within the goal. A budget is given up before all seeds are drawn where a sign test says that it is not
enough. Deterministic methods take part if their own error is within it. A method that does
not get there with the largest budget, or takes too long on the way, is a row with its reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt
from scipy.stats import binom

from ntkbench import methods, problems
from ntkbench.errors import NtkbenchError, Unavailable
from ntkbench.estimate import Estimate
from ntkbench.measure import outcomes, timing
from ntkbench.measure.schema import MetricName, ProblemLabel, Strict
from ntkbench.measure.seeds import Reruns
from ntkbench.methods.base import Incremental, Stochastic
from ntkbench.problem import Problem
from ntkbench.problems.base import reference
from ntkbench.studies import base

TIMED = True
PLUGINS = tuple(
    sorted(
        {methods.ROOM.module(name) for name in methods.ROOM.found()}
        | {problems.ROOM.module(name) for name in problems.ROOM.found()}
    )
)
AS_PUBLISHED = (
    "hutchpp",
    "hutchpp_paper",
    "one_sided_paper_reverse",
    "one_sided_paper_forward",
    "nystrompp",
    "shared_probe_alignment",
)
"""Estimators in the form of their sources; ratios are to the fastest of them."""
CLOSE = 1.3
"""Ratio of a budget that is enough to one that is not, below which the former counts as the smallest."""
TOO_LONG = 5
"""Multiple of a goal's patience after which a method is given up."""
LOOK = 10
"""Estimates between two looks at whether a budget can still be enough."""
HOPELESS = 1e-3
"""Probability of as many errors over the goal, if the median were within it, below which a budget is not enough."""
REFERENCE, REFERENCE_PASSES, REFERENCE_SEED = "group_u_statistics", 2**15, 2**31
"""The method whose estimates stand for exact values, its largest budget, and a seed that no other method gets."""
NARROWER = 3
"""How many times narrower than the goal the interval of such an estimate is, to either side."""


class Goal(Strict):
    """A metric of a problem that is wanted to a relative error.

    Where the exact value cannot be had (a Gram matrix that does not fit in memory, or takes hours), errors are against
    an estimate in float64 whose 95 % interval reaches no further than a third of the goal.

    Attributes:
        problem, metric, error: what is wanted, and to which relative error.
        exact: whether the exact value can be had.
        patience_seconds: of one estimate. A method that takes longer is not tried with a larger budget, and does not
            take part; one that takes five times as long at its first calls with a budget is given up at once.
    """

    problem: ProblemLabel
    metric: MetricName
    error: PositiveFloat
    exact: bool = True
    patience_seconds: PositiveFloat = 0.3


def _goal(problem: str, metric: str, error: float, **more: Any) -> Goal:
    # Not validated while this file is imported: that would import all problems.
    return Goal.model_construct(problem=problem, metric=metric, error=error, **more)


GOALS = [
    _goal("gru_hazelden", "trace", 0.003),
    _goal("digits_mlp", "alignment", 0.01),
    _goal("digits_conv[N=64]", "trace", 0.01),
    _goal("digits_conv[N=64]", "norm", 0.01),
    _goal("mlp_he", "alignment", 0.03, patience_seconds=1.0),
    _goal("rnn_flipflop[H=128,N=100]", "alignment", 0.08, exact=False, patience_seconds=1.0),
]


class Settings(base.Settings):
    """What is wanted, and how it is looked for.

    Attributes:
        goals: metrics of problems with their errors.
        seeds: over which errors are the median.
        calls: of each method at its budget, in turn.
        most_passes: the largest budget of a stochastic method.
    """

    seeds: int = Field(51, ge=2)
    calls: PositiveInt = 15
    goals: list[Goal] = Field(default=GOALS, min_length=1)
    most_passes: PositiveInt = 4096


def run(settings: Settings) -> pd.DataFrame:
    """One row for each goal and method that gives its metric in torch.

    ``ratio`` is to the seconds of the fastest estimator as published, the ``rival``, in the same round.
    """
    return base.table(row for goal in settings.goals for row in _rows(settings, goal))


def _rows(settings: Settings, goal: Goal) -> list[base.Row]:
    truth = Truth(settings, goal)
    goal_columns = {"problem": goal.problem, "metric": goal.metric, "goal": goal.error}
    rows, turns = [], []
    for method in map(methods.get, methods.names()):
        if "torch" in method.backends and goal.metric in method.metrics:
            entrant = Entrant(settings, goal, truth, method.name)
            case = {**goal_columns, "method": method.name, "title": method.title, "kind": method.kind}
            rows.append(base.row(case | {"published": method.name in AS_PUBLISHED}, entrant.search))
            if rows[-1]["status"] == outcomes.OK:
                turns.append(base.Turn(rows[-1], *entrant.calls(rows[-1]["passes"])))
    times = base.in_turn(goal_columns, turns, settings.calls)
    _add_ratios([turn.row for turn in turns], times)
    return rows


def _add_ratios(rows: list[base.Row], times: list[list[float]]) -> None:
    """Add the columns ``rival`` and ``ratio``, with quartiles, to rows that were timed in turn."""
    timed = [(row, own) for row, own in zip(rows, times, strict=True) if own]
    published = [(row, own) for row, own in timed if row["published"]]
    if published:
        rival, rival_times = min(published, key=lambda pair: pair[0]["seconds"])
        for row, own in timed:
            ratios = [a / b for a, b in zip(own, rival_times, strict=True)]
            row.update({"rival": rival["method"], **timing.quartiles("ratio", ratios)})


class Truth:
    """The value that errors are against."""

    def __init__(self, settings: Settings, goal: Goal) -> None:
        """Nothing is computed yet."""
        self._settings, self._goal = settings, goal
        self.problem: base.Once[Problem] = base.Once(lambda: problems.load(goal.problem))
        self._found = base.Once(self._find)

    @property
    def value(self) -> float:
        """The value.

        Raises:
            NtkbenchError: it stands for an exact value, and is not precise enough.
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
    """A method on its way to a goal."""

    def __init__(self, settings: Settings, goal: Goal, truth: Truth, name: str) -> None:
        """Nothing is prepared yet."""
        self._settings, self._goal, self._truth, self._name = settings, goal, truth, name
        self._prepared = base.Once(lambda: methods.get(name).prepare(truth.problem(), settings.target()))
        self._called = False

    def search(self) -> dict[str, Any]:
        """Columns of the method at the smallest budget that is enough.

        Raises:
            Unavailable: it does not serve the problem, takes too long, or does not get there.
            OverMemory: it would take more memory than the limits allow.
        """
        method, problem, goal = methods.get(self._name), self._truth.problem(), self._goal
        if reason := method.unsupported_reason(problem, goal.metric, self._settings.target()):
            raise Unavailable(reason)
        if isinstance(method, Stochastic):
            passes, found = self._smallest_budget(method.least_passes(problem, goal.metric))
            columns = found.columns()
        else:
            self._settings.limits.check_passes(method.passes_needed(problem, goal.metric, self._settings.target()))
            passes, found = None, self._tried(None)
            self._check_patience(found, None)
            if _error(found) > goal.error:
                raise Unavailable(f"error {_error(found):.2g}, over the goal")
            columns = {**found.columns(), "seeds": 1}
        return {**self._truth.columns(), "passes": passes, **columns}

    def calls(self, passes: int | None) -> tuple[Callable[[], Estimate], Callable[[], Any]]:
        """The call that is timed, with another seed each time, and one that warms up, where that is needed."""
        seeds = itertools.count()
        return (
            lambda: self._estimate(passes, next(seeds)),
            lambda: None if self._called else self._estimate(passes, 0),
        )

    def _smallest_budget(self, passes: int) -> tuple[int, Reruns]:
        goal, most = self._goal, self._settings.most_passes
        failed = 0
        while True:  # upwards, until a budget is enough
            found = self._tried(passes)
            self._check_patience(found, passes)
            error = _error(found)
            if error <= goal.error:
                break
            if passes >= most:
                raise Unavailable(f"error {error:.2g} with {passes} passes, and no more than {most} are tried")
            # Errors fall at least as the root of the budget; large steps are for where there is a long way to go.
            step = min(max((error / goal.error) ** 1.5, 2**0.5), 4.0)
            failed, passes = passes, min(most, math.ceil(passes * step))
        enough = passes, found
        while failed and enough[0] > max(CLOSE * failed, failed + 1):  # between one that is not enough and one that is
            passes = round(math.sqrt(failed * enough[0]))
            found = self._tried(passes)
            if _error(found) <= goal.error:
                enough = passes, found
            else:
                failed = passes
        return enough

    def _tried(self, passes: int | None) -> Reruns:
        """Estimates over seeds with a budget.

        Raises:
            Unavailable: the first calls take too long.
        """
        method, goal, settings = methods.get(self._name), self._goal, self._settings
        problem, target = self._truth.problem(), settings.target()
        settings.limits.check_memory(method.bytes_needed(problem, goal.metric, target, passes))
        found = Reruns(self._truth.value, settings.dtype)
        self._prepared()
        # The very first call may trace and compile, so the second one has the last word.
        longest = TOO_LONG * goal.patience_seconds
        for seed in range(2):
            found.run(lambda seed: self._estimate(passes, seed), [seed])
            if found.seconds[-1] <= longest:
                break
        else:
            spent = f"over {TOO_LONG} times the goal's patience ({goal.patience_seconds:g} s)"
            raise Unavailable(f"{_said(passes)} take {found.seconds[-1]:.2g} s, {spent}")
        seeds = settings.seeds if isinstance(method, Stochastic) else 1
        while len(found.seconds) < seeds and not self._is_hopeless(found):
            batch = range(len(found.seconds), min(seeds, len(found.seconds) + LOOK))
            found.run(lambda seed: self._estimate(passes, seed), batch)
        return found

    def _is_hopeless(self, found: Reruns) -> bool:
        """Whether the estimates so far say enough: that the median is over the goal, or that all take too long."""
        over = sum(error > self._goal.error for error in found.errors)
        too_long = len(found.seconds) >= LOOK and min(found.seconds[1:]) > self._goal.patience_seconds
        return too_long or float(binom.sf(over - 1, len(found.errors), 0.5)) < HOPELESS

    def _check_patience(self, found: Reruns, passes: int | None) -> None:
        goal = self._goal
        seconds = found.seconds[1:] or [self._again(passes)]
        if (median := float(np.median(seconds))) > goal.patience_seconds:
            spent = f"over the goal's patience ({goal.patience_seconds:g} s)"
            raise Unavailable(f"error {_error(found):.2g} after {median:.2g} s with {_said(passes)}, {spent}")

    def _again(self, passes: int | None) -> float:
        return timing.timed(lambda: self._estimate(passes, 0), 0).first_seconds

    def _estimate(self, passes: int | None, seed: int) -> Estimate:
        self._called = True
        return methods.get(self._name).estimate(self._prepared(), self._goal.metric, passes, seed)


def _error(found: Reruns) -> float:
    return float(np.median(found.errors))


def _said(passes: int | None) -> str:
    return "all passes" if passes is None else f"{passes} passes"

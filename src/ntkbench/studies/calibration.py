"""Whether 95 % intervals contain the exact value: ``auto`` and every stochastic method, on kernels of many kinds.

Networks are trained: Theta is the kernel at the weights after training, and the alignment is with the kernel at
initialisation. Each case is estimated with many seeds, in four modes: by default, with a budget of passes, to a
tolerance, and, for ``auto`` alone, with a matched budget: the mean passes of the runs to the tolerance, by the method
that most of them used. The last two show the cost of stopping at a tolerance, and its effect on the intervals.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench import ladder, methods, problems
from ntkbench.errors import Unavailable
from ntkbench.estimate import ROUNDING, Estimate
from ntkbench.measure import outcomes
from ntkbench.measure.schema import MetricName, ProblemLabel
from ntkbench.measure.seeds import Reruns
from ntkbench.methods.base import Incremental, Stochastic
from ntkbench.metrics import METRICS
from ntkbench.options import Options
from ntkbench.problem import Problem
from ntkbench.problems.base import reference
from ntkbench.studies import base

TIMED = False
AUTO = "auto"
METHODS = (AUTO, *(name for name in methods.names() if methods.get(name).kind == "stochastic"))
PROBLEMS = {
    "ordinary": "small_mlp",
    "imbalanced": "small_mlp[inputs=imbalanced]",
    "heavy-tailed": "small_mlp[inputs=heavy_tailed]",
    "one outlier": "small_mlp[inputs=one_outlier]",
    "many samples": "many_samples",
    "wide head": "small_wide_head",
    "interacting": "small_interacting",
    "transformer": "reversing_transformer",
    "recurrent": "gru_flipflop[H=12,N=12,T=6]",
}
WAYS = ("default", "passes", "rtol", "matched")
"""The modes; ``matched`` requests the most frequent method of ``rtol`` by name, with the mean passes of ``rtol``, or at
least those that it needs; an exact method takes no budget."""
TARGET_OF_AUTO, TARGET = (0.93, 0.97), (0.90, 0.98)
"""Where the coverage of a 95 % interval should lie: for ``auto``, and for a method requested by name."""
ABOUT_ERRORS = re.compile(r"\b(error|interval)s?\b")
"""Matches notes about errors and intervals."""
PLUGINS = tuple(methods.REGISTRY.module(name) for name in methods.REGISTRY.found())


class Settings(base.Settings):
    """What is estimated, how, and how often.

    Attributes:
        seeds: number of estimates of each case.
        problems: labels of problems, by the kind of kernel that each represents.
        metrics, methods: all pairs of these are cases, if the method gives the metric.
        ways: modes, among :data:`WAYS`.
        passes: budget of the mode ``passes``.
        rtol: tolerance of the mode ``rtol``.
        most_passes: maximum number of passes of the mode ``rtol``.
    """

    USES = (*base.OF_TARGET, "seeds")

    seeds: int = Field(300, ge=2)
    problems: dict[str, ProblemLabel] = Field(default=PROBLEMS, min_length=1)
    metrics: list[MetricName] = Field(default=list(METRICS), min_length=1)
    # The names are known when the class is created, which is when pydantic needs them.
    methods: list[Literal[*METHODS]] = Field(default=list(METHODS), min_length=1)  # type: ignore[valid-type]
    ways: list[Literal[*WAYS]] = Field(default=list(WAYS), min_length=1)  # type: ignore[valid-type]
    passes: PositiveInt = 40
    rtol: float = Field(0.25, gt=0, lt=1)
    most_passes: PositiveInt = 128


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem, metric, method that gives it, and mode: coverage, errors, stated errors and passes."""
    return base.table(row for name in settings.problems for row in _rows(settings, name))


def _rows(settings: Settings, name: str) -> Iterator[base.Row]:
    subject = Subject(settings, settings.problems[name])
    for metric in settings.metrics:
        for method in settings.methods:
            if method != AUTO and metric not in methods.get(method).metrics:
                continue
            about = {
                "problem": name,
                "label": subject.label,
                "metric": metric,
                "method": method,
                "title": _title(method),
            }
            stopped: base.Row | None = None
            for way in WAYS:
                case = {**about, "kind": "stochastic", "way": way}
                if way in settings.ways and (way != "matched" or method == AUTO):
                    row = base.row(case, functools.partial(_measure, settings, subject, metric, method, way, stopped))
                    stopped = row if way == "rtol" and row["status"] == outcomes.OK else None
                    yield row


def _title(method: str) -> str:
    return AUTO if method == AUTO else base.title(method)


def _measure(
    settings: Settings, subject: Subject, metric: str, method: str, way: str, stopped: base.Row | None
) -> dict[str, Any]:
    """Columns of a case; ``stopped`` is the row of the same case in the mode ``rtol``, if it has estimates."""
    if way == "matched":
        if stopped is None:
            raise Unavailable("no passes to match: there are no estimates to the tolerance")
        mostly = methods.get(stopped["mostly"])
        budget: int | None = None
        if isinstance(mostly, Stochastic):
            budget = max(round(stopped["passes_spent"]), mostly.least_passes(subject.problem(), metric))
        asked = Options(mostly.name, budget)
    else:
        passes = {"passes": settings.passes, "rtol": settings.most_passes}.get(way)
        asked = Options(method, passes, settings.rtol if way == "rtol" else None)
    if method != AUTO:
        named = methods.get(method)
        if asked.rtol is not None and not isinstance(named, Incremental):
            raise Unavailable("takes no rtol, because it cannot add probes")
        budget = asked.passes or getattr(named, "default_passes", None)
        if reason := named.unsupported_reason(subject.problem(), metric, settings.target(), budget):
            raise Unavailable(reason)
    found = Reruns(subject.exact()[metric], settings.dtype)
    found.run(lambda seed: subject.estimate(metric, replace(asked, seed=seed)), range(settings.seeds))
    within = None if asked.rtol is None else _mean([error <= asked.rtol for error in found.errors])
    return {
        **base.sizes(subject.problem()),
        "passes": asked.passes,
        "rtol": asked.rtol,
        "within": within,
        **columns(asked.method, found),
    }


class Subject:
    """The problem of some rows, prepared once for all methods that share a preparation.

    Attributes:
        label: label of the problem.
        problem: loads the problem, at its weights after training.
        exact: its exact values by metric.
    """

    def __init__(self, settings: Settings, label: str) -> None:
        """Does not load anything yet."""
        self.label, self._target = label, settings.target()
        self.problem = base.Once(lambda: _trained(problems.load(label)))
        self.exact = base.Once(lambda: reference.compute(self.problem())["metrics"])
        self._prepare = base.Once(lambda: base.preparing(self.problem(), self._target))

    def estimate(self, metric: str, options: Options) -> Estimate:
        """The estimate that a user would get."""
        return ladder.estimates(self.problem(), (metric,), self._target, options, self._prepare())[metric]


def _trained(problem: Problem) -> Problem:
    """The same problem with its weights after training instead of the initial ones, and vice versa."""
    return replace(
        problem,
        name=f"{problem.name} trained",
        theta_0=problem.weights("theta_f"),
        theta_f=problem.theta_0,
        fixed_0=problem.fixed_f,
        fixed_f=problem.fixed_0,
    )


def columns(method: str, found: Reruns) -> dict[str, Any]:
    """Columns of estimates over seeds: coverage, errors, stated errors, and the verdict on the coverage.

    An estimate is exact if it is accurate to rounding and states no error, or one below rounding. If all estimates are
    exact, there is no coverage to measure. Otherwise ``covered`` is the share of all estimates that are exact or whose
    95 % interval contains the exact value; exact ones count, since which runs are exact is random. ``covered_low`` to
    ``covered_high`` is Wilson's 95 % interval of this share. ``bias`` and ``rmse`` are the mean and the root mean
    square of the relative errors, ``stated`` is the root mean square of the finite relative standard errors, 0 for an
    estimate that states none, and ``ratio`` is ``rmse / stated``. ``intervals`` is the number of estimates that are not
    exact. ``noted`` is the share of all estimates that have a note about their error or interval, and ``notes`` the
    most frequent note of any kind. ``by`` lists the methods that ran, and ``mostly`` is the most frequent one. The
    target is for intervals. The verdict raises it for the exact estimates, which always cover. Coverage counts as too
    high only if it is so without the rounding bound that intervals include.

    Args:
        method: the requested method.
        found: the estimates.
    """
    from scipy.stats import binomtest

    rounding = ROUNDING * float(np.finfo(found.dtype).eps) * abs(found.exact)
    exact = [(e.standard_error or 0.0) <= rounding and e.covers(found.exact, found.dtype) for e in found.estimates]
    notes = collections.Counter("; ".join(e.notes) for e in found.estimates if e.notes)
    noted = [any(ABOUT_ERRORS.search(note) for note in e.notes) for e in found.estimates]
    ran = collections.Counter(e.method for e in found.estimates)
    shared = {
        **found.columns(),
        "passes_spent": _mean([e.passes for e in found.estimates if e.passes is not None]),
        "by": ", ".join(sorted(ran)),
        "mostly": ran.most_common(1)[0][0],
        "exact": _mean(exact),
        "noted": _mean(noted),
        "notes": notes.most_common(1)[0][0] if notes else "",
    }
    least, most = TARGET_OF_AUTO if method == AUTO else TARGET
    shared |= {"target_low": least, "target_high": most}
    if all(exact):
        return {**shared, "covered": None, "verdict": "exact"}
    errors = np.array([e.value for e in found.estimates]) / found.exact - 1
    stated = np.array([e.standard_error or 0.0 for e in found.estimates]) / abs(found.exact)
    stated = stated[np.isfinite(stated)]
    hits = sum(known or _contains(e, found.exact) for e, known in zip(found.estimates, exact, strict=True))
    of_exact = sum(exact) / len(exact)
    bare = [replace(e, rounding=None) for e in found.estimates]
    narrow = sum(known or _contains(e, found.exact) for e, known in zip(bare, exact, strict=True))
    interval, without = (binomtest(count, len(exact)).proportion_ci(method="wilson") for count in (hits, narrow))
    rmse = math.sqrt(_mean(errors**2))
    size = math.sqrt(_mean(stated**2)) if len(stated) else None
    return {
        **shared,
        "intervals": len(exact) - sum(exact),
        "covered": hits / len(exact),
        "covered_low": interval.low,
        "covered_high": interval.high,
        "bias": _mean(errors),
        "rmse": rmse,
        "stated": size,
        "ratio": rmse / size if size else None,
        "width": float(np.median([e.relative_width() for e in found.estimates])),
        "verdict": _verdict(
            without.low,
            interval.high,
            of_exact + (1 - of_exact) * least,
            of_exact + (1 - of_exact) * most,
            method != AUTO and shared["noted"] >= 0.5,
        ),
    }


def _contains(estimate: Estimate, exact: float) -> bool:
    """Whether the interval contains a value, without an allowance for rounding beyond its own."""
    low, high = estimate.interval()
    return low <= exact <= high


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _verdict(low: float, high: float, least: float, most: float, excused: bool) -> str:
    """``in range`` if the interval ``[low, high]`` of the coverage overlaps its target.

    Args:
        low: lower end, for intervals without their rounding bound.
        high: upper end, for intervals with it.
        least, most: the target.
        excused: whether coverage outside the target is ``noted`` rather than ``below`` or ``above``.
    """
    if high >= least and low <= most:
        return "in range"
    return "noted" if excused else "below" if high < least else "above"

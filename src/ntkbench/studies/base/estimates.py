"""What the studies of estimators share: reruns at a number of samples, and exact methods beside them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import Field, PositiveFloat

from ntkbench import methods, operators, problems
from ntkbench.errors import Unavailable
from ntkbench.measure import timing
from ntkbench.metrics import parameter_sets
from ntkbench.problem import Problem
from ntkbench.problems.base import reference
from ntkbench.studies import base

METHODS = ("direct", "structured_derivatives", "hutchpp", "hutchpp_paper", "one_sided_paper_reverse")
METHODS += ("one_sided_paper_forward", "shared_probe_alignment")
PROBLEMS = ("mlp", "gru", "classifiers")
PLUGINS = (*(f"ntkbench.methods.{name}" for name in METHODS), *(f"ntkbench.problems.{name}" for name in PROBLEMS))
FEWEST = 5
"""Reruns at least, as the configuration's error_seconds has it."""
ONE_BY_ONE = "direct_one_by_one"
"""The baseline as the paper's script runs it."""


class Settings(base.Settings):
    """Of a study of estimators.

    Attributes:
        rerun_seconds: after which no further rerun is begun (five at least).
        direct_share: share of Theta's columns on which the baselines by columns are timed; the rest is extrapolated.
    """

    rerun_seconds: PositiveFloat = 3600
    direct_share: float = Field(1.0, gt=0, le=1)


def load(names: Sequence[str]) -> Problem:
    """The first of these problems whose data can be had.

    Raises:
        Unavailable: none can.
    """
    for name in names[:-1]:
        try:
            return problems.load(name)
        except Unavailable:
            continue
    return problems.load(names[-1])


def reruns(
    settings: Settings, problem: Problem, metric: str, name: str, samples: Sequence[int], **columns: Any
) -> Iterator[dict[str, Any]]:
    """A row for each number of samples (at least one): seconds, estimates and errors over reruns with other seeds."""
    method, target = methods.get(name), settings.target()
    exact = reference.exact(problem)[metric]
    prepared = method.prepare(problem, target)
    case = case_of(problem, metric, name, method.title, **columns)
    method.estimate(prepared, metric, method.cost(metric, min(samples)), seed=settings.seeds)  # warms up
    for m in samples:
        passes = method.cost(metric, m)

        def measure(m: int = m, passes: int = passes) -> dict[str, Any]:
            times, found = [], []
            while len(found) < settings.seeds:
                if len(found) >= FEWEST and sum(times) > settings.rerun_seconds:
                    break
                start = time.perf_counter()
                found.append(method.estimate(prepared, metric, passes, seed=len(found)))
                times.append(time.perf_counter() - start)
            values = np.array([estimate.value for estimate in found])
            errors = np.abs(values - exact) / abs(exact)
            if metric == "norm":  # the papers' is squared
                errors = np.abs(values**2 - exact**2) / exact**2
            spread = {**timing.quartiles("seconds", times), **timing.quartiles("value", values)}
            spread |= timing.quartiles("error", errors)
            return {"passes": found[0].passes, "seeds": len(found), "reference": exact, **spread}

        yield base.row(case | {"m": m}, measure)


def baseline(settings: Settings, problem: Problem, metric: str, name: str, **columns: Any) -> dict[str, Any]:
    """A row for an exact method; of those by columns of Theta the settings' share is timed."""
    if name in ("direct", ONE_BY_ONE):
        return _by_columns(settings, problem, metric, name, columns)
    method = methods.get(name)

    def measure() -> dict[str, Any]:
        prepared = method.prepare(problem, settings.target())
        exact = reference.exact(problem)[metric]
        times, found = timing.timed(lambda: method.estimate(prepared, metric), settings.timing_seconds)
        error = abs(found[0].value - exact) / abs(exact)
        return {**timing.quartiles("seconds", times), **timing.quartiles("error", [error]), "share": 1.0}

    return base.row(case_of(problem, metric, name, method.title, **columns), measure)


def _by_columns(
    settings: Settings, problem: Problem, metric: str, name: str, columns: dict[str, Any]
) -> dict[str, Any]:
    title = "direct" if name == "direct" else "direct, a column at a time"

    def measure() -> dict[str, Any]:
        jacobians = [operators.linearise(problem, end, settings.target()) for end in parameter_sets(metric)]
        j = jacobians[0]
        count = max(1, math.ceil(settings.direct_share * j.n))
        size = 1 if name == ONE_BY_ONE else max(j.blocks(j.n))
        stops = [*range(0, count, size), count]

        def once() -> float:
            return sum(
                float((o.ntk(o.basis(a, b)) ** 2).sum()) for o in jacobians for a, b in itertools.pairwise(stops)
            )

        times, _ = timing.timed(once, settings.timing_seconds)
        return {**timing.quartiles("seconds", np.array(times) * j.n / count), "share": count / j.n}

    return base.row(case_of(problem, metric, name, title, **columns), measure)


def case_of(problem: Problem, metric: str, method: str, title: str, **columns: Any) -> dict[str, Any]:
    """Columns that say what a row is of."""
    sizes = {size: getattr(problem, size) for size in ("N", "O", "P", "n")}
    return {"problem": problem.name, **sizes, "metric": metric, "method": method, "title": title, **columns}

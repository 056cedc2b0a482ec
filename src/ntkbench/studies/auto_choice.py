"""The choice of ``method="auto"``: its time compared with all methods in PyTorch that reach the same tolerance.

A task is a metric of a problem at a relative tolerance. The rivals are exact methods, and estimators that stop once
their 95 % interval is within the tolerance. Approximate methods state no error and are left out. Methods are prepared,
as in a :class:`ntkbench.Kernel` that is used more than once, and those that may be the fastest are timed in turn with
``auto``. Preparations are freed after a method was timed alone, and made again for the turns, which hold them together.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt

from ntkbench import ladder, methods, problems
from ntkbench.errors import Unavailable
from ntkbench.estimate import Estimate
from ntkbench.measure import outcomes, timing
from ntkbench.measure.schema import MetricName, ProblemLabel
from ntkbench.methods import Method
from ntkbench.methods.base import Incremental, Stochastic
from ntkbench.metrics import METRICS
from ntkbench.options import Options
from ntkbench.problem import Problem
from ntkbench.studies import base

TIMED = True
PLUGINS = base.methods_and_problems()
AUTO = "auto"
SEEDS = (2, 3, 4)
"""Seeds of timed calls; a rival must reach the tolerance with each of them."""
RIVAL = 4.0
"""A method is timed in turn with the others if its time alone is within this factor of the fastest one's."""
SLOWER = 1.5
"""A rival is given up if its time alone exceeds ``limits.patience_s`` and this multiple of the time of ``auto``."""

PROBLEMS = [
    "digits_mlp[N=64]",
    "digits_conv[N=32]",
    "mlp_hazelden[N=16]",
    "mlp_he",
    "gru_hazelden[N=4,T=5]",
    "lstm_flipflop",
    "transformer_flipflop",
    "resnet18[N=4,O=10,width=8]",
]


class Settings(base.Settings):
    """Which tasks there are, and how often calls are timed.

    Attributes:
        problems: labels.
        metrics: of each problem that has them.
        rtols: relative tolerances.
        calls: timed ones of each method, in turn.
    """

    USES = (*base.OF_TARGET, "calls", "limits.passes", "limits.patience_s")

    problems: list[ProblemLabel] = Field(default=PROBLEMS, min_length=1)
    metrics: list[MetricName] = Field(default=list(METRICS), min_length=1)
    rtols: list[PositiveFloat] = Field(default=[0.1, 0.01], min_length=1)
    calls: PositiveInt = 9


def run(settings: Settings) -> pd.DataFrame:
    """One row for each task and method, ``auto`` first.

    ``ratio`` is the ratio of the seconds of ``auto`` to those of the method, with quartiles over calls; ``fastest``
    marks the fastest method other than ``auto``. ``by`` is the method that ``auto`` chose. ``reached`` is whether the
    interval is within the tolerance with each seed; there are no ratios for an ``auto`` that misses it.
    """
    return base.table(
        row
        for label in settings.problems
        for metric, rtol in itertools.product(settings.metrics, settings.rtols)
        for row in _rows(settings, label, metric, rtol)
    )


@functools.lru_cache(maxsize=1)
def _loaded(label: str) -> Problem:
    return problems.load(label)


class Prepared:
    """A problem with the preparations of some methods, each made once and freed with this object."""

    def __init__(self, settings: Settings, task: dict[str, Any]) -> None:
        """Does not load or prepare anything yet."""
        self._settings, self._task = settings, task
        self._prepare = base.Once(lambda: base.preparing(self.problem, settings.target()))

    @property
    def problem(self) -> Problem:
        """The problem of the task."""
        return _loaded(self._task["problem"])

    def estimate(self, name: str, seed: int) -> Estimate:
        """The metric by a method, to the tolerance of the task if the method takes one."""
        metric = self._task["metric"]
        rtol = self._task["rtol"] if name == AUTO or isinstance(methods.get(name), Stochastic) else None
        options = Options(method=name, rtol=rtol, seed=seed)
        return ladder.estimates(self.problem, (metric,), self._settings.target(), options, self._prepare())[metric]


def _rows(settings: Settings, label: str, metric: str, rtol: float) -> list[base.Row]:
    task = {"problem": label, "metric": metric, "rtol": rtol}

    def alone(name: str, patience: float) -> base.Row:
        measure = functools.partial(_alone, settings, task, name, patience)
        return base.row({**task, "method": name, **_described(name)}, measure)

    auto = alone(AUTO, math.inf)
    patience = max(settings.limits.patience_s, SLOWER * auto.get("alone_seconds", 0.0))
    rows = [auto, *(alone(name, patience) for name in _rivals(metric))]
    measured = [row for row in rows if row["status"] == outcomes.OK]
    limit = RIVAL * min((row["alone_seconds"] for row in measured), default=0.0)
    prepared = Prepared(settings, task)
    turns = [
        base.Turn(row["method"], row, *_calls(prepared, row["method"]))
        for row in measured
        if row["method"] == AUTO or row["alone_seconds"] <= limit
    ]
    times = base.in_turn(task, turns, settings.calls)
    _add_ratios([turn.row for turn in turns], times)
    return rows


def _rivals(metric: str) -> Iterator[str]:
    for method in map(methods.get, methods.names()):
        stated = method.kind == "exact" or isinstance(method, Incremental)
        if stated and metric in method.metrics and "torch" in method.backends:
            yield method.name


def _described(name: str) -> dict[str, str]:
    if name == AUTO:
        return {"title": AUTO, "kind": ""}
    method = methods.get(name)
    return {"title": method.title, "kind": method.kind}


def _alone(settings: Settings, task: dict[str, Any], name: str, patience: float) -> dict[str, Any]:
    """A method's estimates with the timed seeds: the widest interval, and the fastest time after the first call.

    Its preparation is freed afterwards. A later call that takes more than ``patience`` seconds is the last one.

    Raises:
        Unavailable: it does not apply, takes too long, or misses the tolerance with a seed.
        OverMemory: it would take more memory than the limits allow.
    """
    prepared = Prepared(settings, task)
    if task["metric"] == "alignment" and prepared.problem.theta_f is None:
        raise Unavailable("the network stays untrained")
    if name != AUTO:
        _check(settings, prepared.problem, task["metric"], methods.get(name))
    widths, seconds = [], []
    for seed in SEEDS:
        call = timing.timed(functools.partial(prepared.estimate, name, seed), 0)
        widths.append(call.first.relative_width())
        seconds.append(call.first_seconds)
        if name != AUTO and not widths[-1] <= task["rtol"]:
            raise Unavailable(f"reaches {widths[-1]:.2g} with {call.first.passes:g} passes")
        # The first call traces and compiles.
        if len(seconds) > 1 and min(seconds[1:]) > patience:
            raise Unavailable(f"takes {seconds[-1]:.2g} s, more than {patience:.2g} s")
    return {
        **base.sizes(prepared.problem),
        "by": call.first.method,
        "passes_spent": call.first.passes,
        "relative_width": max(widths),
        "reached": max(widths) <= task["rtol"],
        "alone_seconds": min(seconds[1:]),
        "seeds": len(SEEDS),
    }


def _check(settings: Settings, problem: Problem, metric: str, method: Method) -> None:
    """Refuse a method that does not apply, or would take too long.

    Raises:
        Unavailable: says why.
        OverMemory: it would take more memory than the limits allow.
    """
    target, limits = settings.target(), settings.limits
    if reason := method.unsupported_reason(problem, metric, target):
        raise Unavailable(reason)
    if not isinstance(method, Stochastic):
        limits.check_passes(method.passes_needed(problem, metric, target))
    limits.check_memory(method.bytes_needed(problem, metric, target))


def _calls(prepared: Prepared, name: str) -> tuple[Callable[[], Estimate], Callable[[], Any]]:
    """The timed call, which cycles through a few seeds, and a warm-up with each of them.

    The number of probes depends on the seed, and the program for a new number is traced at its first call. Methods
    share these programs, so the first method in a round would otherwise trace for all.
    """
    seeds = itertools.cycle(SEEDS)
    call = functools.partial(prepared.estimate, name)
    return lambda: call(next(seeds)), lambda: [call(seed) for seed in SEEDS]


def _add_ratios(rows: list[base.Row], times: list[list[float]]) -> None:
    """Mark the fastest method, and add the ratios of the time of ``auto`` to those of the methods, if it is as good."""
    timed = [(row, own) for row, own in zip(rows, times, strict=True) if own]
    own_of_auto = next((own for row, own in timed if row["method"] == AUTO and row["reached"]), None)
    others = [pair for pair in timed if pair[0]["method"] != AUTO]
    fastest = min(others, key=lambda pair: float(np.median(pair[1])), default=(None, None))[0]
    for row, own in others:
        row["fastest"] = row is fastest
        if own_of_auto:
            row.update(timing.quartiles("ratio", [a / b for a, b in zip(own_of_auto, own, strict=True)]))

"""The cost of one call on networks of real size: seconds, passes, memory, and the resulting interval.

A row is one first call with ``method="auto"`` and a tolerance, on a loaded problem: tracing, certificate and estimate.
Exact values of these networks are not available, so errors are those that the estimates state.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import pandas as pd
from pydantic import Field, PositiveFloat

from ntkbench import ladder, metrics, problems
from ntkbench.estimate import Estimate
from ntkbench.measure import timing
from ntkbench.measure.schema import MetricName, ProblemLabel, Strict
from ntkbench.options import Options
from ntkbench.studies import base

TIMED = True
PLUGINS = base.methods_and_problems()


class Case(Strict):
    """A call.

    Attributes:
        problem, metric: label of the problem, and the metric.
        rtol: relative tolerance.
        most_seconds, most_bytes: limits of the call's goal, if it has one.
    """

    problem: ProblemLabel
    metric: MetricName = "trace"
    rtol: PositiveFloat = Field(default=0.05, lt=1)
    most_seconds: PositiveFloat | None = None
    most_bytes: PositiveFloat | None = None


def _case(problem: str, metric: str, rtol: float, **more: Any) -> Case:
    # Not validated while this file is imported: that would import all problems.
    return Case.model_construct(problem=problem, metric=metric, rtol=rtol, **more)


CASES = [
    _case("gpt2_small", "trace", 0.05, most_seconds=600, most_bytes=8 * 2**30),
    _case("gpt2_small[head=untied]", "trace", 0.05),
    _case("gpt2_small[read=states]", "trace", 0.05),
    _case("transformer_small", "trace", 0.01),
    _case("transformer_small", "alignment", 0.02),
    _case("resnet20_cifar[N=200]", "trace", 0.01),
    _case("resnet20_cifar[N=200]", "alignment", 0.02),
]


class Settings(base.Settings):
    """The calls.

    Attributes:
        cases: problems with metrics and tolerances.
    """

    USES = base.OF_TARGET

    cases: list[Case] = Field(default=CASES, min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each case.

    ``seconds`` and ``memory_bytes`` are those of one call; memory is the peak resident memory minus that before the
    call, or on a GPU the peak of all allocations. ``allowed_bytes`` is the value of ``memory=``, and
    ``weights_bytes`` the size of the parameters, at both sets of weights for an alignment; ``within_allowed`` tells
    whether the memory is at most their sum. ``goal_met`` tells whether a case with a goal reaches its tolerance within
    the limits of time and memory. ``low`` and ``high`` are the ends of the 95 % interval.
    """
    return base.table(
        base.row(case.model_dump(), functools.partial(_measure, settings, case)) for case in settings.cases
    )


def _measure(settings: Settings, case: Case) -> dict[str, Any]:
    from ntkbench.layerwise import reuse

    problem, target = problems.load(case.problem), settings.target()
    reuse.forget()  # as in a process that has not seen the network
    found: list[tuple[float, Estimate]] = []

    def call() -> None:
        prepare = base.preparing(problem, target)
        start = time.perf_counter()
        estimate = ladder.estimates(problem, (case.metric,), target, Options(rtol=case.rtol), prepare)[case.metric]
        found.append((time.perf_counter() - start, estimate))

    memory = timing.peak_bytes_on(target, call)
    ((seconds, estimate),) = found
    low, high = estimate.interval()
    weights = problem.P * target.itemsize * len(metrics.parameter_sets(case.metric))
    return {
        **base.sizes(problem),
        "by": estimate.method,
        "value": estimate.value,
        "low": low,
        "high": high,
        "relative_width": estimate.relative_width(),
        "passes_spent": estimate.passes,
        "certificate": estimate.certificate,
        "seconds": seconds,
        "memory_bytes": memory,
        "allowed_bytes": target.memory,
        "weights_bytes": weights,
        "within_allowed": None if memory is None else memory <= target.memory + weights,
        "goal_met": _meets(case, estimate.relative_width(), seconds, memory),
        "notes": "; ".join(estimate.notes),
        "calls": 1,
    }


def _meets(case: Case, width: float, seconds: float, memory: int | None) -> bool | None:
    """Whether the goal is met; ``None`` if there is none, or if the memory is not known."""
    if case.most_seconds is None or case.most_bytes is None or memory is None:
        return None
    return width <= case.rtol and seconds <= case.most_seconds and memory <= case.most_bytes

"""The accuracy of predicted costs: predicted and measured seconds, bytes and passes of methods.

Predictions are made once for each problem and metric, before its measurements. Estimates with the predicted budget are
measured, after a first call. A method that is predicted to take over twice ``limits.patience_s`` is left out.

A method that traces the network is predicted from runs on some of the samples, whose number is in the column
``samples``. If these are all N samples, the prediction is a measurement, and the row shows only how well it repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pandas as pd
from pydantic import Field, PositiveFloat, model_validator

from ntkbench import cost, methods, problems
from ntkbench.errors import Unavailable
from ntkbench.measure import timing
from ntkbench.measure.schema import MetricName, ProblemLabel, Strict
from ntkbench.studies import base

TIMED = True
OVER = 2.0
"""Maximum predicted seconds of a measured method, in ``limits.patience_s``: slow predictions may be too high."""
PLUGINS = base.methods_and_problems()


class Case(Strict):
    """Methods on a problem.

    Attributes:
        problem: label of the problem.
        metric: the metric that the methods compute.
        rtol: relative tolerance.
        methods: names of the methods; all that run on torch if not given.
    """

    problem: ProblemLabel
    metric: MetricName = "trace"
    rtol: PositiveFloat = Field(default=0.03, lt=1)
    methods: list[str] | None = None

    @model_validator(mode="after")
    def _there_are_such_methods(self) -> Case:
        for name in self.methods or ():
            methods.get(name)
        return self


def _case(problem: str, metric: str, rtol: float = 0.03) -> Case:
    # Not validated while this file is imported: that would import all problems.
    return Case.model_construct(problem=problem, metric=metric, rtol=rtol, methods=None)


CASES = [
    _case("digits_mlp[N=64]", "trace"),
    _case("digits_mlp[N=64]", "alignment"),
    _case("digits_conv[N=64]", "trace"),
    _case("digits_conv[N=64]", "norm"),
    _case("mlp_hazelden", "trace"),
    _case("mlp_hazelden", "norm"),
    _case("gru_hazelden", "trace"),
    _case("gru_hazelden[N=4,T=5]", "effective_rank"),
    _case("resnet18", "trace"),
]


class Settings(base.Settings):
    """The cases that are predicted and measured.

    Attributes:
        cases: problems with metrics and tolerances.
        calls: timed calls of each method, after a first one.
    """

    USES = (*base.OF_TARGET, "calls", "limits.patience_s")

    calls: int = Field(5, ge=1)
    cases: list[Case] = Field(default=CASES, min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem, metric and method: ``predicted_seconds`` beside ``seconds``, and so on."""
    return base.table(row for case in settings.cases for row in _rows(settings, case))


def _rows(settings: Settings, case: Case) -> Iterator[base.Row]:
    names = methods.names() if case.methods is None else case.methods
    chosen = [name for name in names if "torch" in methods.get(name).backends]
    problem = base.Once(lambda: problems.load(case.problem))
    predicted = base.Once(
        lambda: {
            each.method: each
            for each in cost.predict(problem(), case.metric, settings.target(), rtol=case.rtol, names=chosen)
        }
    )
    for name in chosen:
        method = methods.get(name)
        if case.metric not in method.metrics:
            continue
        columns = {"problem": case.problem, "metric": case.metric, "rtol": case.rtol, "method": name}
        columns |= {"title": method.title, "kind": method.kind}
        yield base.row(columns, functools.partial(_measure, settings, case, problem, predicted, name))


def _measure(settings: Settings, case: Case, problem: Any, predicted: Any, name: str) -> dict[str, Any]:
    found: cost.Cost = predicted()[name]
    if found.reason or found.seconds is None:
        raise Unavailable(found.reason)
    patience = settings.limits.patience_s
    if found.seconds > OVER * patience:
        raise Unavailable(f"is predicted to take {found.seconds:.2g} s, over {OVER:g} times patience_s ({patience:g})")
    method, target, budget = methods.get(name), settings.target(), found.budget
    prepared = method.prepare(problem(), target)
    times = timing.timed(lambda: method.estimate(prepared, case.metric, budget), settings.calls)
    peak = timing.peak_bytes(lambda: method.estimate(prepared, case.metric, budget)) if _on_host(settings) else None
    seconds, first = times.columns()["seconds"], times.first
    return {
        **base.sizes(problem()),
        "samples": found.samples,
        "predicted_passes": found.passes,
        "passes_spent": first.passes,
        "predicted_operations": found.operations,
        "predicted_seconds": found.seconds,
        **times.columns(),
        "seconds_ratio": found.seconds / seconds,
        "predicted_bytes": found.bytes,
        "memory_bytes": peak,
        "predicted_error": found.error,
        "relative_standard_error": relative(first.standard_error, first.value),
    }


def relative(error: float | None, value: float) -> float | None:
    """A standard error relative to its value; ``None`` if there is no error, or if the value is 0."""
    return None if error is None or not value else error / abs(value)


def _on_host(settings: Settings) -> bool:
    from ntkbench import operators

    return operators.device_memory(settings.target()) is None

"""The cost of certificates: estimates with and without certification, in turn with plain backward passes.

A prepared method is certified at its first estimate, once for each kind of product that it uses. Here every second
estimate is certified again. The cost is given as a share of the estimate, and in plain backward passes over the whole
batch, which take longer than batched passes.
"""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
from pydantic import Field, PositiveInt, model_validator

from ntkbench import methods, operators, problems
from ntkbench.errors import BadInput, Unavailable
from ntkbench.measure import timing
from ntkbench.measure.schema import MethodName, MetricName, ProblemLabel, Strict
from ntkbench.studies import base

TIMED = True
PLUGINS = base.methods_and_problems()
PASSES = 64


class Certified(Strict):
    """An estimate whose certificate is measured.

    Attributes:
        problem: label of the problem.
        method: name of a method that runs on torch.
        metric: the metric that it computes.
        passes: budget of a method that takes one.
        calls: calls of each kind, instead of the study's.
    """

    problem: ProblemLabel
    method: MethodName
    metric: MetricName = "trace"
    passes: PositiveInt | None = None
    calls: PositiveInt | None = None

    @model_validator(mode="after")
    def _can_be_certified(self) -> Certified:
        method = methods.get(self.method)
        if "torch" not in method.backends:
            raise BadInput(f"{self.method} does not run on torch; only methods that do can be certified again")
        if method.takes_passes != (self.passes is not None):
            raise BadInput(f"{self.method} takes {'a' if method.takes_passes else 'no'} number of passes")
        return self


def _estimates(problem: str) -> list[Certified]:
    make = functools.partial(Certified.model_construct, problem=problem)
    return [
        make(method="one_sided_reverse", passes=PASSES),
        make(method="one_sided_forward", passes=PASSES),
        make(method="hutchpp", passes=PASSES),
        make(method="per_sample_trace", passes=PASSES),
        make(method="structured_derivatives", metric="norm"),
        make(method="direct", metric="norm", calls=3),
    ]


# Not validated while this file is imported: that would import all problems and methods.
ESTIMATES = [
    *_estimates("mlp_hazelden"),
    *_estimates("digits_conv[N=64]"),
    # The cost is highest for the smallest networks: a plain pass takes as long as many batched ones.
    Certified.model_construct(problem="gru_hazelden[N=4,T=5]", method="one_sided_reverse", passes=PASSES),
    Certified.model_construct(problem="gru_hazelden[N=4,T=5]", method="structured_derivatives", metric="norm"),
    Certified.model_construct(problem="gru_hazelden", method="one_sided_reverse", passes=PASSES),
    Certified.model_construct(problem="resnet18", method="one_sided_reverse", passes=PASSES, calls=3),
    Certified.model_construct(problem="resnet18", method="structured_derivatives", metric="norm", calls=5),
]


class Settings(base.Settings):
    """The certified estimates.

    Attributes:
        estimates: methods on problems.
        calls: calls of each kind, made in turn.
    """

    USES = (*base.OF_TARGET, "calls")

    calls: PositiveInt = 20
    estimates: list[Certified] = Field(default=ESTIMATES, min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each estimate: its seconds without and with certificates, those of a plain pass, and their ratios."""
    return base.table(
        base.row(each.model_dump(exclude={"calls"}), functools.partial(_measure, settings, each))
        for each in settings.estimates
    )


def _measure(settings: Settings, each: Certified) -> dict[str, Any]:
    from ntkbench.operators.torch import plain_gradient

    problem, method, target = problems.load(each.problem), methods.get(each.method), settings.target()
    if reason := method.unsupported_reason(problem, each.metric, target, each.passes):
        raise Unavailable(reason)
    prepared = method.prepare(problem, target)

    def estimate() -> float:
        return float(method.estimate(prepared, each.metric, each.passes))

    def certified() -> float:
        prepared.certify_again()
        return estimate()

    operator = operators.linearise(problem, "theta_0", target)
    gradient, v = plain_gradient(problem, "theta_0", target, operator.names), operator.basis(0, 1)[0]

    def plain_pass() -> float:
        return float(gradient(v).sum())

    calls = [estimate, certified, plain_pass]
    for call in calls:
        call()
    spent = method.estimate(prepared, each.metric, each.passes)
    times, certified_times, pass_times = timing.in_turn(calls, each.calls or settings.calls)
    turns = list(zip(times, certified_times, pass_times, strict=True))
    return {
        **base.sizes(problem),
        "passes_spent": spent.passes,
        "certificate": spent.certificate,
        **timing.quartiles("seconds", times),
        **timing.quartiles("certified_seconds", certified_times),
        **timing.quartiles("pass_seconds", pass_times),
        **timing.quartiles("share", [with_it / without - 1 for without, with_it, _ in turns]),
        **timing.quartiles("cost_in_passes", [(with_it - without) / one for without, with_it, one in turns]),
        "calls": len(times),
    }

"""Code shared by the studies of estimators: errors and seconds at a number of samples, and exact methods."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ntkbench import methods, problems
from ntkbench.errors import Unavailable
from ntkbench.measure.seeds import Reruns
from ntkbench.measure.timing import Timed, timed
from ntkbench.metrics import from_rows_of_theta, parameter_sets
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base import reference
from ntkbench.studies import base

METHODS = (
    "direct",
    "structured_derivatives",
    "hutchpp",
    "hutchpp_paper",
    "one_sided_paper_reverse",
    "one_sided_paper_forward",
    "shared_probe_alignment",
)
PROBLEMS = ("mlp", "gru", "classifiers")
PLUGINS = (*(f"ntkbench.methods.{name}" for name in METHODS), *(f"ntkbench.problems.{name}" for name in PROBLEMS))
ONE_BY_ONE = "direct_one_by_one"
"""The baseline as the paper's script runs it."""
POWERS = {"norm": 2}
"""Power of a metric whose error the paper reports, where it is not 1."""


class Settings(base.Settings):
    """Settings of a study of estimators.

    Attributes:
        seeds: number of seeds of an estimator. Each gives an estimate; all but the first are timed.
    """

    USES: ClassVar[tuple[str, ...]] = (*base.OF_TARGET, "seeds")

    seeds: int = Field(20, ge=2)


class WithBaselines(Settings):
    """Settings of a study of estimators and exact methods.

    Attributes:
        direct_share: share of Theta's columns on which the baselines by columns are timed, rounded up to whole blocks.
            Seconds of all columns are extrapolated from them.
    """

    USES = (*Settings.USES, "calls")

    direct_share: float = Field(1.0, gt=0, le=1)


class Subject:
    """The problem of some rows, with its exact values; loaded when the first row is measured.

    Attributes:
        label: label of the problem, or labels of which the first with available data is used.
        problem: loads the problem.
        exact: its exact values by metric.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        """Does not load anything yet."""
        self.label = " or ".join(labels)
        self.problem = base.Once(lambda: _first_available(labels))
        self.exact = base.Once(lambda: reference.exact(self.problem()))

    def columns(self) -> dict[str, Any]:
        """Label and sizes of the problem that was loaded."""
        return {"problem": self.problem().name, **base.sizes(self.problem())}


def _first_available(labels: Sequence[str]) -> Problem:
    for label in labels[:-1]:
        try:
            return problems.load(label)
        except Unavailable:
            continue
    return problems.load(labels[-1])


def stochastic(
    settings: Settings,
    subject: Subject,
    metric: str,
    name: str,
    samples: Sequence[int],
    first_seed: int = 0,
    known: Callable[[], dict[str, Any]] = dict,
    **columns: Any,
) -> Iterator[base.Row]:
    """A row for each number of samples: errors and seconds over seeds, with different seeds for each number.

    Args:
        settings: settings of the study.
        subject: the problem.
        metric: the metric.
        name: name of the stochastic method.
        samples: nominal numbers of samples.
        first_seed: seed of the first row.
        known: further columns that have to be computed.
        columns: further columns that identify the rows.
    """
    prepared = base.Once(lambda: methods.get(name).prepare(subject.problem(), settings.target()))

    def measure(m: int, first: int) -> dict[str, Any]:
        method = methods.stochastic(name)
        passes = method.cost(metric, m)
        found = Reruns(subject.exact()[metric], settings.dtype, POWERS.get(metric, 1)).run(
            lambda seed: method.estimate(prepared(), metric, passes, seed), range(first, first + settings.seeds)
        )
        spent = {"passes": passes, "first_seed": first}
        return {**subject.columns(), **known(), **spent, **found.columns(), **found.timed.columns()}

    for i, m in enumerate(samples):
        case = {**_case(subject, metric, name, base.title(name), columns), "m": m}
        yield base.row(case, functools.partial(measure, m, first_seed + i * settings.seeds))


def baseline(settings: WithBaselines, subject: Subject, metric: str, name: str, **columns: Any) -> base.Row:
    """A row for an exact method; ``share`` is the share of the work that was timed.

    Args:
        settings: settings of the study.
        subject: the problem.
        metric: the metric.
        name: name of the method, or :data:`ONE_BY_ONE`.
        columns: further columns that identify the row.
    """

    def by_columns() -> dict[str, Any]:
        found, share = _columns_of_theta(settings, subject.problem(), name == ONE_BY_ONE)
        kernels = len(parameter_sets(metric))
        notes = "twice the seconds of Theta alone: products with Theta_f take as long" if kernels == 2 else ""
        return {**subject.columns(), **_times(found, kernels / share).columns(), "share": share, "notes": notes}

    def whole() -> dict[str, Any]:
        method = methods.get(name)
        prepared = method.prepare(subject.problem(), settings.target())
        found = timed(lambda: method.estimate(prepared, metric), settings.calls)
        errors = Reruns(subject.exact()[metric], settings.dtype, POWERS.get(metric, 1)).run(lambda _: found.first, [0])
        return {**subject.columns(), **errors.columns(), **found.columns(), "share": 1.0}

    titles = {"direct": "direct", ONE_BY_ONE: "direct, a column at a time"}
    case = _case(subject, metric, name, titles.get(name) or base.title(name), columns)
    return base.row(case, by_columns if name in titles else whole)


_MEASURED: dict[tuple[str, str, Target, bool, float, int], tuple[Timed, float]] = {}


def _columns_of_theta(settings: WithBaselines, problem: Problem, one_by_one: bool) -> tuple[Timed, float]:
    """Seconds of products of Theta with basis vectors, and their share of all n.

    Measured once per problem in this process: the metrics other than the alignment come from the same products.
    """
    key = (problem.name, problem.digest(), settings.target(), one_by_one, settings.direct_share, settings.calls)
    if key not in _MEASURED:
        (j,) = methods.get("direct").prepare(problem, settings.target()).jacobians("norm")
        blocks = [1] * j.n if one_by_one else j.blocks(j.n)
        stops = [*itertools.accumulate(blocks[: math.ceil(settings.direct_share * len(blocks))])]
        spans = list(itertools.pairwise([0, *stops]))

        def moments() -> float:
            return from_rows_of_theta((range(*span), [j.ntk(j.basis(*span))]) for span in spans).square

        _MEASURED[key] = timed(moments, settings.calls), stops[-1] / j.n
    return _MEASURED[key]


def _times(found: Timed, factor: float) -> Timed:
    return Timed(factor * found.first_seconds, [factor * seconds for seconds in found.seconds], found.first)


def _case(subject: Subject, metric: str, name: str, title: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {"problem": subject.label, "metric": metric, "method": name, "title": title, **columns}

"""Methods that trace or compile a network, run on a few of its samples to predict their cost on all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ntkbench import errors, ladder, methods
from ntkbench.errors import NtkbenchError
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Method, Stochastic
from ntkbench.options import Target
from ntkbench.problem import Problem

SIZES = (2, 8, 32, 128)
"""Numbers of samples that are tried, up to all of them."""

LONG = 0.1
"""Seconds of an estimate above which no larger number of samples is tried, once two are measured."""

PATIENCE = 2.0
"""Seconds spent on a method after which no larger number of samples is tried."""


@dataclass(frozen=True)
class Rehearsal:
    """A method's run on some of the samples.

    Attributes:
        samples: largest number of samples on which it ran.
        seconds: seconds of an estimate on all samples, extrapolated.
        estimate: the estimate on that number of samples.
        bytes: peak bytes of a traced program, in proportion to the samples; 0 if nothing is traced.
        exact: the exact value on the same samples; ``None`` if it is not available.
    """

    samples: int
    seconds: float
    estimate: Estimate
    bytes: int
    exact: float | None


class Rehearsals:
    """Methods on the first samples of a problem.

    Args:
        problem: the problem with all samples.
        metric: the estimated metric.
        target: where methods run.
    """

    def __init__(self, problem: Problem, metric: str, target: Target) -> None:
        self._problem, self._metric, self._target = problem, metric, target
        self._problems: dict[int, Problem] = {}
        self._prepared: dict[tuple[str, int], Any] = {}
        self._exact: dict[int, float | None] = {}

    def run(self, method: Method, passes: int | None, slow: float) -> Rehearsal:
        """Run a method on increasing numbers of samples until its time can be extrapolated.

        Args:
            method: a method that applies to the problem.
            passes: budget of a stochastic method.
            slow: approximate seconds of an estimate's products on all samples; sizes that would take too long are left
                out.

        Raises:
            NtkbenchError: the method runs on no number of samples; the message gives the reason for the last one.
        """
        points: list[tuple[int, float]] = []
        begun, reason, N = time.perf_counter(), "would take too long on two samples", self._problem.N
        last: tuple[int, Any, Estimate] | None = None
        for m in self._sizes():
            if slow * m / N > PATIENCE or (len(points) > 1 and time.perf_counter() - begun > PATIENCE):
                break
            try:
                prepared = self._ready(method, m, passes)
                method.estimate(prepared, self._metric, passes)  # certified, traced, compiled
                start = time.perf_counter()
                estimate = method.estimate(prepared, self._metric, passes)
                points.append((m, time.perf_counter() - start))
            except Exception as error:  # a few samples may be too few; all of them may not
                reason = errors.reason(error)
                continue
            last = m, prepared, estimate
            if points[-1][1] > LONG and len(points) > 1:
                break
        if last is None:
            raise NtkbenchError(reason)
        m, prepared, estimate = last
        exact = self._exact_value(m) if method.kind == "approximate" else None
        return Rehearsal(m, extrapolated(points, N), estimate, int(_peak(prepared, m) * N / m), exact)

    def _sizes(self) -> Iterator[int]:
        N = self._problem.N
        return iter(sorted({min(m, N) for m in SIZES}))

    def _some(self, m: int) -> Problem:
        if m not in self._problems:
            self._problems[m] = first_samples(self._problem, m)
        return self._problems[m]

    def _ready(self, method: Method, m: int, passes: int | None) -> Any:
        """A method prepared for the first m samples.

        Raises:
            NtkbenchError: it does not apply to them.
        """
        some = self._some(m)
        if reason := method.unsupported_reason(some, self._metric, self._target, passes):
            raise NtkbenchError(reason)
        key = (method.prepares or method.name, m)
        if key not in self._prepared:
            self._prepared[key] = method.prepare(some, self._target)
        return self._prepared[key]

    def _exact_value(self, m: int) -> float | None:
        """The exact metric of the first m samples, by the first method that gives it."""
        if m not in self._exact:
            self._exact[m] = None
            for name in ladder.exact_methods(self._some(m), self._metric, self._target):
                try:
                    method = methods.get(name)
                    self._exact[m] = method.estimate(self._ready(method, m, None), self._metric).value
                    break
                except Exception:  # the next one may work
                    continue
        return self._exact[m]


def first_samples(problem: Problem, m: int) -> Problem:
    """The same networks and weights on the first m samples."""
    return replace(
        problem,
        x=problem.x[:m],
        other=None if problem.other is None else first_samples(problem.other, m),
        _shape=[(m, *problem.output_shape[1:])],
    )


def extrapolated(points: list[tuple[int, float]], at: int) -> float:
    """Extrapolate points (m, seconds) by a + b m + c m^2 with a, b, c >= 0, a least-squares fit of relative errors."""
    sizes, times = np.array(points, dtype=float).T
    if sizes[-1] == at:
        return float(times[-1])
    powers = np.stack([np.ones_like(sizes), sizes, sizes**2], axis=1)
    found, _ = nnls(powers / times[:, None], np.ones_like(times))
    return float(max(found @ [1.0, at, at**2], times[-1]))


def needs_network(method: Method) -> bool:
    """Whether a method must run on the network itself.

    These are methods with their own preparation, methods that need more than products of a recurrence, and methods
    with a bias, which depends on the network.
    """
    return method.prepares != "operators" or method.needs_recurrence or method.kind == "approximate"


def _peak(prepared: Any, m: int) -> int:
    """Peak bytes of the largest program of a traced network on m samples."""
    programs = prepared.engine.trace.programs if hasattr(prepared, "engine") else {}
    return max((program.peak for (shape, *_), program in programs.items() if shape[0] == m), default=0)


def budget(method: Method, problem: Problem, metric: str) -> int | None:
    """First budget of a method; ``None`` if it takes none."""
    if not isinstance(method, Stochastic):
        return None
    return max(method.least_passes(problem, metric), ladder.default_passes(problem, metric, method))

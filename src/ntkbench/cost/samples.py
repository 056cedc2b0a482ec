"""Methods that trace or compile a network, on a few of its samples: what they take there says what they take on all."""

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
"""Samples, all of them at the most."""

LONG = 0.1
"""Seconds of an estimate from which on no more samples are taken, once there are two sizes."""

PATIENCE = 2.0
"""Seconds with a method after which no more samples are taken."""


@dataclass(frozen=True)
class Rehearsal:
    """A method on some of the samples.

    Attributes:
        samples: the most that were taken.
        seconds: of an estimate on all samples, extrapolated.
        estimate: on the most samples that were taken.
        bytes: that a traced program holds at its peak, in proportion to the samples; 0 where nothing is traced.
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
        problem: of all samples.
        metric: what is estimated.
        target: where.
    """

    def __init__(self, problem: Problem, metric: str, target: Target) -> None:
        self._problem, self._metric, self._target = problem, metric, target
        self._problems: dict[int, Problem] = {}
        self._prepared: dict[tuple[str, int], Any] = {}
        self._exact: dict[int, float | None] = {}

    def run(self, method: Method, passes: int | None, slow: float) -> Rehearsal:
        """A method on more and more samples, until it takes long enough to tell.

        Args:
            method: one that serves the problem.
            passes: budget of a stochastic one.
            slow: about how many seconds the products of an estimate take on all samples; sizes that would take too
                long are left out.

        Raises:
            NtkbenchError: the method serves no number of samples; says why not the last one.
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
            NtkbenchError: it does not serve them.
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
    """a + b m + c m^2 >= 0 through points (m, seconds), by least squares of relative errors, at another m."""
    sizes, times = np.array(points, dtype=float).T
    if sizes[-1] == at:
        return float(times[-1])
    powers = np.stack([np.ones_like(sizes), sizes, sizes**2], axis=1)
    found, _ = nnls(powers / times[:, None], np.ones_like(times))
    return float(max(found @ [1.0, at, at**2], times[-1]))


def needs_network(method: Method) -> bool:
    """Whether a method has to be run on the network itself.

    Those that prepare something of their own, those that need more of a recurrence than products, and those with a
    bias, which depends on the network.
    """
    return method.prepares != "operators" or method.needs_recurrence or method.kind == "approximate"


def _peak(prepared: Any, m: int) -> int:
    """Bytes that the largest program of a traced network on m samples holds."""
    programs = prepared.engine.trace.programs if hasattr(prepared, "engine") else {}
    return max((program.peak for (shape, *_), program in programs.items() if shape[0] == m), default=0)


def budget(method: Method, problem: Problem, metric: str) -> int | None:
    """Passes that a method is first tried with; ``None`` for what takes none."""
    if not isinstance(method, Stochastic):
        return None
    return max(method.least_passes(problem, metric), ladder.default_passes(problem, metric, method))

"""Solutions of (Theta + ridge I) x = y to a residual, by a factor of all of Theta or conjugate gradients on products.

The ridge is a share of the largest eigenvalue of Theta, so that the condition number of Theta + ridge I is at most 1 +
1 / share, and known from the float64 eigenvalues. Right-hand sides are normal vectors, each with its own seed.
``cholesky`` and ``nystrom`` are the methods of :func:`ntkbench.solve` if Theta fits in memory and if it does not;
``plain`` is ``nystrom`` without its preconditioner; both aim at half the tolerance. ``scipy`` is SciPy's ``cg`` on the
same products, which stops as soon as its own recursion is within the tolerance. The residual of every solution is
computed from products in float64, whatever the precision of the solution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench import operators, problems
from ntkbench.estimators import solve
from ntkbench.measure import timing
from ntkbench.measure.schema import ProblemLabel
from ntkbench.operators import JacobianOperator
from ntkbench.problem import Problem
from ntkbench.studies import base
from ntkbench.studies.base import thetas

TIMED = True
PLUGINS = (f"ntkbench.methods.{thetas.METHOD}", "ntkbench.operators.torch")

TITLES = {
    "cholesky": "Cholesky of all of Theta",
    "nystrom": "CG, Nystrom preconditioner",
    "plain": "CG without preconditioner",
    "scipy": "SciPy's cg, by its own residual",
}
Share = Annotated[float, Field(gt=0, lt=1)]


class Settings(base.Settings):
    """Problems, ridges and tolerances.

    Attributes:
        seeds: right-hand sides, each solved once; all but the first are timed.
        problems: labels of problems, at initial weights, with n small enough to decompose Theta in float64.
        ridges: ridges as shares of the largest eigenvalue.
        rtols: relative residuals to reach.
        passes: maximum number of passes of a solution.
    """

    USES = (*base.OF_TARGET, "seeds")

    seeds: int = Field(5, ge=2)
    problems: list[ProblemLabel] = Field(
        default=["digits_mlp[N=16]", "digits_mlp[N=64]", "digits_mlp[N=200]"], min_length=1
    )
    ridges: list[Share] = Field(default=[1e-1, 1e-2, 1e-3, 1e-4], min_length=1)
    rtols: list[Share] = Field(default=[1e-2, 1e-4, 1e-6], min_length=1)
    passes: PositiveInt = 4096


@dataclass(frozen=True)
class Truth:
    """A problem, the exact eigenvalues of its Theta, and the Jacobian that checks solutions.

    Attributes:
        problem: the problem, at initial weights.
        values: all eigenvalues in float64, ascending.
        precise: J in float64.
    """

    problem: Problem
    values: np.ndarray
    precise: JacobianOperator

    def condition(self, ridge: float) -> float:
        """The condition number of Theta + ridge I."""
        return float((self.values[-1] + ridge) / (self.values[0] + ridge))

    def residual(self, x: np.ndarray, y: np.ndarray, ridge: float) -> float:
        """||(Theta + ridge I) x - y|| / ||y|| from products in float64."""
        rest = solve.operator(self.precise, ridge) @ x - y
        return float(np.linalg.norm(rest) / np.linalg.norm(y))


class Found(NamedTuple):
    """A solution, and its cost.

    Attributes:
        values: x ``[n]``.
        iterations: number of iterations of conjugate gradients, or of refinements.
        passes: passes spent.
    """

    values: np.ndarray
    iterations: int
    passes: float


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem, method, ridge and tolerance: seconds, iterations, passes and the residual."""
    return base.table(row for label in settings.problems for row in _of_problem(settings, label))


def truth(settings: Settings, label: str) -> Truth:
    """The exact eigenvalues of a problem, and J in float64."""
    problem, target = problems.load(label), settings.target(dtype="float64")
    values = np.maximum(np.linalg.eigvalsh(thetas.Theta(problem, target)()), 0.0)
    return Truth(problem, values, operators.linearise(problem, "theta_0", target))


def _of_problem(settings: Settings, label: str) -> Iterator[base.Row]:
    exact = base.Once(lambda: truth(settings, label))
    j = base.Once(lambda: operators.linearise(exact().problem, "theta_0", settings.target()))
    whole = base.Once(lambda: thetas.Theta(exact().problem, settings.target()))
    for method, title in TITLES.items():
        kind = "exact" if method == "cholesky" else "iterative"
        for share in settings.ridges:
            for rtol in settings.rtols:
                case = {"problem": label, "method": method, "title": title, "kind": kind, "share": share, "rtol": rtol}
                yield base.row(case, functools.partial(_measure, settings, exact, j, whole, method, share, rtol))


def _measure(
    settings: Settings,
    exact: base.Once[Truth],
    j: base.Once[JacobianOperator],
    whole: base.Once[thetas.Theta],
    method: str,
    share: float,
    rtol: float,
) -> dict[str, Any]:
    known = exact()
    ridge = share * float(known.values[-1])
    drawn = (np.random.default_rng(seed).standard_normal(known.problem.n) for seed in range(settings.seeds))
    sides = [y / np.linalg.norm(y) for y in drawn]
    seeds, found = iter(range(settings.seeds)), []
    way = _way(settings, known, j, whole, method, ridge, rtol)

    def one() -> None:
        seed = next(seeds)
        found.append(way(sides[seed], seed))

    call = timing.timed(one, settings.seeds - 1)
    residuals = [known.residual(x.values, y, ridge) for x, y in zip(found, sides, strict=True)]
    return {
        **base.sizes(known.problem),
        "ridge": ridge,
        "condition": known.condition(ridge),
        **call.columns(),
        "iterations": float(np.median([x.iterations for x in found])),
        "passes_spent": float(np.median([x.passes for x in found])),
        "residual": max(residuals),
        "seeds": settings.seeds,
    }


def _way(
    settings: Settings,
    known: Truth,
    j: base.Once[JacobianOperator],
    whole: base.Once[thetas.Theta],
    method: str,
    ridge: float,
    rtol: float,
) -> Callable[[np.ndarray, int], Found]:
    """A function from a right-hand side and a seed to a solution."""

    def cholesky(y: np.ndarray, seed: int) -> Found:
        passes = float(known.problem.O)
        return _found(solve.of_matrix(whole()(), whole().eps, known.precise, y, ridge, rtol=rtol, passes=passes))

    def gradients(y: np.ndarray, seed: int) -> Found:
        rank = solve.RANK if method == "nystrom" else 0
        found = solve.of_operator(j(), y, ridge, rtol=rtol, passes=settings.passes, seed=seed, rank=rank)
        return _found(found)

    def scipy(y: np.ndarray, seed: int) -> Found:
        return conjugate_gradients(j(), y, ridge, rtol, settings.passes)

    return {"cholesky": cholesky, "scipy": scipy}.get(method, gradients)


def _found(solution: solve.Solution) -> Found:
    return Found(solution.values, solution.iterations, solution.passes)


def conjugate_gradients(j: JacobianOperator, y: np.ndarray, ridge: float, rtol: float, passes: int) -> Found:
    """SciPy's unmodified cg; its residual is checked elsewhere."""
    from scipy.sparse.linalg import cg

    iterations, before = 0, j.passes

    def count(_: np.ndarray) -> None:
        nonlocal iterations
        iterations += 1

    x, _ = cg(
        solve.operator(j, ridge), y, rtol=rtol, atol=0.0, maxiter=max(1, math.floor(passes / 2) - 1), callback=count
    )
    return Found(x, iterations, j.passes - before)

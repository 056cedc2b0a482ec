"""Spectral quantities from products with Theta, against passes, and from the decomposition of all of Theta.

Quantities are the largest eigenvalue, the ``top`` largest eigenvalues (with the largest error among them), the
condition number of Theta + ridge, the entropy effective rank, log det(I + Theta / ridge) and the spectral density.
Errors are relative to float64 values. The error of the density is the Wasserstein-1 distance between distributions of
log10(lambda + ridge): the mean error of eigenvalues in decades. The ridge is a share of the exact largest eigenvalue.

``spectrum`` is the method of :func:`ntkbench.spectrum` if Theta does not fit in memory; ``block_lanczos`` and
``stochastic_lanczos`` are its two parts alone, each with all passes. ARPACK and LOBPCG (SciPy) take the same products;
matfree's Lanczos takes those of JAX.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench import ambient, errors, operators, problems
from ntkbench.errors import BadInput, Unavailable
from ntkbench.estimators import lanczos, spectrum
from ntkbench.measure import timing
from ntkbench.measure.schema import ProblemLabel
from ntkbench.operators import JacobianOperator
from ntkbench.problem import Problem
from ntkbench.studies import base
from ntkbench.studies.base import products, thetas

TIMED = True
PLUGINS = (f"ntkbench.methods.{thetas.METHOD}", "ntkbench.operators.torch")

TOP_OF = ("largest", "top")
SPREAD = ("entropy_effective_rank", "log_determinant", "density")
QUANTITIES = (*TOP_OF, "condition", *SPREAD)
GIVES = {
    "eigh": QUANTITIES,
    "spectrum": QUANTITIES,
    "block_lanczos": (*TOP_OF, "condition"),
    "stochastic_lanczos": ("largest", "condition", *SPREAD),
    "arpack": TOP_OF,
    "lobpcg": TOP_OF,
    "matfree": SPREAD,
}
"""The quantities that each method gives."""
TITLES = {
    "eigh": "all of Theta (eigh)",
    "spectrum": "ntkbench.spectrum",
    "block_lanczos": "block Lanczos alone",
    "stochastic_lanczos": "stochastic Lanczos alone",
    "arpack": "ARPACK (SciPy)",
    "lobpcg": "LOBPCG (SciPy)",
    "matfree": "stochastic Lanczos (matfree)",
}
PROBES = spectrum.PROBES
"""Probes of stochastic Lanczos, ours and matfree's."""
ROUNDING = 1e-9
"""Rounding error of shares of eigenvalues, which are sums of weights."""


class Settings(base.Settings):
    """Problems, budgets and the requested quantities.

    Attributes:
        seeds: number of seeds of each method at each budget; all but the first are timed.
        problems: labels of problems, at initial weights, with n small enough to decompose Theta in float64.
        passes: budgets of the methods that take one.
        tolerances: tolerances of ARPACK, which takes no budget.
        top: number of largest eigenvalues.
        ridge: ridge as a share of the largest eigenvalue.
        rtol: tolerance at which block Lanczos and LOBPCG stop.
    """

    USES = (*base.OF_TARGET, "seeds", "calls")

    seeds: int = Field(10, ge=2)
    problems: list[ProblemLabel] = Field(
        default=["digits_mlp[N=64]", "transformer_tiny[N=8]", "digits_conv[N=64]"], min_length=1
    )
    passes: list[Annotated[int, Field(ge=4 * PROBES)]] = Field(default=[64, 128, 256, 512, 1024], min_length=1)
    tolerances: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[1e-1, 1e-2, 1e-4], min_length=1)
    top: PositiveInt = 10
    ridge: float = Field(1e-4, gt=0)
    rtol: float = Field(1e-5, gt=0, lt=1)


class Answer(NamedTuple):
    """A quantity from one call.

    Attributes:
        error: relative to the exact value; decades for the density.
        holds: whether all statements about it are true; ``None`` if there are none.
        stated: half the width of its interval, relative to the value.
    """

    error: float
    holds: float | None = None
    stated: float | None = None


@dataclass(frozen=True)
class Truth:
    """A problem and the exact eigenvalues of its Theta.

    Attributes:
        problem: the problem, at initial weights.
        values: all eigenvalues in float64, ascending.
        ridge: constant added to them.
        top: number of requested largest eigenvalues.
    """

    problem: Problem
    values: np.ndarray
    ridge: float
    top: int

    def exact(self, quantity: str) -> float:
        """The exact value of a quantity that is one number."""
        values, n = self.values, len(self.values)
        if quantity == "largest":
            return float(values[-1])
        if quantity == "condition":
            return float((values[-1] + self.ridge) / (values[0] + self.ridge))
        weights = np.full((1, n), 1 / n)
        whole = lanczos.Density(values[None], weights, values[None], weights, np.array([True]), n, 0, 0.0, 0.0, True)
        return whole.entropy_effective_rank if quantity == "entropy_effective_rank" else self.volume(whole)[0]

    def volume(self, density: lanczos.Density) -> tuple[float, ...]:
        """log det(I + Theta / ridge) from a density, and the ends of its interval."""
        return tuple(end - len(self.values) * math.log(self.ridge) for end in density.log_determinant(self.ridge))

    def number(self, quantity: str, value: float, low: float = math.nan, high: float = math.nan) -> Answer:
        """A quantity that is one number, with its interval if it has one."""
        exact = self.exact(quantity)
        error = abs(value / exact - 1)
        if math.isnan(low) or math.isnan(high):
            return Answer(error)
        stated = (high - low) / 2 / abs(value)
        return Answer(error, float(low <= exact <= high), stated if math.isfinite(stated) else None)

    def largest_ones(self, values: np.ndarray, off: np.ndarray | None = None) -> dict[str, Answer]:
        """The largest eigenvalue and the ``top`` largest; each states that an eigenvalue lies within ``off``."""
        exact = self.values[::-1][: self.top]
        wrong = abs(values / exact - 1)
        if off is None:
            return {"largest": Answer(float(wrong[0])), "top": Answer(float(wrong.max()))}
        near = abs(values[:, None] - self.values).min(1) <= off
        stated = off / values
        return {
            "largest": Answer(float(wrong[0]), float(near[0]), float(stated[0])),
            "top": Answer(float(wrong.max()), float(near.all()), float(stated.max())),
        }

    def condition(self, top: float, off: float, smallest: float, between: tuple[float, float]) -> Answer:
        """The condition number of Theta + ridge, with the bounds that follow from those of both eigenvalues.

        There is no upper end if the smallest eigenvalue has no lower bound. That is so for all matrix-free methods,
        where an eigenvalue may also be larger than ``top + off``.
        """
        low = (max(top - off, 0.0) + self.ridge) / (between[1] + self.ridge)
        high = (top + off + self.ridge) / (between[0] + self.ridge) if between[0] > 0 else math.inf
        return self.number("condition", (top + self.ridge) / (smallest + self.ridge), low, high)

    def spread(self, density: lanczos.Density, stated: bool = True) -> dict[str, Answer]:
        """The quantities of a density; its statements are the intervals of log-determinant and bin shares."""
        from scipy.stats import wasserstein_distance

        rank = density.entropy_effective_rank
        given = {"entropy_effective_rank": self.number("entropy_effective_rank", rank)}
        given["log_determinant"] = self.number("log_determinant", *self.volume(density)[: 3 if stated else 1])
        decades = [np.log10(np.maximum(v, 0.0) + self.ridge).ravel() for v in (self.values, density.nodes)]
        off = float(wasserstein_distance(*decades, v_weights=density.weights.ravel()))
        # Bins of a decade from the ridge on, and one for the eigenvalues below it.
        count = math.ceil(math.log10(float(self.values[-1]) / self.ridge)) + 1
        edges = np.array([0.0, *(self.ridge * 10.0 ** np.arange(count + 1))])
        if not stated:
            return given | {"density": Answer(off)}
        _, low, high = density.shares(edges)
        shares = np.histogram(np.maximum(self.values, 0.0), edges)[0] / len(self.values)
        within = (low <= shares + ROUNDING) & (shares <= high + ROUNDING)
        return given | {"density": Answer(off, float(within.all()), float(np.median(high - low) / 2))}


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem, method, budget and quantity: error, statements, passes and seconds."""
    return base.table(row for label in settings.problems for row in _of_problem(settings, label))


def truth(settings: Settings, label: str) -> Truth:
    """The exact eigenvalues of a problem.

    Raises:
        BadInput: it has no more outputs than requested eigenvalues.
    """
    problem = problems.load(label)
    if problem.n <= settings.top:
        raise BadInput(f"{label} has n = {problem.n} outputs: top must be less, got {settings.top}")
    values = np.linalg.eigvalsh(thetas.Theta(problem, settings.target(dtype="float64"))())
    values = np.maximum(values, 0.0)
    return Truth(problem, values, settings.ridge * float(values[-1]), settings.top)


Measured = Callable[[int], tuple[Any, float]]
"""A function from a seed to the result of a method, and the passes that it spent."""


def _of_problem(settings: Settings, label: str) -> Iterator[base.Row]:
    exact = base.Once(lambda: truth(settings, label))
    j = base.Once(lambda: operators.linearise(exact().problem, "theta_0", settings.target()))
    whole = base.Once(lambda: thetas.Theta(exact().problem, settings.target()))
    for method, gives in GIVES.items():
        asked: list[tuple[str, float | None]] = [("passes", passes) for passes in settings.passes]
        if method == "arpack":
            asked = [("tolerance", tolerance) for tolerance in settings.tolerances]
        for key, value in [("passes", None)] if method == "eigh" else asked:
            case: dict[str, Any] = {"problem": label, "method": method, "title": TITLES[method]}
            case |= {
                "kind": "exact" if method == "eigh" else "stochastic",
                "passes": None,
                "tolerance": None,
                key: value,
            }
            measure = functools.partial(_measure, settings, exact, j, whole, method, value)
            yield from base.rows(case, measure, [{"quantity": quantity} for quantity in gives])


def _measure(
    settings: Settings,
    exact: base.Once[Truth],
    j: base.Once[JacobianOperator],
    whole: base.Once[thetas.Theta],
    method: str,
    asked: Any,
) -> list[dict[str, Any]]:
    known, calls = exact(), settings.calls if method == "eigh" else settings.seeds - 1
    run = _way(settings, known, j, whole, method, asked)
    seeds, found = iter(range(calls + 1)), []
    call = timing.timed(lambda: found.append(run(next(seeds))), calls)
    passes = timing.quartiles("passes_spent", [spent for _, spent in found])
    answers = [_answers(known, method, given) for given, _ in (found[:1] if method == "eigh" else found)]
    shared = {**base.sizes(known.problem), **call.columns(), "passes_spent": passes["passes_spent"]}
    shared |= {"seeds": len(answers), "ridge": known.ridge}
    return [{"quantity": name, **shared, **_columns([a[name] for a in answers])} for name in GIVES[method]]


def _columns(answers: list[Answer]) -> dict[str, Any]:
    """Columns of a quantity over seeds."""
    holds = [answer.holds for answer in answers if answer.holds is not None]
    stated = [answer.stated for answer in answers if answer.stated is not None]
    return {
        **timing.quartiles("error", [answer.error for answer in answers]),
        "holds": float(np.mean(holds)) if holds else None,
        "stated": float(np.median(stated)) if stated else None,
    }


def _way(
    settings: Settings,
    known: Truth,
    j: base.Once[JacobianOperator],
    whole: base.Once[thetas.Theta],
    method: str,
    asked: Any,
) -> Measured:
    """A method with a budget of passes or a tolerance."""
    steps = min(int(asked or 0) // (2 * PROBES), known.problem.n)
    if method == "matfree":
        tridiagonal = Matfree(known.problem, settings.dtype, steps)
        return lambda seed: (tridiagonal(seed), 2.0 * PROBES * steps)
    ways: dict[str, Callable[[JacobianOperator, int], Any]] = {
        "eigh": lambda j, seed: spectrum.of_matrix(whole()(), j, settings.top, float(known.problem.O)),
        "spectrum": lambda j, seed: spectrum.of_operator(j, settings.top, rtol=settings.rtol, passes=asked, seed=seed),
        "block_lanczos": lambda j, seed: lanczos.ritz_pairs(
            j, settings.top, rtol=settings.rtol, passes=asked, seed=seed
        ),
        "stochastic_lanczos": lambda j, seed: lanczos.density(j, probes=PROBES, steps=steps, seed=seed),
        "arpack": lambda j, seed: arpack(j, settings.top, asked, seed),
        "lobpcg": lambda j, seed: lobpcg(j, settings.top, asked, settings.rtol, seed),
    }

    def run(seed: int) -> tuple[Any, float]:
        before = j().passes
        given = ways[method](j(), seed)
        return given, given.passes if method == "eigh" else j().passes - before

    return run


def _answers(known: Truth, method: str, given: Any) -> dict[str, Answer]:
    """All quantities of the result of a method."""
    if isinstance(given, np.ndarray):
        return known.largest_ones(given)
    if isinstance(given, lanczos.Ritz):
        errors = given.errors + given.rounding
        top, off, smallest = float(given.values[0]), float(errors[0]), max(given.smallest, 0.0)
        return {
            **known.largest_ones(given.values, errors),
            "condition": known.condition(top, off, smallest, (0.0, smallest)),
        }
    if isinstance(given, lanczos.Density):
        smallest = max(given.smallest, 0.0)
        condition = known.condition(given.largest, 0.0, smallest, (0.0, smallest))
        return {
            "largest": known.number("largest", given.largest),
            "condition": Answer(condition.error),
            **known.spread(given, stated=method != "matfree"),
        }
    rank, off = given.entropy_effective_rank, float(given.errors[0])
    return {
        **known.largest_ones(given.values, given.errors),
        "condition": known.condition(given.largest, off, given.smallest, given.smallest_bounds),
        **known.spread(given.density),
        "entropy_effective_rank": known.number("entropy_effective_rank", rank.value, *rank.interval()),
    }


# --- rivals


def arpack(j: JacobianOperator, top: int, tolerance: float, seed: int) -> np.ndarray:
    """The largest eigenvalues, descending, by ARPACK's implicitly restarted Lanczos iteration."""
    from scipy.sparse.linalg import eigsh

    operator = products.linear(j)
    start = np.random.default_rng(seed).standard_normal(j.n).astype(operator.dtype)
    found: np.ndarray = eigsh(operator, top, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)
    return np.sort(found.astype(np.float64))[::-1]


def lobpcg(j: JacobianOperator, top: int, passes: int, rtol: float, seed: int) -> np.ndarray:
    """The largest eigenvalues, descending, by locally optimal block conjugate gradients, within a budget of passes.

    Raises:
        Unavailable: the budget is below that of two iterations.
    """
    from scipy.sparse import linalg

    rounds = passes // (2 * top) - 2  # the first and the last product are not iterations
    if rounds < 1:
        raise Unavailable(f"takes at least {6 * top} passes for {top} eigenvalues")
    operator = products.linear(j)
    start = np.random.default_rng(seed).standard_normal((j.n, top)).astype(operator.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tolerance may not be reached
        values, _ = linalg.lobpcg(operator, start, tol=rtol, maxiter=rounds, largest=True)
    return np.sort(np.asarray(values, np.float64))[::-1]


class Matfree:
    """Stochastic Lanczos quadrature by matfree's tridiagonalisation, with products of the network in JAX."""

    def __init__(self, problem: Problem, dtype: str, steps: int) -> None:
        """Does not compile anything yet.

        Raises:
            Unavailable: matfree or JAX is not installed, or the problem has no network in JAX.
        """
        errors.need("jax", "matfree's Lanczos", errors.JAX)
        errors.need("matfree", "matfree's Lanczos", "matfree")
        if problem.jax_forward is None:
            raise Unavailable("the problem has no network in JAX")
        self._problem, self._dtype, self._steps = problem, dtype, steps
        self._run: Any = None

    def __call__(self, seed: int) -> lanczos.Density:
        """Nodes and weights, as a density without statements about its errors; 2 passes for each probe and step.

        Raises:
            BadInput: they are not finite.
        """
        with ambient.own_jax_settings(self._dtype):
            self._run = self._run or self._compiled()
            probes = np.random.default_rng(seed).standard_normal((PROBES, self._problem.n)).astype(self._dtype)
            probes /= np.linalg.norm(probes, axis=1, keepdims=True)
            nodes, weights = (np.asarray(found, np.float64) for found in self._run(probes))
        if not (np.isfinite(nodes).all() and np.isfinite(weights).all()):
            raise BadInput("matfree's nodes or weights are not finite")
        nodes, weights, passes = np.maximum(nodes, 0.0), weights / PROBES, 2.0 * PROBES * self._steps
        known = np.zeros(PROBES, bool)
        return lanczos.Density(nodes, weights, nodes, weights, known, self._problem.n, passes, 0.0, 0.0)

    def _compiled(self) -> Any:
        import jax
        import jax.numpy as jnp
        from matfree import decomp, eig

        problem = self._problem
        assert problem.jax_forward is not None
        forward = problem.jax_forward

        def own(array: np.ndarray) -> Any:
            return jnp.asarray(array, self._dtype if np.issubdtype(array.dtype, np.floating) else None)

        theta = {name: own(w) for name, w in problem.theta_0.items()}
        fixed, x = {name: own(w) for name, w in problem.fixed_0.items()}, own(problem.x)

        def outputs(theta: Any) -> Any:
            return forward({**fixed, **theta}, x).reshape(-1)

        decompose = eig.eigh_partial(decomp.tridiag_sym(self._steps))

        def quadratures(probes: Any) -> tuple[Any, Any]:
            push, pull = jax.linearize(outputs, theta)[1], jax.vjp(outputs, theta)[1]

            def quadrature(v: Any) -> tuple[Any, Any]:
                values, vectors = decompose(lambda u: push(*pull(u)), v)
                return values, (vectors @ v) ** 2

            return jax.vmap(quadrature)(probes)

        return jax.jit(quadratures)

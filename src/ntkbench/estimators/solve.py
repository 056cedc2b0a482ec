"""(Theta + ridge I)^-1 y: by a Cholesky factor of all of Theta, or by conjugate gradients on products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from ntkbench.errors import BadInput
from ntkbench.estimators import lanczos
from ntkbench.operators import JacobianOperator
from ntkbench.operators.arrays import asarray_like, epsilon, to_numpy
from ntkbench.units import counted

RANK = 32
"""Maximum rank of the preconditioner; each rank takes two passes."""

SHARE = 4
"""The preconditioner takes at most 1 / ``SHARE`` of the passes, and of the memory."""

REFINEMENTS = 8
"""Maximum number of refinements of a solution. Each solves for the residual, which takes two passes."""

SAFETY = 10
"""Assumed rounding of Theta, as a multiple of machine epsilon."""

SINGLE = 1e-10
"""Machine epsilon above which float64 would be more precise."""

Map = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """x = (Theta + ridge I)^-1 y.

    >>> import torch, ntkbench
    >>> found = ntkbench.solve(torch.nn.Linear(3, 1), torch.eye(3), torch.tensor([3.0, 0.0, 0.0]), ridge=1.0)
    >>> found.method, found.residual < 1e-5
    ('cholesky', True)

    Attributes:
        values: x, in the shape of y.
        residual: ||(Theta + ridge I) x - y|| / ||y||, always from products with J and J^T.
        error: upper bound on ||x - exact||, as Theta is positive semidefinite: (residual * ||y|| + rounding) / ridge
            with the expected rounding of those products; infinite if the ridge is 0.
        ridge: constant added to the eigenvalues of Theta.
        iterations: number of iterations of conjugate gradients, or of refinements of the Cholesky solution.
        passes: passes spent.
        method: ``"cholesky"`` or ``"conjugate_gradients"``.
        notes: remarks, for example that other solutions may exist with a ridge of 0.
        certificate: the largest relative difference between a gradient that was used and the same by plain autograd.
    """

    values: np.ndarray
    residual: float
    error: float
    ridge: float
    iterations: int
    passes: float
    method: str
    notes: tuple[str, ...] = ()
    certificate: float | None = None

    def __repr__(self) -> str:
        certified = "" if self.certificate is None else f", certified to {self.certificate:.1e}"
        shape = " x ".join(map(str, self.values.shape))
        said = (
            f"(Theta + {self.ridge:g} I)^-1 y, {shape}: residual {self.residual:.1e} ({self.method}, "
            f"{counted(self.iterations, 'iteration')}, {counted(self.passes, 'pass', 'passes')}){certified}"
        )
        return "\n".join([said, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False, repr=False)
class Regression:
    """Kernel regression Theta(x', x) (Theta + ridge I)^-1 y at other inputs x'.

    >>> import torch, ntkbench
    >>> kernel = ntkbench.Kernel(torch.nn.Linear(3, 1), torch.eye(3))
    >>> kernel.regress(torch.zeros(1, 3), torch.tensor([3.0, 0.0, 0.0]), ridge=1.0).values.round(4).tolist()
    [[0.6]]

    Attributes:
        values: predictions ``[N', ...outputs]``.
        solution: the coefficients (Theta + ridge I)^-1 y and their residual.
        passes: passes spent, including those of the solution.
        certificate: the certificate of the products with both Jacobians in the prediction.
    """

    values: np.ndarray
    solution: Solution
    passes: float
    certificate: float | None = None

    def __repr__(self) -> str:
        return f"predictions, {' x '.join(map(str, self.values.shape))}, by {self.solution!r}"


def of_matrix(
    theta: np.ndarray,
    eps: float,
    j: JacobianOperator,
    y: np.ndarray,
    ridge: float,
    *,
    rtol: float,
    passes: float,
) -> Solution:
    """Solve by a Cholesky factor of Theta + ridge I in float64 on the host, refined with products.

    Products may be more precise than Theta, and the solution then has their precision. A refinement gains more digits
    if ``eps`` times the condition number is small.

    Costs n^3 / 3 operations, two passes for the residual, and two for each refinement. There is no refinement if the
    first residual is within ``rtol``, and there are at most 8, as long as each one halves it. With a ridge of 0, LAPACK
    estimates the condition number, so a factor that is only rounding is rejected.

    Source: iterative refinement: Higham 2002, section 12; the estimate: section 15.

    Args:
        theta: the matrix ``[n, n]``, which may be overwritten.
        eps: machine epsilon of its entries.
        j: J, for residuals.
        y: right-hand side ``[n]``.
        ridge: not negative.
        rtol: tolerance of the residual.
        passes: passes spent on the matrix.

    Raises:
        BadInput: Theta + ridge I is not positive definite up to rounding (the message says which ridge suffices), or
            the residual stays above ``rtol``.
    """
    before, trace = j.passes, float(np.trace(theta))
    enough = max(SAFETY * eps * trace / rtol, 2 * ridge)
    theta = np.require(theta, requirements="W")  # an array of JAX is not writeable
    theta[np.diag_indices(j.n)] += ridge
    size = float(np.linalg.norm(theta, 1))
    try:
        factor = scipy.linalg.cho_factor(theta, lower=True, overwrite_a=True, check_finite=False)
        noise = SAFETY * math.sqrt(j.n) * eps
        known = ridge > 0 or scipy.linalg.lapack.dpocon(factor[0], size, uplo="L")[0] > noise
    except np.linalg.LinAlgError:
        known = False
    if not known:
        raise BadInput(
            f"Theta + ridge I is not positive definite up to rounding with ridge={ridge:g}: "
            + (f"take {enough:.1g} or more{_more_precise(eps)}" if enough > 0 else "Theta is zero")
        )
    x, rest, rounds = _refined(
        lambda rest: scipy.linalg.cho_solve(factor, rest, check_finite=False), _shifted(j, ridge), y, rtol
    )
    found = _solution(x, rest, y, ridge, max(rounds - 1, 0), passes + j.passes - before, "cholesky", j, trace)
    return _converged(found, rtol, eps, f"a ridge of {enough:.1g} or more")


def of_operator(
    j: JacobianOperator,
    y: np.ndarray,
    ridge: float,
    *,
    rtol: float,
    passes: int = 4096,
    seed: int = 0,
    rank: int = RANK,
) -> Solution:
    """Solve by SciPy's conjugate gradients on products with J J^T, preconditioned by a Nystrom approximation.

    The approximation of Theta has rank 32, or less if it would take more than a quarter of ``passes`` or of
    ``j.memory``. It removes the largest eigenvalues, so the number of iterations grows with the square root of
    (lambda_33 + ridge) / (lambda_min + ridge). If the residual of the recurrence differs from that of products, the
    iteration restarts from the latter, as long as each start halves it.

    Costs 2 passes for each rank of the preconditioner, and at least 2; for each iteration; and for the residual after
    each start.

    Source: Frangella, Tropp, Udell 2023, algorithm 2.1 and equation 5.3; Hestenes, Stiefel 1952.

    Args:
        j: J.
        y: right-hand side ``[n]``.
        ridge: not negative.
        rtol: residual at which the iteration stops.
        passes: maximum number of passes; there is always one iteration.
        seed: seed of the preconditioner.
        rank: maximum rank of the preconditioner; 0 for none.

    Raises:
        BadInput: the residual stays above ``rtol``.
    """
    product = 1 + j.passes_per_jvp()
    before, iterations = j.passes, 0
    rank = min(rank, j.n, passes // (product * SHARE), j.memory // (SHARE * 8 * j.n))
    preconditioner, trace = _nystrom(j, max(rank, 1), ridge, seed)
    if not rank:
        preconditioner = None
    apply = _shifted(j, ridge)

    def count(_: np.ndarray) -> None:
        nonlocal iterations
        iterations += 1

    def solve(rest: np.ndarray) -> np.ndarray:
        left = (passes - int(j.passes - before)) // product - 1
        if left < 1 and iterations:
            return np.zeros_like(rest)
        target = rtol * float(np.linalg.norm(y)) / 2  # the residual of products is a little larger
        try:
            with np.errstate(divide="raise", over="raise", invalid="raise"):
                x, _ = scipy.sparse.linalg.cg(
                    _linear(apply, j.n),
                    rest,
                    rtol=0.0,
                    atol=target,
                    maxiter=max(1, left),
                    M=None if preconditioner is None else _linear(preconditioner, j.n),
                    callback=count,
                )
        except FloatingPointError:  # a breakdown, for example where Theta is zero; the residual shows it
            return np.zeros_like(rest)
        found: np.ndarray = x
        return found

    x, rest, _ = _refined(solve, apply, y, rtol)
    found = _solution(x, rest, y, ridge, iterations, j.passes - before, "conjugate_gradients", j, trace)
    return _converged(found, rtol, epsilon(j.basis(0, 1)), "more passes, a larger ridge")


def _refined(solve: Map, apply: Map, y: np.ndarray, rtol: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Refine x until its residual is within ``rtol`` or stops falling; x, y - apply(x) and the number of solves."""
    x, rest, rounds = np.zeros_like(y), y, 0
    size = left = float(np.linalg.norm(y))
    while left > rtol * size and rounds <= REFINEMENTS:
        change = solve(rest)
        if not change.any() or not np.isfinite(change).all():
            break
        better = y - apply(x + change)
        rounds, before, now = rounds + 1, left, float(np.linalg.norm(better))
        if now < before:
            x, rest, left = x + change, better, now
        if not now < before / 2:
            break
    return x, rest, rounds


def _solution(
    x: np.ndarray,
    rest: np.ndarray,
    y: np.ndarray,
    ridge: float,
    iterations: int,
    passes: float,
    method: str,
    j: JacobianOperator,
    trace: float,
) -> Solution:
    left, size = float(np.linalg.norm(rest)), float(np.linalg.norm(y))
    rounding = lanczos.rounding(j) * trace * float(np.linalg.norm(x))
    error = (left + rounding) / ridge if ridge > 0 else math.inf if size else 0.0
    notes = j.notes
    if ridge == 0 and method == "conjugate_gradients":
        notes = ("with ridge=0, products cannot show whether Theta is singular and has other solutions", *notes)
    return Solution(x, left / size if size else 0.0, error, ridge, iterations, passes, method, notes, j.certificate)


def _converged(found: Solution, rtol: float, eps: float, remedy: str) -> Solution:
    """The solution if its residual is within the tolerance.

    Raises:
        BadInput: it is not; the message says what helps.
    """
    if found.residual <= rtol:
        return found
    raise BadInput(
        f"the residual of (Theta + {found.ridge:g} I) x = y is {found.residual:.2g} after {found.passes:g} passes, "
        f"above rtol={rtol:g}: take {remedy}, or a larger rtol{_more_precise(eps)}"
    )


def _more_precise(eps: float) -> str:
    return ", or dtype='float64'" if eps > SINGLE else ""


def _shifted(j: JacobianOperator, ridge: float) -> Map:
    """v -> (Theta + ridge I) v on the host; two passes. v is divided by its largest entry, so scale does not matter."""
    like = j.basis(0, 1)

    def apply(v: np.ndarray) -> np.ndarray:
        size = float(abs(v).max()) or 1.0
        image = to_numpy(j.ntk(asarray_like(v.reshape(1, -1) / size, like)), np.float64)[0]
        shifted: np.ndarray = size * image + ridge * v.reshape(-1)
        return shifted

    return apply


def operator(j: JacobianOperator, ridge: float) -> scipy.sparse.linalg.LinearOperator:
    """Theta + ridge I as SciPy's linear operator on the host, ``[n, n]``; two passes per product."""
    return _linear(_shifted(j, ridge), j.n)


def _linear(apply: Map, n: int) -> scipy.sparse.linalg.LinearOperator:
    return scipy.sparse.linalg.LinearOperator((n, n), matvec=apply, dtype=np.float64)


def _nystrom(j: JacobianOperator, rank: int, ridge: float, seed: int) -> tuple[Map | None, float]:
    """The preconditioner's inverse, ``None`` if the sketch has nothing above rounding; and an estimate of tr Theta."""
    like = j.basis(0, 1)
    probes = to_numpy(j.rng(seed).normal(rank, j.n), np.float64)
    probes = np.linalg.qr(probes.T)[0].T
    sketch = to_numpy(j.ntk(asarray_like(probes, like)), np.float64)
    trace = float((probes * sketch).sum()) * j.n / rank
    shift = math.sqrt(j.n) * epsilon(like) * float(np.linalg.norm(sketch, 2))
    core = probes @ (sketch + shift * probes).T
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > shift / 2
    if not kept.any():
        return None, trace
    # A square root B of the approximation, and from it the eigenvectors in columns.
    root = (sketch + shift * probes).T @ (vectors[:, kept] / np.sqrt(values[kept]))
    basis, scale, _ = np.linalg.svd(root, full_matrices=False)
    found = np.maximum(scale**2 - shift, 0.0)
    basis, found = basis[:, found > shift], found[found > shift]
    if not len(found):
        return None, trace
    weights = (found[-1] + ridge) / (found + ridge) - 1
    return lambda v: v + basis @ (weights * (basis.T @ v)), trace

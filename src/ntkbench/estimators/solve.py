"""(Theta + ridge I)^-1 y: by a Cholesky factor of all of Theta, or by conjugate gradients on products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from ntkbench.errors import BadInput
from ntkbench.operators import JacobianOperator
from ntkbench.operators.arrays import asarray_like, epsilon, to_numpy

RANK = 32
"""Of the preconditioner, at most; it takes two passes for each."""

SHARE = 4
"""The preconditioner takes at most one in so many passes, and of the memory."""

REFINEMENTS = 4
"""Of what a Cholesky factor gave, at most; two passes each."""

Map = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """x = (Theta + ridge I)^-1 y.

    As Theta is positive semidefinite, ||x - exact|| is at most residual * ||y|| / ridge, up to rounding of products.

    Attributes:
        values: x, in the shape of y.
        residual: ||(Theta + ridge I) x - y|| / ||y||, from products with J and J^T whichever way x was computed.
        ridge: what was added to the eigenvalues of Theta.
        iterations: of conjugate gradients, or refinements of what the Cholesky factor gave.
        passes: passes spent.
        method: ``"cholesky"`` or ``"conjugate_gradients"``.
        notes: remarks, such as a tolerance that was not reached.
        certificate: the largest relative difference between a gradient that was used and that of plain autograd.
    """

    values: np.ndarray
    residual: float
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
            f"{self.iterations} iterations, {self.passes:g} passes){certified}"
        )
        return "\n".join([said, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False, repr=False)
class Regression:
    """Kernel regression Theta(x', x) (Theta + ridge I)^-1 y of other inputs x'.

    Attributes:
        values: predictions ``[N', ...outputs]``.
        solution: the coefficients (Theta + ridge I)^-1 y and their residual.
        passes: passes spent, those of the solution among them.
    """

    values: np.ndarray
    solution: Solution
    passes: float

    def __repr__(self) -> str:
        return f"predictions, {' x '.join(map(str, self.values.shape))}, by {self.solution!r}"


def of_matrix(
    theta: np.ndarray, j: JacobianOperator, y: np.ndarray, ridge: float, *, rtol: float, passes: float
) -> Solution:
    """By a Cholesky factor of Theta + ridge I in float64 on the host, refined by products.

    Costs n^3 / 3 operations, two passes for the residual, and two for each refinement: there are none where the
    residual is within ``rtol`` at once, and at most 4 while each one halves it.

    Source: iterative refinement: Higham 2002, section 12.

    Args:
        theta: the matrix ``[n, n]``, which may be overwritten.
        j: J.
        y: right-hand side ``[n]``.
        ridge: not negative.
        rtol: of the residual.
        passes: what the matrix took.

    Raises:
        BadInput: Theta + ridge I is not positive definite up to rounding; says which ridge would do.
    """
    before, trace = j.passes, float(np.trace(theta))
    theta = np.require(theta, requirements="W")  # an array of JAX is not writeable
    theta[np.diag_indices(j.n)] += ridge
    try:
        factor = scipy.linalg.cho_factor(theta, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        needed = max(ridge, epsilon(j.basis(0, 1)) * trace) * 2
        raise BadInput(
            f"Theta + ridge I is not positive definite up to rounding with ridge={ridge:g}: take {needed:.1g} or more"
        ) from None
    apply = _shifted(j, ridge)
    x = scipy.linalg.cho_solve(factor, y, check_finite=False)
    rest = y - apply(x)
    iterations = 0
    while iterations < REFINEMENTS and np.linalg.norm(rest) > rtol * np.linalg.norm(y):
        better = x + scipy.linalg.cho_solve(factor, rest, check_finite=False)
        left = y - apply(better)
        iterations += 1
        halved = np.linalg.norm(left) < np.linalg.norm(rest) / 2
        if np.linalg.norm(left) < np.linalg.norm(rest):
            x, rest = better, left
        if not halved:
            break
    return _solution(x, rest, y, ridge, rtol, iterations, passes + j.passes - before, "cholesky", j)


def of_operator(
    j: JacobianOperator, y: np.ndarray, ridge: float, *, rtol: float, passes: int = 4096, seed: int = 0
) -> Solution:
    """By SciPy's conjugate gradients on products with J J^T, preconditioned by a Nystrom approximation of Theta.

    The approximation has rank 32, or less where it would take more than a quarter of ``passes`` or of ``j.memory``. It
    takes the largest eigenvalues out, on which the number of iterations depends: with it they grow with the root of
    (lambda_33 + ridge) / (lambda_min + ridge).

    Costs 2 passes for each rank of the preconditioner, for each iteration, and for the residual at the end.

    Source: Frangella, Tropp, Udell 2023, algorithm 2.1 and equation 5.3; Hestenes, Stiefel 1952.

    Args:
        j: J.
        y: right-hand side ``[n]``.
        ridge: not negative.
        rtol: of the residual, at which the iteration stops.
        passes: the most to spend; one iteration is always made.
        seed: of the preconditioner.
    """
    before, iterations = j.passes, 0
    rank = min(RANK, j.n, passes // (2 * SHARE), j.memory // (SHARE * 8 * j.n))
    preconditioner = _nystrom(j, rank, ridge, seed) if rank else None

    def count(_: np.ndarray) -> None:
        nonlocal iterations
        iterations += 1

    apply = _shifted(j, ridge)
    left = (passes - int(j.passes - before)) // 2 - 1
    x, _ = scipy.sparse.linalg.cg(
        _linear(apply, j.n),
        y,
        rtol=rtol,
        atol=0.0,
        maxiter=max(1, left),
        M=None if preconditioner is None else _linear(preconditioner, j.n),
        callback=count,
    )
    if not np.isfinite(x).all():
        raise BadInput(f"conjugate gradients broke down with ridge={ridge:g}: take a larger ridge, or more memory")
    rest = y - apply(x)
    return _solution(x, rest, y, ridge, rtol, iterations, j.passes - before, "conjugate_gradients", j)


def _solution(
    x: np.ndarray,
    rest: np.ndarray,
    y: np.ndarray,
    ridge: float,
    rtol: float,
    iterations: int,
    passes: float,
    method: str,
    j: JacobianOperator,
) -> Solution:
    size = float(np.linalg.norm(y))
    residual = float(np.linalg.norm(rest)) / size if size else 0.0
    notes = j.notes
    if not residual <= rtol:
        notes = (f"rtol={rtol:g} was not reached in {passes:g} passes: the residual is {residual:.2g}", *notes)
    return Solution(x, residual, ridge, iterations, passes, method, notes, j.certificate)


def _shifted(j: JacobianOperator, ridge: float) -> Map:
    """v -> (Theta + ridge I) v on the host; two passes."""
    like = j.basis(0, 1)
    return lambda v: to_numpy(j.ntk(asarray_like(v.reshape(1, -1), like)), np.float64)[0] + ridge * v.reshape(-1)


def _linear(apply: Map, n: int) -> scipy.sparse.linalg.LinearOperator:
    return scipy.sparse.linalg.LinearOperator((n, n), matvec=apply, dtype=np.float64)


def _nystrom(j: JacobianOperator, rank: int, ridge: float, seed: int) -> Map | None:
    """The preconditioner's inverse; ``None`` where the sketch has nothing above rounding."""
    like = j.basis(0, 1)
    probes = to_numpy(j.rng(seed).normal(rank, j.n), np.float64)
    probes = np.linalg.qr(probes.T)[0].T
    sketch = to_numpy(j.ntk(asarray_like(probes, like)), np.float64)
    shift = math.sqrt(j.n) * epsilon(like) * float(np.linalg.norm(sketch, 2))
    core = probes @ (sketch + shift * probes).T
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > shift / 2
    if not kept.any():
        return None
    # A square root B of the approximation, and from it the eigenvectors in columns.
    root = (sketch + shift * probes).T @ (vectors[:, kept] / np.sqrt(values[kept]))
    basis, scale, _ = np.linalg.svd(root, full_matrices=False)
    found = np.maximum(scale**2 - shift, 0.0)
    basis, found = basis[:, found > shift], found[found > shift]
    if not len(found):
        return None
    weights = (found[-1] + ridge) / (found + ridge) - 1
    return lambda v: v + basis @ (weights * (basis.T @ v))

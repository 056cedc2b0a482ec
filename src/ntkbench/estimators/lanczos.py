"""The spectrum of Theta: its density by stochastic Lanczos quadrature, its largest eigenvalues by block Lanczos."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import array_api_compat
import numpy as np

from ntkbench.errors import BadInput
from ntkbench.operators import JacobianOperator
from ntkbench.operators.arrays import asarray_like, epsilon, to_numpy


@dataclass(frozen=True)
class Density:
    """A quadrature rule for the spectrum of Theta: sum_i f(lambda_i) is about n sum_j weight_j f(node_j).

    Attributes:
        nodes: Ritz values of each probe, ``[probes, steps]``; those below round-off are 0.
        weights: their weights, ``[probes, steps]``; those of one probe add up to 1 / probes.
        n: size of Theta.
        passes: passes spent.
        smallest: the smallest Ritz value: up to rounding, lambda_min is at most that.
        entropy_excess: the most by which steps that are missing lower each probe's part of tr(Theta log Theta),
            ``[probes]``.
    """

    nodes: np.ndarray
    weights: np.ndarray
    n: int
    passes: float
    smallest: float
    entropy_excess: np.ndarray

    @property
    def largest(self) -> float:
        """The largest Ritz value: a lower bound on lambda_max, close to it after a few steps."""
        return float(self.nodes.max())

    @property
    def trace(self) -> float:
        """tr Theta, Hutchinson's estimate from the same probes."""
        return self.n * float((self.weights * self.nodes).sum())

    @property
    def entropy_effective_rank(self) -> float:
        """exp(-sum_i p_i log p_i) with p_i = lambda_i / tr Theta (Roy, Vetterli 2007); ``nan`` where Theta is zero.

        More steps lower it, to :attr:`entropy_lower_bound` at most.
        """
        trace, moment = self._moments().sum(1)
        return math.exp(math.log(trace) - moment / trace) if trace > 0 else math.nan

    @property
    def entropy_lower_bound(self) -> float:
        """The least entropy effective rank that the same probes could have after any number of steps.

        Gauss quadrature is below the integral of x log x, and Gauss-Radau quadrature with a node at 0 above it, by the
        signs of the derivatives (Golub, Meurant 1994, theorems 3.1 and 3.2).
        """
        trace, moment = self._moments().sum(1)
        moment += float(self.entropy_excess.sum())
        return max(math.exp(math.log(trace) - moment / trace), 1.0) if trace > 0 else math.nan

    @property
    def entropy_standard_error(self) -> float:
        """Standard error of :attr:`entropy_effective_rank` by the delta method over probes; ``nan`` for one probe."""
        probes = len(self.nodes)
        trace, moment = of_probes = self._moments() * probes
        (mean_trace, mean_moment), value = of_probes.mean(1), self.entropy_effective_rank
        if probes < 2 or math.isnan(value):
            return math.nan
        change = (trace * (1 + mean_moment / mean_trace) - moment) / mean_trace
        return value * float(change.std(ddof=1)) / math.sqrt(probes)

    def _moments(self) -> np.ndarray:
        """Every probe's part of tr Theta and of tr(Theta log Theta), ``[2, probes]``."""
        logarithms = np.log(np.where(self.nodes > 0, self.nodes, 1.0))
        parts: np.ndarray = self.n * (self.weights * np.stack([self.nodes, self.nodes * logarithms])).sum(2)
        return parts


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of Theta.

    Attributes:
        values: in descending order, ``[top]``.
        errors: each value is within this distance of an eigenvalue, ``[top]``.
        passes: passes spent.
        notes: whether the tolerance was not reached.
    """

    values: np.ndarray
    errors: np.ndarray
    passes: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ritz:
    """The largest eigenvalues of Theta and their eigenvectors, by products.

    Attributes:
        values: in descending order, ``[top]``.
        residuals: ||Theta v - lambda v|| of each, ``[top]``: there is an eigenvalue within that distance.
        vectors: orthonormal rows, ``[top, n]``.
        following: the next smaller Ritz value and its residual; ``None`` where there is no other.
        smallest: the smallest Ritz value on the way: up to rounding, lambda_min is at most that.
        passes: passes spent.
        notes: whether the tolerance was not reached.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray
    following: tuple[float, float] | None
    smallest: float
    passes: float
    notes: tuple[str, ...]


EXTRA = 4
"""Vectors of a block beyond the eigenvalues that are wanted, which separate these from the rest of the spectrum."""

HELD = 4
"""Host vectors in float64 for each of the Krylov space: its own, its image, and both once more while they are moved."""


def largest(j: JacobianOperator, top: int, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0) -> Eigenvalues:
    """The largest eigenvalues of Theta; see :func:`ritz_pairs`, which has their eigenvectors as well."""
    found = ritz_pairs(j, top, rtol=rtol, passes=passes, seed=seed)
    return Eigenvalues(found.values, found.residuals, found.passes, found.notes)


def ritz_pairs(j: JacobianOperator, top: int, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0) -> Ritz:
    """The largest eigenvalues of Theta = J J^T and their eigenvectors by block Lanczos with full reorthogonalisation.

    The block has ``top`` + 4 random vectors, so that multiple eigenvalues are found. Ritz values are taken until the
    residual of each of the ``top`` largest is below ``rtol`` times its value. By the residual r = Theta v - lambda v
    there is an eigenvalue within ||r|| of lambda.

    Costs 2 (top + 4) passes a step. The Krylov space and its image are held in float64 on the host. Where they would
    take more than ``j.memory``, the iteration restarts from the ``top`` + 4 largest Ritz vectors; three blocks are held
    at least.

    Source: Cullum, Donath 1974; Golub, Underwood 1977; the residual bound: Parlett 1980, theorem 4.5.1; the restart:
    Wu, Simon 2000.

    Args:
        j: J.
        top: how many; at most n.
        rtol: largest residual, relative to each value.
        passes: the most to spend.
        seed: of the first block.
    """
    before, block, smallest = j.passes, min(top + EXTRA, j.n), math.inf
    most = max(3 * block, j.memory // (HELD * 8 * j.n))
    new = to_numpy(j.rng(seed).normal(block, j.n), np.float64)
    like = j.basis(0, 1)
    basis, images, vectors = np.empty((0, j.n)), np.empty((0, j.n)), np.empty((0, 0))
    while True:
        new = _orthonormal(new, basis, epsilon(like))
        if len(new) == 0:  # the Krylov space is exhausted
            break
        if len(basis) + len(new) > most:
            basis, images = vectors[:, :block].T @ basis, vectors[:, :block].T @ images
        image = to_numpy(j.ntk(asarray_like(new, like)), np.float64)
        basis, images = np.concatenate([basis, new]), np.concatenate([images, image])
        projected = basis @ images.T
        values, vectors = np.linalg.eigh((projected + projected.T) / 2)
        values, vectors = values[::-1], vectors[:, ::-1]
        smallest = min(smallest, float(values[-1]))
        chosen = vectors[:, : top + 1]
        residuals = np.linalg.norm(chosen.T @ images - values[: top + 1, None] * (chosen.T @ basis), axis=1)
        reached = len(values) >= top and bool((residuals[:top] <= rtol * values[:top]).all())
        if reached or len(basis) == j.n or j.passes - before + 2 * len(new) > passes:
            break
        new = image
    following = (float(values[top]), float(residuals[top])) if len(values) > top else None
    values, residuals = values[:top].copy(), residuals[:top]
    short = [f"{v:.3g} within {r:.1g}" for v, r in zip(values, residuals, strict=True) if r > rtol * v]
    notes = (f"rtol={rtol:g} was not reached in {passes} passes: {', '.join(short)}",) if short else ()
    return Ritz(values, residuals, vectors[:, :top].T @ basis, following, smallest, j.passes - before, notes)


def of_matrix(theta: np.ndarray, top: int, eps: float, passes: float) -> Eigenvalues:
    """The largest eigenvalues of a whole Theta ``[n, n]``, whose entries are right to ``eps``.

    Args:
        theta: the matrix.
        top: how many.
        eps: relative rounding of its entries; the errors are n times that, relative to the largest eigenvalue.
        passes: what the matrix took.
    """
    values = np.linalg.eigvalsh(theta)[::-1]
    return Eigenvalues(values[:top].copy(), np.full(top, len(theta) * eps * values[0]), passes)


def _orthonormal(rows: np.ndarray, basis: np.ndarray, eps: float) -> np.ndarray:
    """An orthonormal basis of what ``rows`` add to ``basis``; what is left of rounding alone is dropped."""
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows[size[:, 0] > 0] / size[size[:, 0] > 0]
    for _ in range(2):
        rows = rows - (rows @ basis.T) @ basis
    _, scale, made = np.linalg.svd(rows, full_matrices=False)
    made = made[scale > 100 * eps * len(made)]
    for _ in range(2):
        made = made - (made @ basis.T) @ basis
        made = np.linalg.qr(made.T)[0].T
    return made


def density(j: JacobianOperator, *, probes: int = 4, steps: int = 30, seed: int = 0) -> Density:
    """Stochastic Lanczos quadrature on Theta = J J^T with full reorthogonalisation.

    Every probe is a normalised Gaussian vector with its own Krylov space. All probes advance together, so a step is one
    block of products. A probe whose Krylov space is exhausted continues as a zero vector until the others are done. For
    the spectral measure of one probe the quadrature is exact for polynomials of degree 2 * steps - 1. The mean of that
    measure over probes is the density. The nodes are the distinct eigenvalues once there are as many steps.

    Costs at most 2 * probes * steps passes, and holds probes * steps vectors of length n.

    Source: Golub, Welsch 1969; Bai, Fahey, Golub 1996; Ubaru, Chen, Saad 2017, algorithm 1.

    Args:
        j: J.
        probes: random starting vectors.
        steps: Lanczos steps; more than n are not taken.
        seed: of the probes.

    Raises:
        BadInput: no probes or no steps.
    """
    if probes < 1 or steps < 1:
        raise BadInput(f"probes and steps must be positive, got {probes} and {steps}")
    before = j.passes
    steps = min(steps, j.n)
    u = j.rng(seed).normal(probes, j.n)
    xp = array_api_compat.array_namespace(u)
    u = u / xp.sqrt((u**2).sum(1))[:, None]
    basis, diagonal, off_diagonal = [u], [], []
    alive = np.ones(probes, bool)
    for step in range(steps):
        w = j.ntk(basis[-1])
        diagonal.append(to_numpy((w * basis[-1]).sum(1), np.float64))
        if step + 1 == steps:
            break
        # The three-term recurrence loses orthogonality as soon as a Ritz value converges; two full passes restore it.
        for _ in range(2):
            for q in basis:
                w = w - (w * q).sum(1)[:, None] * q
        length = to_numpy(xp.sqrt((w**2).sum(1)), np.float64)
        scale = np.max(diagonal, axis=0)
        alive = alive & (length > 100 * epsilon(u) * scale)
        off_diagonal.append(np.where(alive, length, 0.0))
        if not alive.any():
            break
        basis.append(w * asarray_like(np.where(alive, 1 / np.where(alive, length, 1.0), 0.0), u)[:, None])
    size = len(diagonal)
    matrices = np.zeros((probes, size, size))
    at = np.arange(size)
    matrices[:, at, at] = np.array(diagonal).T
    if size > 1:
        off = np.array(off_diagonal[: size - 1]).T
        matrices[:, at[:-1], at[1:]] = matrices[:, at[1:], at[:-1]] = off
    nodes, vectors = np.linalg.eigh(matrices)
    noise = size * epsilon(u) * nodes.max(axis=1, keepdims=True)
    # Zero vectors that stand for what is exhausted have no part in a probe's Krylov space.
    own = [1 + int(np.argmin([*column, 0.0])) for column in np.array(off_diagonal[: size - 1]).reshape(-1, probes).T]
    smallest = min(float(np.linalg.eigvalsh(m[:k, :k])[0]) for m, k in zip(matrices, own, strict=True))
    # What is exhausted has no excess: Gauss quadrature is exact.
    excess = [_entropy_excess(m) if k == size < j.n else 0.0 for m, k in zip(matrices, own, strict=True)]
    nodes = np.where(nodes > noise, nodes, 0.0)
    weights = vectors[:, 0, :] ** 2 / probes
    return Density(nodes, weights, j.n, j.passes - before, smallest, np.array(excess) * j.n / probes)


def _entropy_excess(matrix: np.ndarray) -> float:
    """Gauss-Radau quadrature of x log x with a node at 0, less Gauss quadrature, of a Lanczos matrix ``[k, k]``."""
    if len(matrix) == 1:
        return math.inf
    moved, column = matrix.copy(), matrix[:-1, -1]
    # The last entry that makes the matrix singular; in exact arithmetic it is not larger than before.
    with contextlib.suppress(np.linalg.LinAlgError):
        moved[-1, -1] = np.clip(column @ np.linalg.solve(matrix[:-1, :-1], column), 0.0, matrix[-1, -1])

    def quadrature(matrix: np.ndarray) -> float:
        nodes, vectors = np.linalg.eigh(matrix)
        return float(vectors[0] ** 2 @ (nodes * np.log(np.where(nodes > 0, nodes, 1.0))))

    return max(quadrature(moved) - quadrature(matrix), 0.0)

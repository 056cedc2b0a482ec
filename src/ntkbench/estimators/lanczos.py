"""The spectrum of Theta: its density by stochastic Lanczos quadrature, its largest eigenvalues by block Lanczos."""

from __future__ import annotations

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
    """

    nodes: np.ndarray
    weights: np.ndarray
    n: int
    passes: float

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
        """exp(-sum_i p_i log p_i) with p_i = lambda_i / tr Theta (Roy, Vetterli 2007)."""
        positive = self.nodes > 0
        nodes, weights = self.nodes[positive], self.weights[positive]
        trace = self.n * float((weights * nodes).sum())
        moment = self.n * float((weights * nodes * np.log(nodes)).sum())
        return math.exp(math.log(trace) - moment / trace)


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


EXTRA = 4
"""Vectors of a block beyond the eigenvalues that are wanted, which separate these from the rest of the spectrum."""


def largest(j: JacobianOperator, top: int, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0) -> Eigenvalues:
    """The largest eigenvalues of Theta = J J^T by block Lanczos with full reorthogonalisation.

    The block has ``top`` + 4 random vectors, so that multiple eigenvalues are found. Ritz values are taken until the
    residual of each of the ``top`` largest is below ``rtol`` times its value. By the residual r = Theta v - lambda v
    there is an eigenvalue within ||r|| of lambda.

    Costs 2 (top + 4) passes a step, and holds two vectors of length n for each vector of the Krylov space.

    Source: Cullum, Donath 1974; Golub, Underwood 1977; the residual bound: Parlett 1980, theorem 4.5.1.

    Args:
        j: J.
        top: how many; at most n.
        rtol: largest residual, relative to each value.
        passes: the most to spend.
        seed: of the first block.
    """
    before = j.passes
    new = to_numpy(j.rng(seed).normal(min(top + EXTRA, j.n), j.n), np.float64)
    like = j.basis(0, 1)
    basis, images = np.empty((0, j.n)), np.empty((0, j.n))
    while True:
        new = _orthonormal(new, basis, epsilon(like))
        if len(new) == 0:  # the Krylov space is exhausted
            break
        image = to_numpy(j.ntk(asarray_like(new, like)), np.float64)
        basis, images = np.concatenate([basis, new]), np.concatenate([images, image])
        projected = basis @ images.T
        values, vectors = np.linalg.eigh((projected + projected.T) / 2)
        values, vectors = values[::-1][:top], vectors[:, ::-1][:, :top]
        residuals = np.linalg.norm(vectors.T @ images - values[:, None] * (vectors.T @ basis), axis=1)
        reached = len(values) == top and bool((residuals <= rtol * values).all())
        if reached or len(basis) == j.n or j.passes - before + 2 * len(new) > passes:
            break
        new = image
    short = [f"{v:.3g} within {r:.1g}" for v, r in zip(values, residuals, strict=True) if r > rtol * v]
    notes = (f"rtol={rtol:g} was not reached in {passes} passes: {', '.join(short)}",) if short else ()
    return Eigenvalues(values, residuals, j.passes - before, notes)


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
    nodes = np.where(nodes > noise, nodes, 0.0)
    return Density(nodes, vectors[:, 0, :] ** 2 / probes, j.n, j.passes - before)

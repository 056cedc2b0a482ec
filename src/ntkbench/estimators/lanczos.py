"""Spectral density, largest eigenvalue and entropy effective rank of Theta, by stochastic Lanczos quadrature."""

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

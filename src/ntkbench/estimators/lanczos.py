"""The spectrum of Theta by stochastic Lanczos quadrature: density, largest eigenvalue, entropy effective rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import array_api_compat
import numpy as np

from ntkbench.errors import BadInput
from ntkbench.estimators.deflation import beside, on_host, precision
from ntkbench.operators import JacobianOperator


@dataclass(frozen=True)
class Density:
    """A quadrature for the spectrum of Theta: sum_i f(lambda_i) is about n * sum over nodes of weight * f(node).

    Attributes:
        nodes: Ritz values of each probe, ``[probes, steps]``, those below round-off set to 0.
        weights: their weights, ``[probes, steps]``; each probe's add up to 1 / probes.
        n: size of Theta.
        passes: passes spent.
    """

    nodes: np.ndarray
    weights: np.ndarray
    n: int
    passes: float

    @property
    def largest(self) -> float:
        """The largest Ritz value: never more than lambda_max, and close to it after a few steps."""
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
    """Stochastic Lanczos quadrature on Theta = J J^T with full reorthogonalisation: 2 * probes * steps passes at most.

    Every probe is a Gaussian vector made a unit one, with a Krylov space of its own; all probes advance together, so a
    step is one block of products. A probe whose space is used up rides along as a zero vector until the others are
    done. For each probe's own measure the quadrature is exact for polynomials of degree 2 * steps - 1; random is only
    that measure, whose mean is the density. With as many steps as there are distinct eigenvalues they are the nodes.

    Source: Golub, Welsch 1969; Bai, Fahey, Golub 1996; Ubaru, Chen, Saad 2017, algorithm 1. Holds probes * steps
    vectors of n.

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
    basis, diagonal, beside_it = [u], [], []
    alive = np.ones(probes, bool)
    for step in range(steps):
        w = j.ntk(basis[-1])
        diagonal.append(on_host((w * basis[-1]).sum(1)))
        if step + 1 == steps:
            break
        # Twice is enough: the three-term recurrence by itself loses orthogonality as soon as a Ritz value converges.
        for _ in range(2):
            for q in basis:
                w = w - (w * q).sum(1)[:, None] * q
        length = on_host(xp.sqrt((w**2).sum(1)))
        scale = np.max(diagonal, axis=0)
        alive = alive & (length > 100 * precision(u) * scale)
        beside_it.append(np.where(alive, length, 0.0))
        if not alive.any():
            break
        basis.append(w * beside(np.where(alive, 1 / np.where(alive, length, 1.0), 0.0), u)[:, None])
    size = len(diagonal)
    matrices = np.zeros((probes, size, size))
    at = np.arange(size)
    matrices[:, at, at] = np.array(diagonal).T
    if size > 1:
        off = np.array(beside_it[: size - 1]).T
        matrices[:, at[:-1], at[1:]] = matrices[:, at[1:], at[:-1]] = off
    nodes, vectors = np.linalg.eigh(matrices)
    noise = size * precision(u) * nodes.max(axis=1, keepdims=True)
    nodes = np.where(nodes > noise, nodes, 0.0)
    return Density(nodes, vectors[:, 0, :] ** 2 / probes, j.n, j.passes - before)

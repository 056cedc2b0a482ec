"""Hutch++ that uses Theta = J J^T: after the sketch it needs VJPs only."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators import deflation, standard_errors
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class HutchPPOneSided(FixedBudget):
    """||J^T Q||_F^2 + mean of ||J^T (I - Q Q^T) g||^2, Q = orth(Theta S), k random signs in S and k in g.

    The same estimate as ``hutchpp``'s for 4k passes and not 6k: Theta S costs 2k, the two lengths one VJP a
    vector. Unbiased, with variance 2 (||A||_F^2 - sum_i A_ii^2) / k given Q, A = (I - Q Q^T) Theta (I - Q Q^T). The
    standard error is that of the residual's mean. Exact once k is the rank of Theta.
    """

    title = "Hutch++ (one-sided)"
    source = "Meyer, Musco, Musco, Woodruff 2021, algorithm 1, with the last two products replaced by VJPs"
    backends = ("torch", "jax")
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 4

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        (j,) = jacobians
        k = min(probes, j.n)
        q = deflation.orthonormal(j.ntk(rng.sign(k, j.n)))
        inside = float(deflation.squared_lengths(j, j.vjp, q).sum())
        g = deflation.without(rng.sign(k, j.n), q)
        return deflation.plus(inside, standard_errors.mean(deflation.squared_lengths(j, j.vjp, g)))

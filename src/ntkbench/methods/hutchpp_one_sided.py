"""Hutch++ for Theta = J J^T: only the sketch takes JVPs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class HutchPPOneSided(FixedBudget):
    """||J^T Q||_F^2 + mean of ||J^T (I - Q Q^T) g||^2 with Q = orth(Theta S) and k random signs each for S and g.

    The estimate of ``hutchpp`` in 4k instead of 6k passes: Theta S takes 2k, and the two norms take one VJP per vector.
    Unbiased, with variance 2 (||A||_F^2 - sum_i A_ii^2) / k given Q, where A = (I - Q Q^T) Theta (I - Q Q^T). The
    standard error is that of the residual's mean. Exact once k reaches the rank of Theta.
    """

    title = "Hutch++ (one-sided)"
    source = (
        "this suite; Meyer et al. 2021 (doi 10.1137/1.9781611976496.16), algorithm 1, with the last two products "
        "replaced by VJPs"
    )
    use_when = "a trace is needed, samples interact, and few eigenvalues hold most of it"
    variance = "2 (||B||_F^2 - sum_i B_ii^2) / k for B = (I - Q Q^T) Theta (I - Q Q^T), given Q"
    backends = ("torch", "jax")
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 4

    def jvp_share(self, metric: str) -> float:
        return 1 / 4

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        (j,) = jacobians
        k = min(probes, j.n)
        sketched = j.ntk(rng.sign(k, j.n))
        q = deflation.orthonormal(sketched)
        inside = float(deflation.squared_norms(j, j.vjp, q).sum())
        g = deflation.project_out(rng.sign(k, j.n), q)
        outside = deflation.mean(deflation.squared_norms(j, j.vjp, g), j.n)
        spare = functools.partial(deflation.spare_columns, sketched, q)
        left = deflation.left_outside(k, j.n, min(j.n, j.P), spare)
        return deflation.with_residual(inside, outside, k, left, j.epsilon, spare)

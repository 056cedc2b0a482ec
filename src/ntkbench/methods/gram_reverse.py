"""Reverse Gram matrix: all moments of Theta from inner products of VJPs."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import Pairs, moments_of
from ntkbench.methods.base import Sampling
from ntkbench.operators import Array, JacobianOperator, Rng


class GramReverse(Sampling):
    """G = U^T Theta U, the Gram matrix of J^T u over k random signs u: VJPs only, 1 pass a probe, 2 for alignment.

    tr Theta = E mean_i G_ii, ||Theta||_F^2 = E sum_(i != j) G_ij^2 / (k (k - 1)) and, on the same probes, tr(Theta
    Theta_f) = E sum_(i != j) G_ij G^f_ij / (k (k - 1)): unbiased, so that the square root and the ratios are biased at
    order 1/k. The variance of the square is about 8 ||Theta^2||_F^2 / k + 4 ||Theta||_F^4 / k^2. At equal passes
    Theta-products (``hutchinson``) have 4 ||Theta^2||_F^2 / k: these need no forward mode and half as many passes for
    the same number of probes, no more. Standard error as in :class:`ntkbench.estimators.standard_errors.PairSums`;
    memory is bounded as in :class:`ntkbench.estimators.accumulators.Pairs`.
    """

    title = "reverse Gram matrix"
    source = "U-statistics of Hoeffding 1948; Kong and Valiant 2017 (arXiv 1602.00061) for spectral moments"
    backends = ("torch", "jax")
    fewest_probes = 4

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Pairs:
        j = jacobians[0]

        def products(u: Array, _: slice) -> list[Array]:
            return [jacobian.vjp(u)[:, None] for jacobian in jacobians]

        return Pairs(moments_of(names), 1, j.P, jacobians, lambda k: rng.sign(k, j.n), products)

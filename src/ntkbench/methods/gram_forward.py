"""Forward Gram matrix: all moments of Theta from inner products of JVPs."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import Pairs, moments_of
from ntkbench.methods.base import Sampling
from ntkbench.operators import Array, JacobianOperator, Rng


class GramForward(Sampling):
    """The Gram matrix of J w over k random signs w in parameter space: JVPs only, 1 pass a probe, 2 for alignment.

    With y_i = J w_i: tr Theta = E mean_i ||y_i||^2 and ||Theta||_F^2 = ||J^T J||_F^2 = E sum_(i != j) <y_i, y_j>^2 /
    (k (k - 1)). The cross term is tr(Theta Theta_f) = ||J^T J_f||_F^2 = E sum_(i != j) <y_i, y^f_j>^2 / (k (k - 1)), of
    inner products between the two networks; all are unbiased. Unlike with reverse probes the alignment is not bound to
    be below 1. Variances as for ``gram_reverse`` with J^T J for Theta.
    """

    title = "forward Gram matrix"
    source = "U-statistics of Hoeffding 1948; Kong and Valiant 2017 (arXiv 1602.00061) for spectral moments"
    backends = ("torch", "jax")
    fewest_probes = 4

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Pairs:
        j = jacobians[0]

        def products(w: Array, _: slice) -> list[Array]:
            return [jacobian.jvp(w)[:, None] for jacobian in jacobians]

        return Pairs(moments_of(names), 1, j.n, jacobians, lambda k: rng.sign(k, j.P), products, _kernels)


def _kernels(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
    squares = [(a @ b.T) ** 2 for a, b in zip(one, other, strict=True)]
    if len(one) == 1:
        return squares
    return [*squares, ((one[0] @ other[1].T) ** 2 + (one[1] @ other[0].T) ** 2) / 2]

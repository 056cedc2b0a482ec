"""XNysTrace: leave-one-out Nystrom approximations of Theta through a QR of J^T U."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class XNysTrace(FixedBudget):
    """Mean over i of tr A_i + c_i u_i^T (Theta - A_i) u_i, A_i the Nystrom approximation from the probes but u_i.

    With F = J^T U = Q R, A_i = J Q_i Q_i^T J^T for Q_i = orth(F without column i): its trace is
    ||J Q||_F^2 - ||J Q s_i||^2, s_i = R^{-T} e_i normalised, and the residual is 1 / (M^{-1})_ii, M = F^T F. So k VJPs
    and k JVPs are all, and no Theta-product is multiplied by an inverse. c_i puts the part of u_i outside the other
    k - 1 Gaussian probes on the sphere of radius sqrt(n - k + 1). But for c_i this is also the estimate of ||J^T||_F^2
    by leave-one-out projections of J^T (XRowNorm's, summed over rows). Unbiased. The standard error counts the
    covariance of the k estimates (see :func:`ntkbench.estimators.deflation.combined`). Exact once k is over the rank
    of Theta. Holds k gradients.
    """

    title = "XNysTrace"
    source = "Epperly, Tropp, Webber 2024, section 2.3 (XNysTrace with normalisation), through a QR of J^T U"
    backends = ("torch", "jax")
    metrics = ("trace",)
    gradients_held = 3

    def passes_per_probe(self, metric: str) -> int:
        return 2

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        (j,) = jacobians
        return deflation.xnystrace(j.vjp, j.jvp, rng.normal(min(probes, j.n), j.n))

"""XNysTrace, from either side of J."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base.sides import Side, factor
from ntkbench.methods.base.stochastic import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class FactoredXNysTrace(FixedBudget):
    """XNysTrace of G = A^T A, with A = J^T or J: k products with A and k with A^T; unbiased.

    The estimate is the mean over i of tr G_i + c_i u_i^T (G - G_i) u_i, where the Nystrom approximation G_i uses all of
    the k Gaussian probes U except u_i. The factor c_i puts the component of u_i outside the span of the others on the
    sphere of radius sqrt(dim - k + 1). With F = A U = Q R, G_i = A^T Q_i Q_i^T A for Q_i = orth(F without column i).
    Its trace is ||A^T Q||_F^2 - ||A^T Q s_i||^2, with s_i = R^{-T} e_i normalised, and the residual is 1 / (M^{-1})_ii
    with M = F^T F. So no product with G is needed. Without c_i this is also the estimate of ||A||_F^2 by leave-one-out
    projections (XRowNorm summed over rows). The standard error includes the covariance of the k estimates (see
    :func:`ntkbench.estimators.deflation.leave_one_out`). Exact once k exceeds the rank of Theta. Holds up to 3k vectors
    of length P.

    Attributes:
        side: ``reverse`` for A = J^T, ``forward`` for A = J.
    """

    backends = ("torch", "jax")
    metrics = ("trace",)
    gradients_held = 3
    side: ClassVar[Side]

    def passes_per_probe(self, metric: str) -> int:
        return 2

    def jvp_share(self, metric: str) -> float:
        return 1 / 2

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        (j,) = jacobians
        A = factor(j, self.side)
        return deflation.xnystrace(A.product, A.adjoint, rng.normal(min(probes, A.dim), A.dim))

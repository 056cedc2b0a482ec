"""Hutch++: the exact trace on the range of a sketch, and Hutchinson on its complement, with Theta as a black box."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class HutchPP(FixedBudget):
    """Traces of Theta, Theta^2 and Theta Theta_f by Hutch++ on the composed operator.

    The estimate of tr A is tr Q^T A Q + 1/k sum_i g_i^T (I - Q Q^T) A (I - Q Q^T) g_i, where Q = orth(A S), and the k
    columns of S and the k probes g_i are random signs. It is unbiased and takes 3k products with A, of 2 passes each
    for Theta, and 4 for Theta^2 and Theta Theta_f. Effective rank and alignment combine independent estimates of their
    traces. The standard error is that of the residual's mean.

    The blog post on recurrent models splits its budget in this way, under the name Nystrom++. The paper's script splits
    it differently (``hutchpp_paper``).
    """

    title = "Hutch++"
    source = (
        "Meyer et al. 2021 (doi 10.1137/1.9781611976496.16), algorithm 1; composed operators as in Hazelden 2025 "
        "(arXiv 2511.10796)"
    )
    use_when = "Theta is a black box, and few eigenvalues hold most of the trace"
    variance = "2 (||B||_F^2 - sum_i B_ii^2) / k for B = (I - Q Q^T) A (I - Q Q^T), given Q"
    backends = ("torch", "jax")

    def passes_per_probe(self, metric: str) -> int:
        return {"trace": 6, "norm": 12, "effective_rank": 18, "alignment": 36}[metric]

    def jvp_share(self, metric: str) -> float:
        return 1 / 2

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        n, rank = jacobians[0].n, min(jacobians[0].n, jacobians[0].P)
        k = min(probes, n)
        return deflation.from_separate_traces(metric, jacobians, lambda a: deflation.hutchpp(a, k, k, n, rank, rng))

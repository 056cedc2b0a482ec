"""Hutch++ with the budget split of the paper's script, with Theta as a black box."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class HutchPPPaper(FixedBudget):
    """``hutchpp`` with few columns in the sketch and many probes for the residual, as in the paper's script.

    For a nominal number m, the script takes q = m // 6 columns in the sketch and (m - q) // 2 residual probes, with one
    more column if m - q is odd. It counts these as m, although a column takes two products with the operator and a
    residual probe takes one: about 0.75 m products, of 2 passes each for Theta, and 4 for Theta^2 and Theta Theta_f.
    Here the budget is in passes, and m is the largest number that it allows, at least 5: a column and two residual
    probes. If m exceeds n, the script multiplies the operator by the identity instead. Here this is done as soon as it
    takes no more products than Hutch++.

    Unbiased. With r residual probes, the variance given Q is 2 (||B||_F^2 - sum_i B_ii^2) / r for B = (I - Q Q^T) A
    (I - Q Q^T). The standard error is that of the residual's mean.
    """

    title = "Hutch++ (paper's budget)"
    source = (
        "Hazelden 2025 (arXiv 2511.10796), the paper's script (trace_hupp_op); Meyer et al. 2021 (doi "
        "10.1137/1.9781611976496.16), algorithm 1"
    )
    use_when = "you compare with the paper"
    variance = "that of ``hutchpp`` over the residual probes, given Q"
    backends = ("torch", "jax")
    fewest_probes = 5

    def passes_per_probe(self, metric: str) -> int:
        """Passes of one product with each operator that the metric needs."""
        return {"trace": 2, "norm": 4, "effective_rank": 6, "alignment": 12}[metric]

    def jvp_share(self, metric: str) -> float:
        return 1 / 2

    def cost(self, metric: str, probes: int) -> int:
        columns, residual = _split(probes)
        return (2 * columns + residual) * self.passes_per_probe(metric)

    def probes(self, metric: str, passes: int) -> int:
        # The cost is not monotone in m, because of the parity of m - q.
        products = passes // self.passes_per_probe(metric)
        most = range(3 * products // 2 + 3, 0, -1)
        return next(m for m in most if self.cost(metric, m) <= passes)

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        j = jacobians[0]
        columns, residual = _split(probes)

        def trace(a: deflation.LinearMap) -> PointEstimate:
            if 2 * columns + residual >= j.n:
                basis = j.basis(0, j.n)
                return PointEstimate(float((basis * a(basis)).sum()), 0.0)
            return deflation.hutchpp(a, columns, residual, j.n, min(j.n, j.P), rng)

        return deflation.from_separate_traces(metric, jacobians, trace)


def _split(m: int) -> tuple[int, int]:
    """Numbers of sketch columns and of residual probes for the script's nominal number m."""
    columns = m // 6
    return columns + (m - columns) % 2, (m - columns) // 2

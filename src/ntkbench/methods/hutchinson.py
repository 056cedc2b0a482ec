"""Hutchinson: random sign probes through Theta as a black box."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench import metrics
from ntkbench.estimators.accumulators import ProbeMeans, required_moments
from ntkbench.methods.base import Accumulating
from ntkbench.operators import Array, JacobianOperator, Rng
from ntkbench.problem import Problem


class Hutchinson(Accumulating):
    """Means of u^T Theta u, ||Theta u||^2 and <Theta u, Theta_f u> over random signs u.

    2 passes per probe, 4 for alignment. The moments are unbiased; the square root and the ratios are biased at order
    1/k for k probes. The variance of the trace is 2 (||Theta||_F^2 - sum_i Theta_ii^2) / k. The standard error is that
    of the jackknife over probes.
    """

    title = "Hutchinson"
    source = (
        "Hutchinson 1990 (doi 10.1080/03610919008812866); Girard 1989 (doi 10.1007/BF01395775); Theta as a black box "
        "as in Hazelden 2025 (arXiv 2511.10796)"
    )
    use_when = "samples interact, and the spectrum is flat"
    variance = "trace: 2 (||Theta||_F^2 - sum_i Theta_ii^2) / k; norm^2: the same with Theta^2 for Theta"
    backends = ("torch", "jax")

    def passes_per_probe(self, metric: str) -> int:
        return 4 if metric == "alignment" else 2

    def jvp_share(self, metric: str) -> float:
        return 1 / 2

    def signs(self, problem: Problem, metric: str) -> int:
        return problem.n

    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> ProbeMeans:
        j, moments = jacobians[0], required_moments(names)

        def products(k: int) -> list[Array]:
            u = rng.sign(k, j.n)
            theta_u, *theta_f_u = (metrics.double(j.ntk(u)) for j in jacobians)
            pairs = {"trace": (u, theta_u), "square": (theta_u, theta_u)}
            for f in theta_f_u:
                d = f - theta_u
                pairs |= {
                    "square_f": (f, f),
                    "cross": (theta_u, f),
                    "difference": (d, d),
                    "difference_cross": (theta_u, d),
                }
            return [(a * b).sum(1) for a, b in (pairs[moment] for moment in moments)]

        return ProbeMeans(moments, products, j.blocks)

"""Trace estimators that multiply by J or by J^T only: tr Theta = ||J||_F^2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ntkbench.estimators import deflation
from ntkbench.estimators.accumulators import ProbeMeans
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base.sides import Side, factor
from ntkbench.methods.base.stochastic import Accumulating, FixedBudget
from ntkbench.operators import JacobianOperator, Rng
from ntkbench.options import Target
from ntkbench.problem import Problem


class OneSided(Accumulating):
    """The mean of ||A u||^2 over random signs u, with A = J^T or J: 1 pass per probe; unbiased.

    The variance is 2 (||G||_F^2 - sum_i G_ii^2) / k for k probes, with G = A^T A.

    Attributes:
        side: ``reverse`` for A = J^T, ``forward`` for A = J.
    """

    source = "Hazelden 2025 (arXiv 2511.10796), one-sided trace estimates"
    backends = ("torch", "jax")
    metrics = ("trace",)
    side: ClassVar[Side]

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def jvp_share(self, metric: str) -> float:
        return float(self.side == "forward")

    def signs(self, problem: Problem, metric: str) -> int:
        return problem.n if self.side == "reverse" else problem.P

    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> ProbeMeans:
        (j,) = jacobians
        A = factor(j, self.side)
        return ProbeMeans(("trace",), lambda k: [(A.product(rng.sign(k, A.dim)) ** 2).sum(1)], j.blocks)


class OneSidedPaper(FixedBudget):
    """||A Q||_F^2 + mean of ||A (I - Q Q^T) g||^2 over m probes, with A = J^T or J: 1 pass per probe; unbiased.

    Q is an orthonormal basis of q = m // 6 random sign vectors, and g are the other m - q probes, also random signs. Q
    does not depend on A, so it removes a share of only q / dim of the trace. The variance is about
    2 ||G||_F^2 (1 - 2 q / dim) / (m - q), with G = A^T A of size dim: more than that of m plain probes, unless dim is
    small. The standard error is that of the residual's mean.

    Attributes:
        side: ``reverse`` for A = J^T, ``forward`` for A = J.
    """

    source = "Hazelden 2025 (arXiv 2511.10796), the paper's script (trace_one_sided)"
    backends = ("torch", "jax")
    metrics = ("trace",)
    fewest_probes = 6
    side: ClassVar[Side]

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def jvp_share(self, metric: str) -> float:
        return float(self.side == "forward")

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The random vectors of the basis, their QR factorisation and Q."""
        dim = problem.n if self.side == "reverse" else problem.P
        columns = min((self.default_passes if passes is None else passes) // 6, dim)
        return 3 * columns * dim * target.itemsize

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        (j,) = jacobians
        A = factor(j, self.side)
        return deflation.random_subspace(j, A.product, probes, A.dim, rng)

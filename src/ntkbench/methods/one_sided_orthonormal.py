"""One-sided orthonormal: tr Theta from VJPs of orthonormal directions, exact once they are a basis."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ntkbench.estimators import deflation, standard_errors
from ntkbench.estimators.accumulators import ProbeMeans
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import Accumulating
from ntkbench.operators import Array, JacobianOperator, Rng
from ntkbench.options import Target
from ntkbench.problem import Problem


class OneSidedOrthonormal(Accumulating):
    """n times the mean of ||J^T q_i||^2 over k random orthonormal vectors q_i: 1 pass per probe; unbiased.

    The q_i are a Gaussian block after QR. The variance is 2 n (n - k) / ((n - 1) (n + 2)) (||Theta||_F^2 -
    (tr Theta)^2 / n) / k: that of k points on the sphere with the finite-population correction (n - k) / (n - 1). So n
    probes are exact, and no more are drawn. With fewer probes, random signs (``one_sided_reverse``) have the smaller
    variance unless the diagonal of Theta is nearly constant, and need no QR. Holds the probes, k n numbers.
    """

    title = "one-sided orthonormal"
    source = "Hazelden 2025 (arXiv 2511.10796), one-sided trace estimates on orthonormalised directions"
    use_when = "the budget is a large part of n"
    variance = "2 n (n - k) / ((n - 1) (n + 2)) (||Theta||_F^2 - (tr Theta)^2 / n) / k"
    backends = ("torch", "jax")
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The probes, and a copy of them while further ones are added."""
        probes = min(self.default_passes if passes is None else passes, problem.n)
        return 2 * probes * problem.n * target.itemsize

    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> ProbeMeans:
        (j,) = jacobians
        return _OrthonormalProbes(j, rng)


class _OrthonormalProbes(ProbeMeans):
    """Orthonormal probes; new ones are orthogonal to all earlier ones."""

    def __init__(self, jacobian: JacobianOperator, rng: Rng) -> None:
        super().__init__(("trace",), self._squared_norms, jacobian.blocks)
        self._jacobian, self._rng = jacobian, rng
        self._probes = jacobian.basis(0, 0)

    def extend(self, probes: int) -> None:
        probes = min(probes, self._jacobian.n - len(self._probes))
        if probes:
            super().extend(probes)

    def _squared_norms(self, k: int) -> list[Array]:
        n = self._jacobian.n
        g = deflation.orthonormal_complement(self._rng.normal(k, n), self._probes)
        self._probes = array_api_compat.array_namespace(g).concat([self._probes, g])
        return [n * (self._jacobian.vjp(g) ** 2).sum(1)]

    def estimate(self, metric: str) -> PointEstimate:
        # The probes have a correlation of -1 / (n - 1), so their scatter is too large by the factor n / (n - 1).
        return standard_errors.finite_population(super().estimate(metric), len(self._probes), self._jacobian.n)

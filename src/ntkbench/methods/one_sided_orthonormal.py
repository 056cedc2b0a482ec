"""One-sided orthonormal: tr Theta from VJPs of orthonormal directions, exact once they are a basis."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ntkbench.estimators import deflation, standard_errors
from ntkbench.estimators.accumulators import Columns
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import Sampling
from ntkbench.operators import Array, JacobianOperator, Rng


class OneSidedOrthonormal(Sampling):
    """n times the mean of ||J^T q_i||^2 over k orthonormal q_i, a Gaussian block after QR: 1 pass a probe; unbiased.

    Variance 2 n (n - k) / ((n - 1) (n + 2)) (||Theta||_F^2 - (tr Theta)^2 / n) / k: that of k points on the sphere with
    the correction of a finite population, (n - k) / (n - 1), so that n probes are exact; more are not drawn. Below
    that, signs (``one_sided_reverse``) have the smaller variance wherever Theta's diagonal is uneven, and no QR. The
    probes, k n numbers, are held.
    """

    title = "one-sided orthonormal"
    source = "Hazelden 2025, one-sided trace estimates on orthonormalised directions"
    backends = ("torch", "jax")
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Columns:
        (j,) = jacobians
        return _Frame(j, rng)


class _Frame(Columns):
    """Orthonormal probes; new ones are drawn orthogonal to all before."""

    def __init__(self, jacobian: JacobianOperator, rng: Rng) -> None:
        super().__init__(("trace",), self._norms, jacobian.blocks)
        self._jacobian, self._rng = jacobian, rng
        self._probes = jacobian.basis(0, 0)

    def extend(self, probes: int) -> None:
        probes = min(probes, self._jacobian.n - self._probes.shape[0])
        if probes:
            super().extend(probes)

    def _norms(self, k: int) -> list[Array]:
        n = self._jacobian.n
        g = deflation.beyond(self._rng.normal(k, n), self._probes)
        self._probes = array_api_compat.array_namespace(g).concat([self._probes, g])
        return [n * (self._jacobian.vjp(g) ** 2).sum(1)]

    def read(self, metric: str) -> Reading:
        # Probes of one frame are correlated by -1/(n - 1), which makes their scatter too large by n / (n - 1).
        return standard_errors.orthonormal(super().read(metric), self._probes.shape[0], self._jacobian.n)

"""Nystrom++: the trace of a Nystrom approximation, and Hutchinson on its residual, with Theta as a black box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng, arrays


class NystromPP(FixedBudget):
    """tr A' + 1/k sum_i g_i^T (A - A') g_i with A' = A S (S^T A S)^+ (A S)^T, for A = Theta and A = Theta^2.

    S and g are k Gaussian vectors each. This takes 2k products with A, where Hutch++ takes 3k. A product takes 2 passes
    for Theta, and 4 for Theta^2. The effective rank combines independent estimates of the two traces. The method does
    not apply to the alignment, as Theta Theta_f is not symmetric. Unbiased, with variance 2 ||A - A'||_F^2 / k given S.
    The standard error is that of the residual's mean. The pseudo-inverse omits small and negative eigenvalues of S^T A
    S, which are round-off; the residual then includes their part of A. Exact once k reaches the rank of A, up to
    round-off times k.
    """

    title = "Nystrom++"
    source = "Persson et al. 2022 (doi 10.1137/21M1447623), algorithm 3.1 (the blog post's Nystrom++ was Hutch++)"
    use_when = "Theta is a black box whose spectrum decays fast"
    variance = "2 ||A - A'||_F^2 / k, given S"
    backends = ("torch", "jax")
    metrics = ("trace", "norm", "effective_rank")

    def passes_per_probe(self, metric: str) -> int:
        return {"trace": 4, "norm": 8, "effective_rank": 12}[metric]

    def jvp_share(self, metric: str) -> float:
        return 1 / 2

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        n = jacobians[0].n
        k = min(probes, n)
        return deflation.from_separate_traces(metric, jacobians, lambda a: _trace(a, k, n, rng))


def _trace(product: deflation.LinearMap, k: int, n: int, rng: Rng) -> PointEstimate:
    s = rng.normal(k, n)
    y = product(s)
    core = arrays.to_numpy(s @ y.T, np.float64)
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > k * arrays.epsilon(y) * max(values[-1], 0.0)
    b = arrays.asarray_like((vectors[:, kept] / np.sqrt(values[kept])).T, y) @ y
    g = rng.normal(k, n)
    residual = (g * product(g)).sum(1) - ((g @ b.T) ** 2).sum(1)
    return deflation.add(float((b**2).sum()), deflation.mean(arrays.gather([residual]), n))

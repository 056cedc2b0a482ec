"""Nystrom++: a Nystrom approximation's trace, and Hutchinson on what it left, with Theta as a black box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ntkbench.estimators import deflation, standard_errors
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class NystromPP(FixedBudget):
    """tr A = tr A' + 1/k sum_i g_i^T (A - A') g_i with A' = A S (S^T A S)^+ (A S)^T, for Theta and Theta^2.

    S and g are k Gaussian vectors each: 2k products with A, where Hutch++ takes 3k. A product costs 2 passes for Theta
    and 4 for Theta^2; effective rank takes separate traces. There is no alignment, as Theta Theta_f is not
    symmetric. Unbiased, with variance 2 ||A - A'||_F^2 / k given S; the standard error is that of the residual's mean.
    Small and negative eigenvalues of S^T A S, which are round-off, are left out of its pseudo-inverse: the residual
    takes care of whatever A' lacks. Exact once k is the rank of A, to round-off times the number of probes.
    """

    title = "Nystrom++"
    source = "Persson, Cortinovis, Kressner 2022, algorithm 3.1 (the blog post's Nystrom++ was Hutch++)"
    backends = ("torch", "jax")
    metrics = ("trace", "norm", "effective_rank")

    def passes_per_probe(self, metric: str) -> int:
        return {"trace": 4, "norm": 8, "effective_rank": 12}[metric]

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        n = jacobians[0].n
        k = min(probes, n)
        return deflation.from_separate_traces(metric, jacobians, lambda a: _trace(a, k, n, rng))


def _trace(product: deflation.Operator, k: int, n: int, rng: Rng) -> Reading:
    s = rng.normal(k, n)
    y = product(s)
    core = deflation.on_host(s @ y.T)
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > k * deflation.precision(y) * max(values[-1], 0.0)
    # A' = b^T b
    b = deflation.beside((vectors[:, kept] / np.sqrt(values[kept])).T, y) @ y
    g = rng.normal(k, n)
    left = (g * product(g)).sum(1) - ((g @ b.T) ** 2).sum(1)
    return deflation.plus(float((b**2).sum()), standard_errors.mean(standard_errors.by_probe([left])))

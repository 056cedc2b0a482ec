"""Hutchinson: random sign probes through Theta as a black box."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench import statistics
from ntkbench.jacobian import Array, Jacobian, Rng
from ntkbench.methods.base import Stochastic
from ntkbench.metrics import Moments


class Hutchinson(Stochastic):
    """u^T Theta u, ||Theta u||^2 and <Theta u, Theta_f u> over random signs u: 2 passes a probe, 4 for alignment.

    Unbiased for the trace, with variance 2 (||Theta||_F^2 - sum_i Theta_ii^2) / k, and for ||Theta||_F^2; the square
    root and the ratios are biased at order 1/k. The standard error is the jackknife over probes.
    """

    title = "Hutchinson"
    source = "Hutchinson 1990; Girard 1989; Theta as a black box as in Hazelden 2025"
    backends = ("torch", "jax")

    def passes_per_probe(self, metric: str) -> int:
        return 4 if metric == "alignment" else 2

    def draw(self, metric: str, jacobians: Sequence[Jacobian], probes: int, rng: Rng) -> tuple[float, float]:
        def products(u: Array) -> list[Array]:
            theta_u, *theta_f_u = (j.ntk(u) for j in jacobians)
            pairs = [(u, theta_u), (theta_u, theta_u)]
            pairs += [pair for f in theta_f_u for pair in ((f, f), (theta_u, f))]
            return [(a * b).sum(1) for a, b in pairs]

        j = jacobians[0]
        blocks = [products(rng.sign(k, j.n)) for k in j.blocks(probes)]
        columns = [statistics.by_probe(column) for column in zip(*blocks, strict=True)]
        return statistics.jackknife(lambda *means: Moments(*means).metric(metric), *columns)

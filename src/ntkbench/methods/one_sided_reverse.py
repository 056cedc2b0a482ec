"""One-sided reverse: tr Theta = E ||J^T u||^2, VJPs only."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench import statistics
from ntkbench.jacobian import Jacobian, Rng
from ntkbench.methods.base import Stochastic


class OneSidedReverse(Stochastic):
    """The mean of ||J^T u||^2 over random signs u: 1 pass a probe, half of what Theta u costs; unbiased.

    Variance 2 (||Theta||_F^2 - sum_i Theta_ii^2) / k.
    """

    title = "one-sided reverse"
    source = "Hazelden 2025, one-sided trace estimates"
    backends = ("torch", "jax")
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def draw(self, metric: str, jacobians: Sequence[Jacobian], probes: int, rng: Rng) -> tuple[float, float]:
        (j,) = jacobians
        return statistics.mean(statistics.by_probe((j.vjp(rng.sign(k, j.n)) ** 2).sum(1) for k in j.blocks(probes)))

"""One-sided reverse: tr Theta = E ||J^T u||^2, VJPs only."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import Columns
from ntkbench.methods.base import Sampling
from ntkbench.operators import JacobianOperator, Rng


class OneSidedReverse(Sampling):
    """The mean of ||J^T u||^2 over random signs u: 1 pass a probe, half of what Theta u costs; unbiased.

    Variance 2 (||Theta||_F^2 - sum_i Theta_ii^2) / k.
    """

    title = "one-sided reverse"
    source = "Hazelden 2025, one-sided trace estimates"
    backends = ("torch", "jax")
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Columns:
        (j,) = jacobians
        return Columns(("trace",), lambda k: [(j.vjp(rng.sign(k, j.n)) ** 2).sum(1)], j.blocks)

"""One-sided forward: tr Theta = E ||J w||^2, JVPs only."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import Columns
from ntkbench.methods.base import Sampling
from ntkbench.operators import JacobianOperator, Rng


class OneSidedForward(Sampling):
    """The mean of ||J w||^2 over random signs w in parameter space: 1 pass a probe and no backward pass; unbiased.

    Variance 2 (||J^T J||_F^2 - sum_p (J^T J)_pp^2) / k.
    """

    title = "one-sided forward"
    source = "Hazelden 2025, one-sided trace estimates"
    backends = ("torch", "jax")
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Columns:
        (j,) = jacobians
        return Columns(("trace",), lambda k: [(j.jvp(rng.sign(k, j.P)) ** 2).sum(1)], j.blocks)

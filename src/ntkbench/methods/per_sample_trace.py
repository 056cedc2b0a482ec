"""Per-sample trace: tr Theta = sum_b E ||J_b^T u_b||^2, every sample's gradient from the same backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import SampleTraces
from ntkbench.methods.base import Sampling
from ntkbench.operators import JacobianOperator, Rng


class PerSampleTrace(Sampling):
    """The mean over k fields of random signs u of sum_b ||J_b^T u_b||^2: 1 pass a field; unbiased.

    A one-sided probe squares the sum of all samples' gradients, and what two samples' gradients have in common is
    noise; here each gradient is squared by itself. Variance 2 sum_b (||Theta_bb||_F^2 - sum_o Theta_(bo)(bo)^2) / k, of
    the diagonal blocks alone, and none for O = 1. The standard error adds up the samples' variances over fields.
    """

    title = "per-sample trace"
    source = "Hutchinson 1990 on each sample's block; per-sample gradients as in Goodfellow 2015 (arXiv 1510.01799)"
    backends = ("torch", "jax")
    metrics = ("trace",)
    needs_independent_samples = True
    first_batch = 4

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> SampleTraces:
        (j,) = jacobians
        return SampleTraces(lambda k: j.sample_squares(rng.sign(k, j.n).reshape(k, j.N, j.O)), j.blocks)

"""Per-sample trace, forward: tr Theta = sum_b E ||J_b w_b||^2 with a tangent of each sample's own."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import SampleTraces
from ntkbench.methods.base import Sampling
from ntkbench.operators import Array, JacobianOperator, Rng
from ntkbench.options import Target
from ntkbench.problem import Problem


class PerSampleTraceForward(Sampling):
    """The mean over k fields of random signs w of sum_b ||J_b w_b||^2: 1 pass a field, JVPs only; unbiased.

    As in ``per_sample_trace`` what two samples have in common is no noise: variance
    2 sum_b (||A_b||_F^2 - sum_p (A_b)_pp^2) / k with A_b = J_b^T J_b, where ||A_b||_F = ||Theta_bb||_F. The diagonal
    that signs take away is that of A_b, and not of Theta_bb: a large one where outputs of a sample share parameters,
    as the steps of a recurrent network do, and a small one in wide layers. Each sample needs P random signs, so with
    many parameters and few outputs the probes cost more than the products.
    """

    title = "per-sample trace (forward)"
    source = "this suite; Hutchinson 1990 on J_b^T J_b of each sample"
    backends = ("torch", "jax")
    metrics = ("trace",)
    needs_independent_samples = True
    first_batch = 4

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        return 3 * problem.N * problem.P * target.itemsize

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> SampleTraces:
        (j,) = jacobians

        def squares(k: int) -> Array:
            w = rng.sign(k, j.N * j.P).reshape(k, j.N, j.P)
            return (j.sample_jvp(slice(0, j.N), w) ** 2).sum(-1)

        def blocks(fields: int) -> list[int]:
            size = max(1, j.memory // (j.bytes_per_probe() + 3 * j.N * j.P * j.itemsize))
            return [min(size, fields - start) for start in range(0, fields, size)]

        return SampleTraces(squares, blocks)

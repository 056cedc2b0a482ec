"""Group U-statistics: moments of Theta from inner products of the gradients of groups of samples."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import Pairs, Sample, SampleTraces, moments_of
from ntkbench.methods.base import Sampling
from ntkbench.operators import Array, JacobianOperator, Rng
from ntkbench.problem import Problem

GROUPS = 24
"""As many as make inner products about as dear as passes, for a few fields on networks of some ten thousand
parameters."""


class GroupUStatistics(Sampling):
    """``block_u_statistics`` with groups of neighbouring samples in the place of samples, up to 24 of them.

    Fields of random signs u, gradients w_g^k = sum_(b in g) J_b^T u_b^k of each group g and field k, tr Theta = E
    mean_k sum_g ||w_g^k||^2, and ||Theta||_F^2 = E [mean_(k, l) sum_(g != h) <w_g^k, w_h^l>^2 + mean_(k != l) sum_g
    <w_g^k, w_g^l>^2]; so for the cross term, and unbiased all of them. One group is ``gram_reverse``, whose term 4
    ||Theta||_F^4 / k^2 falls with the square of the number of groups, and N groups are ``block_u_statistics``, whose k
    N gradients have (k N)^2 inner products. In between gradients are as cheap as VJPs and their inner products no
    dearer: where a sample's gradient takes little of a pass, as in recurrent networks, an error is reached in a
    fraction of the time of either.

    The trace by itself is that of ``per_sample_trace``. 1 pass a field, 2 for alignment. Variance, its estimate and
    memory as for ``block_u_statistics``.
    """

    title = "group U-statistics"
    source = "this suite; U-statistics of Hoeffding 1948"
    backends = ("torch", "jax")
    needs_independent_samples = True
    fewest_probes = 2
    first_batch = 4

    def worthwhile_passes(self, problem: Problem) -> int:
        # Beyond a thousand gradients their inner products take most of the time, and its square.
        return 1024 // min(problem.N, GROUPS)

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Sample:
        j = jacobians[0]
        if tuple(names) == ("trace",):  # which takes no inner products
            return SampleTraces(lambda k: j.sample_squares(rng.sign(k, j.n).reshape(k, j.N, j.O)), j.blocks)
        count = min(j.N, GROUPS)
        groups = [slice(j.N * g // count, j.N * (g + 1) // count) for g in range(count)]

        def gradients(u: Array, turn: slice) -> list[Array]:
            chosen = groups[turn]
            v = u.reshape(-1, j.N, j.O)[:, chosen[0].start : chosen[-1].stop]
            return [jacobian.group_gradients(chosen, v) for jacobian in jacobians]

        return Pairs(moments_of(names), count, j.P, jacobians, lambda k: rng.sign(k, j.n), gradients)
